"""Which implementation of an op runs, and what keeps another from running."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from enum import StrEnum
from types import ModuleType
from typing import Any

import torch

# ops with kernels: the package of kernels that an op's name stands for, beside its module of contracts
_KERNELS = {
    "delta_rule": "delta",
    "conv": "conv",
    "norm": "norm",
    "block": "block",
    "paged": "paged",
    "thin": "thin",
    "linear_divergence": "divergence",
}


class Impl(StrEnum):
    """The implementation of an op: eager torch that defines it, or our Triton kernels."""

    REFERENCE = "reference"
    TRITON = "triton"


def is_triton(impl: Impl | str) -> bool:
    """Say whether an op shall run on our kernels; a ValueError says that there is no such implementation."""
    # torch 2.11 cannot trace the class called with one of its members
    chosen = impl if isinstance(impl, Impl) else Impl(impl)
    return chosen is Impl.TRITON


def resolve(requested: str, *, op: str, device: torch.device) -> Impl:
    """Turn a recipe's ``impl`` into one implementation.

    ``auto`` is Triton on the GPUs on which the op's kernels are tested, and the reference elsewhere. Called once, where
    a model is built or moved; ops themselves take what it returns and never fall back.

    Args:
        requested: ``auto``, ``reference`` or ``triton``.
        op: ``delta_rule``, ``conv``, ``norm``, ``block``, ``paged``, ``thin`` or ``linear_divergence``.
        device: Where the op will run.
    Raises:
        ValueError: The requested implementation cannot run there.
    """
    if requested == "reference" or (requested == "auto" and device.type != "cuda"):
        return Impl.REFERENCE
    found = _load(op, device)
    if found is None:
        return Impl.TRITON
    if requested == "auto":
        return Impl.REFERENCE
    raise ValueError(
        f'impl "{requested}" is not available for {op} on {device}: {found}; use "auto" or "reference"'
    )


# Of what happens here a compiler can trace nothing. It may keep the result, but only one that ends before its next
# graph break: torch cannot hand such a constant on.
@torch.compiler.assume_constant_result
def _load(op: str, device: torch.device) -> str | None:
    """Say what is in the way, or import all contracts, which a compiler must find imported."""
    found = obstacle(op, device)
    if found is None and len(_contracts) < len(_KERNELS):
        for name in _KERNELS:
            contract(name)
    return found


@functools.cache
def obstacle(op: str, device: torch.device) -> str | None:
    """Say what keeps an op's kernels from running on a device; None if nothing does. The kernels' family says it."""
    if op not in _KERNELS:
        return f"{op} has no kernels yet"
    for package in ("triton", "gendistill_kernels"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    return importlib.import_module(f"gendistill_kernels.{_KERNELS[op]}").obstacle(device)


_contracts: dict[str, ModuleType] = {}


def contract(op: str) -> Any:
    """Import an op's contract, of the installed package: a student's exported code carries none of its own."""
    if op not in _contracts:
        _contracts[op] = importlib.import_module(f"gendistill.ops.contracts.{op}")
    return _contracts[op]

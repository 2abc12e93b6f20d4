"""Low-rank adapters: what they can adapt, what they are called and how large they are. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gendistill.anatomy.groups import ParamGroup

# losses read embedding and head as whole tensors, past their modules, and norms are vectors
ADAPTABLE = (ParamGroup.MIXER, ParamGroup.ATTENTION, ParamGroup.MLP)

# what peft puts between the name of a linear layer and that of its parameter
_INSERTED = re.compile(r"\.(?:base_layer|lora_[AB]\.\w+)(?=\.)")


def plain_name(name: str) -> str:
    """Return what a parameter of an adapted student is called without adapters; that of an adapter is the weight's."""
    return _INSERTED.sub("", name)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_name(weight: str) -> str:
    """Return what the first factor of a weight's adapter is called."""
    return f"{weight.removesuffix('.weight')}.lora_A.default.weight"


def is_adaptable(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight of a linear layer; filters of convolutions have three sizes, gates one."""
    return name.endswith(".weight") and len(shape) == 2


def adapter_shapes(shape: Sequence[int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the two factors, the one that reads and the one that writes, for a weight ``[out, in]``."""
    rows, columns = shape
    return (rank, columns), (rows, rank)

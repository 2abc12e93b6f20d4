"""Which implementation a student's mixers will use on a device, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.placement import Placement
from gendistill.errors import RecipeError
from gendistill.ops import select


@dataclass(frozen=True, slots=True)
class ImplChoice:
    """What a recipe's ``student.impl`` means on one machine.

    Attributes:
        requested: ``auto``, ``reference`` or ``triton``.
        impl: ``reference`` or ``triton``; None if no mixer of the student has a choice.
        reason: What decided.
    """

    requested: str
    impl: str | None
    reason: str

    def __str__(self) -> str:
        if self.impl is None:
            return f"not used ({self.reason})"
        return f"{self.impl} ({self.reason})"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


def choose_impl(
    requested: str, placement: Placement, *, device: torch.device, device_name: str
) -> ImplChoice:
    """Resolve a recipe's ``student.impl`` as the mixers will.

    Args:
        requested: ``auto``, ``reference`` or ``triton``.
        placement: Mixer of each layer.
        device: Where the student will run.
        device_name: Its name for people.
    Raises:
        RecipeError: The requested implementation cannot run there.
    """
    ops = dict.fromkeys(spec.op for spec in map(MIXERS.__getitem__, placement.kinds) if spec.op is not None)
    if not ops:
        return ImplChoice(requested, None, "none of these mixers has kernels")
    try:
        # every family has the same obstacles so far
        impl = [select.resolve(requested, op=op, device=device) for op in ops][-1]
    except ValueError as error:
        raise RecipeError(
            str(error),
            where="student.impl",
            hint="student.impl=auto; or gendistill doctor, which says what torch finds here",
        ) from error
    if requested != "auto":
        return ImplChoice(requested, impl.value, "set by student.impl")
    if impl is select.Impl.TRITON:
        return ImplChoice(requested, impl.value, f"auto; {device_name}")
    if device.type != "cuda":
        return ImplChoice(requested, impl.value, f"auto; no CUDA device, torch runs on {device.type}")
    return ImplChoice(
        requested, impl.value, f"auto; {device_name}: {select.obstacle(next(iter(ops)), device)}"
    )

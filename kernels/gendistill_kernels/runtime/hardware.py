"""What GPUs there are, what a program may take of them, and what keeps kernels from one."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection
from typing import Literal

import torch

# Bytes of shared memory that a program may have. ``any`` is for 8.6, 8.9 and 12.x, which have the least of what runs
# bfloat16 products, and for whatever is not known.
SHARED_BYTES = {"sm_90": 232448, "sm_80": 166912, "any": 101376}
Architecture = Literal["sm_90", "sm_80", "any"]
_ARCHITECTURES: dict[tuple[int, int], Architecture] = {(9, 0): "sm_90", (8, 0): "sm_80", (8, 7): "sm_80"}
# kernels run on the CPU, by Triton's interpreter, which multiplies bfloat16 wrongly
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """Say which part of a table a device reads. On a CPU kernels are interpreted, as an sm_90 would run them."""
    if device.type != "cuda":
        return "sm_90"
    return _ARCHITECTURES.get(torch.cuda.get_device_capability(device), "any")


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Say whether a kernel may be placed before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def obstacle_on(device: torch.device, *, majors: Collection[int]) -> str | None:
    """Say what keeps kernels that are tested on GPUs of these compute capabilities from a device; None if nothing does.

    Args:
        device: Where they shall run.
        majors: First numbers of the compute capabilities on which the family has been tested.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "our Triton kernels run on NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in majors:
        tested = ", ".join(f"{number}.x" for number in majors)
        return f"our Triton kernels are tested on compute capability {tested}, this GPU has {major}.{minor}"
    return None

"""What each optimizer remembers of a parameter, and in how many bytes. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gendistill.anatomy.groups import ParamGroup

# numbers that share one float32 scale
BLOCK = 256
# a slab of moments is unpacked at a time; a larger tensor is a slab of its own
SLAB = 2**24
# below this, bytes saved do not pay for what rounding costs
_FEWEST = 4096


def in_8_bits(group: ParamGroup, num_numbers: int) -> bool:
    """Whether ``adamw8bit`` keeps a parameter's moments in 8 bits: not those of embeddings, whose rows learn rarely."""
    return group is not ParamGroup.EMBED and num_numbers >= _FEWEST


def moment_bytes(optimizer: str, group: ParamGroup, shape: Sequence[int]) -> int:
    """Count the bytes of a parameter's two moments."""
    numbers = math.prod(shape)
    if optimizer == "adamw8bit" and in_8_bits(group, numbers):
        blocks = math.ceil(numbers / BLOCK)
        return 2 * blocks * (BLOCK + 4)
    return 8 * numbers


def work_bytes(optimizer: str, group: ParamGroup, shapes: Sequence[Sequence[int]]) -> int:
    """Count the bytes that a step works on beside parameters, gradients and moments: one slab, unpacked and packed."""
    if optimizer != "adamw8bit":
        return 0
    sizes = [math.prod(shape) for shape in shapes]
    packed = [size for size in sizes if in_8_bits(group, size)]
    # both moments in float32, and the square of the first
    return 12 * max([min(SLAB, sum(packed)), *packed]) if packed else 0

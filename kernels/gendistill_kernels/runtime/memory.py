"""Memory of launches: tensors allocated alike in every call, and several in one piece of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
# shape and dtype of a tensor to allocate; None for no tensor
Space = tuple[Shape, torch.dtype] | None
# bytes: what torch aligns memory to, and what lies around a tensor in a piece of it, which tests fill and look at
_ALIGNMENT, _GAP = 512, 0


class Part:
    """A contiguous tensor in a larger piece of memory, made where somebody looks at it.

    Launches read its address, and do not pay for a tensor of its own.

    Args:
        whole: The piece of memory.
        start: Its address.
        offset: Of the tensor in it, in bytes; a multiple of 16.
        shape, dtype: Of the tensor.
    """

    __slots__ = ("_address", "dtype", "offset", "shape", "whole")

    def __init__(
        self, whole: Tensor, start: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.whole, self.offset, self.shape, self.dtype = whole, offset, shape, dtype
        self._address = start + offset

    def data_ptr(self) -> int:
        """Return the tensor's address."""
        return self._address

    def get_device(self) -> int:
        """Return the number of its device, -1 for the CPU."""
        return self.whole.get_device()

    @property
    def tensor(self) -> Tensor:
        """The tensor."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return self.whole[self.offset : self.offset + size].view(self.dtype).view(self.shape)


def offsets(spaces: Iterable[Space]) -> tuple[list[int], int]:
    """Lay out tensors in one piece of memory; returns where each starts, and the size of all, in bytes."""
    starts, end = [], _GAP
    for space in spaces:
        starts.append(end)
        if space is not None:
            shape, dtype = space
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT + _GAP
    return starts, end


def _shape_only(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor without memory, to make others like it: half as long as from shape, dtype and device."""
    like = torch.empty(1, dtype=dtype, device=device).expand(shape)
    like.untyped_storage().resize_(0)
    return like


class Results:
    """The same tensors for every call, allocated anew.

    Args:
        spaces: What to allocate; None for no tensor.
        device: Where.
    """

    def __init__(self, spaces: Sequence[Space], device: torch.device) -> None:
        self._like = [None if space is None else _shape_only(*space, device) for space in spaces]

    def allocate(self) -> list[Any]:
        """Return new, contiguous tensors with nothing in particular in them, and None where there is none."""
        return [None if like is None else torch.empty_like(like) for like in self._like]


class Workspace:
    """One piece of memory for the same tensors in every call; a piece for each would take the host longer.

    Args:
        spaces: Of tensors, by name; None for none.
        device: Where.

    Attributes:
        names: Of the tensors.
    """

    def __init__(self, spaces: Mapping[str, Space], device: torch.device) -> None:
        self.names = [*spaces]
        starts, size = offsets(spaces.values())
        self._spaces = [
            None if space is None else (start, *space)
            for start, space in zip(starts, spaces.values(), strict=True)
        ]
        self._like = _shape_only((size,), torch.uint8, device)

    def allocate(self) -> Tensor:
        """Return new memory, of bytes, with nothing in particular in it."""
        return torch.empty_like(self._like)

    def parts(self, memory: Tensor) -> list[Any]:
        """Return the tensors in it, as a ``Part`` each, and None where there is none."""
        start = memory.data_ptr()
        return [None if space is None else Part(memory, start, *space) for space in self._spaces]

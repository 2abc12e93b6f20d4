"""The batches of a step on their way to a GPU: one buffer and one copy, while the step before is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gendistill.data.batch import Batch
from gendistill.ops import Segments

# what the allocator aligns tensors to: kernels may tell aligned ones from others
_ALIGNMENT = 512
_NAMES = ("input_ids", "labels", "position_ids")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the buffer a tensor lies, and what it looks like."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size


class Packed:
    """Batches in host memory as one buffer, index tables included.

    Args:
        batches: On the host.
        builders: What made the index tables that batches before these had.

    Attributes:
        buffer: ``[num_bytes]`` uint8.
    """

    def __init__(self, batches: Sequence[Batch], builders: Sequence[Callable[..., Any]] = ()) -> None:
        self._batches = list(batches)
        self._places: list[_Place] = []
        self._tensors: list[Tensor] = []
        self._entries: list[tuple[list[int], int, dict[Callable[..., Any], Any]]] = []
        self._end = 0
        for batch in batches:
            tables = {build: batch.segments.table(build) for build in builders}
            self._entries.append(
                (
                    [self._add(getattr(batch, name)) for name in _NAMES],
                    self._add(batch.segments.cu_seqlens),
                    {build: self._packed(table) for build, table in tables.items() if _is_plain(table)},
                )
            )
        self.buffer = torch.zeros(self._end, dtype=torch.uint8)
        for place, tensor in zip(self._places, self._tensors, strict=True):
            _view(self.buffer, place).copy_(tensor)
        self._tensors.clear()

    def _add(self, tensor: Tensor) -> int:
        size = tensor.numel() * tensor.element_size()
        self._places.append(_Place(self._end, size, tensor.dtype, tensor.shape))
        self._tensors.append(tensor)
        self._end += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        return len(self._places) - 1

    def _packed(self, table: Any) -> Any:
        """Replace tensors by their places."""
        return _mapped(table, lambda tensor: _Slot(self._add(tensor)), Tensor)

    def unpack(self, buffer: Tensor) -> list[Batch]:
        """Return the batches as views of a copy of the buffer, on its device."""

        def tensor(number: int) -> Tensor:
            return _view(buffer, self._places[number])

        found = []
        for batch, (numbers, ends, tables) in zip(self._batches, self._entries, strict=True):
            placed = {
                build: _mapped(table, lambda slot: tensor(slot.number), _Slot)
                for build, table in tables.items()
            }
            segments = Segments.placed(batch.segments.lengths, tensor(ends), placed, room=batch.segments.room)
            moved = {name: tensor(number) for name, number in zip(_NAMES, numbers, strict=True)}
            found.append(replace(batch, **moved, segments=segments))
        return found


@dataclass(frozen=True, slots=True)
class _Slot:
    """The number of a place, in a table without its tensors."""

    number: int


@dataclass(frozen=True, slots=True)
class Sent:
    """Batches that the GPU may not use before a moment of its copying stream."""

    batches: list[Batch]
    buffer: Tensor
    arrived: torch.cuda.Event


class Feed:
    """The way to one GPU, on a stream of its own; nothing here waits for it.

    Args:
        device: Where batches are used.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, packed: Packed) -> Sent:
        """Start the copy."""
        with torch.cuda.stream(self._stream):
            # pinned memory is not given to anybody else before the copy is done
            buffer = packed.buffer.pin_memory().to(self.device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return Sent(packed.unpack(buffer), buffer, arrived)

    def receive(self, sent: Sent) -> list[Batch]:
        """Let the current stream use the batches from now on."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(sent.arrived)
        sent.buffer.record_stream(current)
        return sent.batches


def _view(buffer: Tensor, place: _Place) -> Tensor:
    return buffer[place.start : place.start + place.num_bytes].view(place.dtype).view(place.shape)


def _is_plain(table: Any) -> bool:
    """Whether a table consists of tensors, numbers and tuples of these."""
    if isinstance(table, tuple):
        return all(_is_plain(part) for part in table)
    return table is None or isinstance(table, Tensor | int | float | str)


def _mapped(table: Any, change: Callable[[Any], Any], kind: type) -> Any:
    """Rebuild a table with what is of one kind changed."""
    if isinstance(table, kind):
        return change(table)
    if not isinstance(table, tuple):
        return table
    parts = [_mapped(part, change, kind) for part in table]
    make = getattr(type(table), "_make", tuple)
    return make(parts)

"""What every op returns, and how packed documents are described."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class OpOutput(NamedTuple):
    """An op's output and the state after the last token."""

    out: Tensor
    state: Tensor


class Segments:
    """Independent sequences laid end to end on one token axis.

    Args:
        lengths: Tokens of each sequence; zero is allowed.
        device: Where index tensors are made.

    Attributes:
        lengths: Tokens of each sequence, on the host.
        num_tokens: Their sum.
        cu_seqlens: ``[N + 1]`` int32, ends of the sequences.
    """

    def __init__(self, lengths: list[int], *, device: torch.device | str = "cpu") -> None:
        self.lengths = lengths
        self.num_tokens = sum(lengths)
        self.device = torch.device(device)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        # a plain copy to a GPU waits until it has done all its work
        self.cu_seqlens = ends.to(self.device, non_blocking=True)
        self._layouts: dict[int, ChunkLayout] = {}
        self._taps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._tables: dict[Callable[..., Any], Any] = {}

    @classmethod
    def placed(
        cls, lengths: list[int], cu_seqlens: Tensor, tables: Mapping[Callable[..., Any], Any]
    ) -> Segments:
        """Take what is on a device already.

        Args:
            lengths: Tokens of each sequence.
            cu_seqlens: ``[N + 1]`` int32, as the attribute of this name.
            tables: What :meth:`table` returns, by what would make it there.
        """
        made = cls.__new__(cls)
        made.lengths, made.num_tokens = lengths, sum(lengths)
        made.device, made.cu_seqlens = cu_seqlens.device, cu_seqlens
        made._layouts, made._taps, made._tables = {}, {}, dict(tables)
        return made

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> Segments:
        """Read sequence ends ``[N + 1]``. Copies them to the host once."""
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or any(right < left for left, right in pairwise(ends)):
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {ends[:8]}")
        return cls([right - left for left, right in pairwise(ends)], device=cu_seqlens.device)

    def chunks(self, size: int) -> ChunkLayout:
        """Return the layout that cuts every sequence into chunks of ``size`` tokens."""
        if size not in self._layouts:
            self._layouts[size] = ChunkLayout.build(self.lengths, size, self.device)
        return self._layouts[size]

    def table(self, build: Callable[[list[int], torch.device], Any]) -> Any:
        """Return ``build(lengths, device)``, made once; kernels keep their index tensors here."""
        if build not in self._tables:
            self._tables[build] = build(self.lengths, self.device)
        return self._tables[build]

    @property
    def builders(self) -> tuple[Callable[..., Any], ...]:
        """What made the tables that have been asked for."""
        return tuple(self._tables)

    def taps(self, history: int) -> tuple[Tensor, Tensor, Tensor]:
        """Index the token axis with ``history`` extra slots before every sequence.

        Returns:
            Slots of the tokens ``[num_tokens]``, of the history ``[N, history]``, and of the last ``history``
            positions of each extended sequence ``[N, history]``; all int64.
        """
        if history not in self._taps:
            token, before, last, start = [], [], [], 0
            for length in self.lengths:
                before.append(range(start, start + history))
                token.extend(range(start + history, start + history + length))
                last.append(range(start + length, start + length + history))
                start += history + length
            shape = (len(self.lengths), history)
            indices = (
                torch.tensor(token),
                torch.tensor(before).reshape(shape),
                torch.tensor(last).reshape(shape),
            )
            self._taps[history] = tuple(index.long().to(self.device, non_blocking=True) for index in indices)  # pyright: ignore
        return self._taps[history]


class ChunkLayout(NamedTuple):
    """Where chunk-padded tokens come from, with the chunks of one step side by side.

    Sequences are sorted by length, longest first; step ``s`` holds the ``s``-th chunk of every sequence that
    has one. The scan then runs over steps and each step works on a prefix of the sequences.

    Attributes:
        source: ``[num_chunks * size]`` int64, token of each slot; ``num_tokens`` (one past the end) for padding.
        slot: ``[num_tokens]`` int64, the inverse: slot of each token.
        active: Sequences that take part in each step.
        order: ``[N]`` int64, sequences sorted by length, longest first.
        rank: ``[N]`` int64, its inverse.
    """

    source: Tensor
    slot: Tensor
    active: list[int]
    order: Tensor
    rank: Tensor

    @classmethod
    def build(cls, lengths: list[int], size: int, device: torch.device) -> ChunkLayout:
        """Compute the layout on the host.

        Numbers that steer Python are never read from a tensor: a compiler would have to break its graph there.
        """
        count = torch.tensor(lengths, dtype=torch.int64)
        starts = count.cumsum(0) - count
        order = torch.argsort(count, descending=True, stable=True)
        chunks = [(length + size - 1) // size for length in lengths]
        last = [0] * max(chunks, default=0)
        for number in chunks:
            if number:
                last[number - 1] += 1
        active = list(accumulate(reversed(last)))[::-1]
        within = torch.arange(size)
        total = sum(lengths)
        source = []
        for step, number in enumerate(active):
            position = step * size + within.expand(number, size)
            token = starts[order[:number], None] + position
            source.append(torch.where(position < count[order[:number], None], token, total))
        flat = torch.cat(source).flatten() if source else torch.zeros(0, dtype=torch.int64)
        slot = torch.empty(total + 1, dtype=torch.int64)
        slot[flat] = torch.arange(flat.numel())
        rank = torch.argsort(order)
        source, slots, order, rank = (
            part.to(device, non_blocking=True) for part in (flat, slot[:total], order, rank)
        )
        return cls(source, slots, active, order, rank)

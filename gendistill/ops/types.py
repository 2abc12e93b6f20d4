"""What every op returns, and how packed documents and paged sequences are described."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor


class OpOutput(NamedTuple):
    """An op's output and the state after the last token."""

    out: Tensor
    state: Tensor


class UnknownLengths(RuntimeError):
    """The lengths of documents were asked for where only the device knows them."""

    def __init__(self) -> None:
        super().__init__(
            "the lengths of documents differ from batch to batch and are not known to the host here"
        )


class _Unknown(Sequence[int]):
    """Lengths of which only the number is known."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UnknownLengths

    __getitem__ = __iter__ = __contains__ = __reversed__ = __eq__ = __add__ = __radd__ = __array__ = _refuse
    __hash__ = None  # pyright: ignore[reportAssignmentType]


@runtime_checkable
class Fillable(Protocol):
    """A table of tiles that can have more entries than its sequences need."""

    def filled(self, tiles: int, sequences: int, longest: int | None) -> Any:
        """Append entries that change nothing, up to a number that depends on these alone.

        Args:
            tiles: Of 64 tokens, of all sequences.
            sequences: How many.
            longest: A number of tokens that none exceeds; None if there is no such number.
        """
        ...


class Segments:
    """Independent sequences laid end to end on one token axis.

    Args:
        lengths: Tokens of each sequence; zero is allowed.
        device: Where index tensors are made.
        room: Make tables as long as sequences with this many tiles of 64 tokens would have, so that work that was
            recorded with them can be repeated with other sequences: shapes of tables then depend only on this and the
            number of sequences. The last sequence must be empty: what fills a table is added to it. 0: no longer than
            needed.
        bound: With room, a number of tokens that no sequence will exceed, which shapes of tables may depend on as
            well; None if there is no such number.

    Attributes:
        lengths: Tokens of each sequence, on the host.
        num_tokens: Their sum.
        cu_seqlens: ``[N + 1]`` int32, ends of the sequences.
        room, bound: As given.

    Raises:
        ValueError: There is to be room, and the last sequence is not empty or one is longer than the bound.
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        device: torch.device | str = "cpu",
        room: int = 0,
        bound: int | None = None,
    ) -> None:
        if room and (not lengths or lengths[-1]):
            raise ValueError(
                f"with room, the last sequence must be empty; got {len(lengths)} of lengths ..., "
                f"{', '.join(map(str, lengths[-3:]))}; append one of length 0"
            )
        if bound is not None and max(lengths, default=0) > bound:
            raise ValueError(f"no sequence may have more than {bound} tokens, got {max(lengths)}")
        self.lengths, self.room, self.bound = lengths, room, bound
        self.num_tokens = sum(lengths)
        self.device = torch.device(device)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        # a plain copy to a GPU waits until it has done all its work
        self.cu_seqlens = ends.to(self.device, non_blocking=True)
        self._layouts: dict[int, ChunkLayout] = {}
        self._taps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._tables: dict[Callable[..., Any], Any] = {}
        self._longest: int | None = None

    @classmethod
    def placed(
        cls,
        lengths: list[int],
        cu_seqlens: Tensor,
        tables: Mapping[Callable[..., Any], Any],
        *,
        room: int = 0,
    ) -> Segments:
        """Take what is on a device already.

        Args:
            lengths: Tokens of each sequence.
            cu_seqlens: ``[N + 1]`` int32, as the attribute of this name.
            tables: What :meth:`table` returns, by what would make it there.
            room: As the attribute of this name.
        """
        return cls._of(lengths, sum(lengths), None, cu_seqlens, tables, room)

    @classmethod
    def unknown(
        cls,
        documents: int,
        num_tokens: int,
        longest: int | None,
        cu_seqlens: Tensor,
        tables: Mapping[Callable[..., Any], Any],
        *,
        room: int,
    ) -> Segments:
        """Describe documents whose lengths only the device knows; these may change with what lies in the tensors.

        Whoever asks for a length, or for a table that is not given, gets :class:`UnknownLengths`.

        Args:
            documents: How many, empty ones included.
            num_tokens: Of all.
            longest: A number of tokens that none exceeds; None if that is unknown, too.
            cu_seqlens: ``[documents + 1]`` int32, as the attribute of this name.
            tables: As for :meth:`placed`.
            room: As the attribute of this name.
        """
        assert cu_seqlens.shape == (documents + 1,)
        return cls._of(_Unknown(documents), num_tokens, longest, cu_seqlens, tables, room)

    @classmethod
    def _of(
        cls,
        lengths: Any,
        num_tokens: int,
        longest: int | None,
        cu_seqlens: Tensor,
        tables: Mapping[Callable[..., Any], Any],
        room: int,
    ) -> Segments:
        made = cls.__new__(cls)
        made.lengths, made.num_tokens, made._longest, made.room = lengths, num_tokens, longest, room
        made.bound = None
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

    def static(self, longest: int | None = None) -> Segments:
        """Copy what is on the device, for work that is recorded once and repeated on what is copied there later.

        Args:
            longest: A number of tokens that no sequence will exceed; None refuses whoever asks for it.
        Raises:
            TypeError: A table consists of more than tensors, numbers and tuples of these.
        """
        return Segments.unknown(
            len(self.lengths),
            num_tokens=self.num_tokens,
            longest=longest,
            cu_seqlens=self.cu_seqlens.clone(),
            tables={build: _copied(table) for build, table in self._tables.items()},
            room=self.room,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All that is on the device: ends and tables, in an order that does not depend on lengths."""
        return [self.cu_seqlens, *(part for table in self._tables.values() for part in _tensors_in(table))]

    @property
    def fixed(self) -> tuple[Any, ...]:
        """All of the tables but their tensors: what a recording that reads these has fixed."""
        return tuple(_fixed_in(table) for table in self._tables.values())

    def chunks(self, size: int) -> ChunkLayout:
        """Return the layout that cuts every sequence into chunks of ``size`` tokens."""
        if size not in self._layouts:
            self._layouts[size] = ChunkLayout.build(self._known_lengths(), size, self.device)
        return self._layouts[size]

    def table(self, build: Callable[[list[int], torch.device], Any]) -> Any:
        """Return ``build(lengths, device)``, made once; kernels keep their index tensors here.

        With room, one that is :class:`Fillable` is filled.
        """
        if build not in self._tables:
            made = build(self._known_lengths(), self.device)
            if self.room and isinstance(made, Fillable):
                made = made.filled(self.room, len(self.lengths), self.bound)
            self._tables[build] = made
        return self._tables[build]

    def _known_lengths(self) -> list[int]:
        if isinstance(self.lengths, _Unknown):
            raise UnknownLengths
        return self.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, or a number that none exceeds if only the device knows them."""
        if self._longest is None:
            self._longest = max(self.lengths, default=0)
        return self._longest

    @property
    def tables(self) -> Mapping[Callable[..., Any], Any]:
        """The tables that have been asked for, by what made them."""
        return self._tables

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
            for length in self._known_lengths():
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


def _tensors_in(table: Any) -> list[Tensor]:
    if isinstance(table, Tensor):
        return [table]
    parts = table if isinstance(table, tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _fixed_in(table: Any) -> Any:
    if isinstance(table, Tensor):
        return Tensor
    if isinstance(table, tuple):
        return tuple(_fixed_in(part) for part in table)
    # of anything else no recording is made
    return table if isinstance(table, bool | int | float | str | None) else type(table)


def _copied(table: Any) -> Any:
    if isinstance(table, Tensor):
        return table.clone()
    if isinstance(table, tuple):
        return getattr(type(table), "_make", tuple)([_copied(part) for part in table])
    if not isinstance(table, bool | int | float | str | None):
        raise TypeError(f"a table of documents has a {type(table).__name__} in it, which a graph cannot read")
    return table


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


# tokens of a page
PAGE = 64
# rows up to which products have kernels of their own
THIN_ROWS = 4


class Pages(NamedTuple):
    """Where the keys and values of sequences lie in pages, and which of their tokens are new.

    A sequence's new tokens are its last, and lie side by side on the token axis, sequence after sequence; N in all.

    Attributes:
        table: ``[S, P]`` int32, numbers of each sequence's pages in order; beyond its own any valid number, and so for
            pages that no window reaches.
        lengths: ``[S]`` int32, tokens of each sequence, the new ones included; 0 for a row without a sequence.
        starts: ``[S + 1]`` int32, ends of the sequences' new tokens on the token axis, from 0 to N.
        cells: ``[N]`` int64, ``page * PAGE + offset``: where the keys and values of the new tokens go. No two are the
            same, but those of rows without a sequence: nothing that they point at is ever read.
        single: Whether every sequence has one new token: then N is S, and starts means nothing.
    """

    table: Tensor
    lengths: Tensor
    starts: Tensor
    cells: Tensor
    single: bool

"""A pass over parts of prompts: what it reads, and CUDA graphs of passes.

A pass over few tokens is hundreds of small kernels, and a host is slower at launching them than a GPU at running them.
So a pass is filled up to one of few sizes with sequences that nobody has asked for, in a slot and a page that nobody
reads, and repeated as a graph. The first pass of a size runs as it is, the second is recorded: recording takes as long
as some passes, and most processes that see a size once never see it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gendistill.generation.recording import Recorder, ran_out
from gendistill.generation.schedule import Piece, Row
from gendistill.ops.types import Segments, UnknownLengths

# graphs at a time: they share their memory, but each has some of its own
_MOST_GRAPHS = 64
# smallest sizes that are told apart
_LEAST_TOKENS, _LEAST_SEQUENCES = 64, 4
# tokens of sequences that recurrent layers need not cut up; passes over such alone have graphs of their own
_SHORT = 2048


class Size(NamedTuple):
    """Tokens and sequences of a pass, those that fill it up included."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a pass reads, on the device.

    Attributes:
        numbers: ``[N + 2 S]`` int64, one after the other: the tokens ``[N]``; of each sequence its slot, and the
            position of its first token in this pass.
        segments: The sequences.
        fresh: Whether all sequences begin in this pass.
    """

    numbers: Tensor
    segments: Segments
    fresh: bool

    @classmethod
    def of(
        cls,
        pieces: Sequence[Piece],
        rows: Sequence[Row],
        *,
        spare: int,
        size: Size | None,
        to_device: Callable[[Any], Tensor],
    ) -> Reading:
        """Collect parts of prompts.

        Args:
            pieces: Of one pass.
            rows: By slot.
            spare: The slot of what fills the pass up.
            size: To fill it up to; None leaves it as it is.
            to_device: Copies numbers there.
        """
        tokens: list[int] = []
        for slot, start, count in pieces:
            tokens += rows[slot].tokens[start : start + count]
        slots, starts, lengths = (list(numbers) for numbers in zip(*pieces, strict=True))
        room, bound = 0, None
        if size is not None:
            missing, more = size.tokens - len(tokens), size.sequences - len(lengths)
            tokens += [0] * missing
            # several, so that none is read longer than those that were asked for; the last is empty
            fillers = more - 1
            lengths += [missing // fillers + (number < missing % fillers) for number in range(fillers)] + [0]
            slots += [spare] * more
            starts += [0] * more
            # as many tiles of 64 tokens as sequences of so many tokens can have
            room = size.tokens // 64 + size.sequences
            bound = _SHORT if max(lengths) <= _SHORT else None
        numbers = to_device([*tokens, *slots, *starts])
        segments = Segments(lengths, device=numbers.device, room=room, bound=bound)
        return cls(numbers, segments, not any(starts))

    @property
    def tokens(self) -> Tensor:
        """Token ids ``[N]``."""
        return self.numbers[: self.segments.num_tokens]

    @property
    def slots(self) -> Tensor:
        """Slots of the sequences ``[S]``."""
        return self.numbers[self.segments.num_tokens :].unflatten(0, (2, -1))[0]

    @property
    def starts(self) -> Tensor:
        """Positions of the sequences' first tokens in this pass ``[S]``."""
        return self.numbers[self.segments.num_tokens :].unflatten(0, (2, -1))[1]

    @property
    def tensors(self) -> list[Tensor]:
        """All that a graph of the pass reads anew."""
        return [self.numbers, *self.segments.tensors]

    def static(self) -> Reading:
        """Copy it for a graph, which knows no lengths."""
        return replace(self, numbers=self.numbers.clone(), segments=self.segments.static())


class _Graph(NamedTuple):
    inputs: list[Tensor]
    hidden: Tensor
    graph: torch.cuda.CUDAGraph


class Passes:
    """Passes that are repeated as graphs where their size comes again.

    Args:
        run: Takes what a pass reads, and returns the hidden state of the last token of each sequence ``[S, D]``.
        recorder: Of all graphs of the runner.
        captures: Whether any are repeated.
        make_way: Lets all graphs of the runner go, where memory does not suffice for more.
    """

    def __init__(
        self,
        run: Callable[[Reading], Tensor],
        recorder: Recorder,
        *,
        captures: bool,
        make_way: Callable[[], None],
    ) -> None:
        self._run, self._recorder, self._captures, self._make_way = run, recorder, captures, make_way
        self.graphs: dict[Any, _Graph] = {}
        self._seen: set[Size] = set()
        self._recorded: set[Size] = set()
        self._builders: dict[Callable[..., Any], None] = {}
        # why no pass of this model can be a graph; None if one can
        self.why_not: str | None = None

    def size(self, pieces: Sequence[Piece]) -> Size | None:
        """Return the size to fill a pass up to; None for one that runs as it is."""
        if not self._captures or self.why_not is not None:
            return None
        tokens = max(_LEAST_TOKENS, sum(piece.count for piece in pieces))
        quarter = max(_LEAST_TOKENS, 1 << (tokens - 1).bit_length()) // 4
        # the sequence that fills it up, and the last, which is empty
        sequences = max(_LEAST_SEQUENCES, 1 << (len(pieces) + 1).bit_length())
        size = Size(-(-tokens // quarter) * quarter, sequences)
        if size not in self._seen:
            self._seen.add(size)
            return None
        # with as many graphs as there may be, others run as they are
        return size if len(self.graphs) < _MOST_GRAPHS or size in self._recorded else None

    def __call__(self, reading: Reading) -> Tensor:
        """Take a pass; what is returned is valid until the next, or the next step."""
        if not reading.segments.room:
            hidden = self._run(reading)
            self._builders |= dict.fromkeys(reading.segments.builders)
            return hidden
        for build in self._builders:
            reading.segments.table(build)
        graph = self.graphs.get(_kind(reading))
        if graph is None:
            hidden = self._run(reading)
            # it may have asked for tables that no pass before it did
            self._builders |= dict.fromkeys(reading.segments.builders)
            if self.why_not is None and len(self.graphs) < _MOST_GRAPHS:
                self._record(reading)
            return hidden
        torch._foreach_copy_(graph.inputs, reading.tensors, non_blocking=True)  # pyright: ignore
        graph.graph.replay()
        return graph.hidden

    def _record(self, reading: Reading) -> None:
        """Record a pass that has just run, so that no kernel has to be compiled for it.

        If it cannot be recorded, no other is, and a warning says why: what it has found is there.
        """
        short = False
        try:
            # what is made in inference mode cannot be written to outside of it
            with torch.inference_mode(False), torch.no_grad():
                static = reading.static()
                hidden, graph = self._recorder(lambda: self._run(static))
        except UnknownLengths:
            self.why_not = "a mixer of the model asks for the lengths of sequences"
        except Exception as error:
            first = error.__context__ or error
            self.why_not = ": ".join([type(first).__name__, *str(first).strip().splitlines()[:1]])
            warnings.warn(f"passes over prompts run without CUDA graphs: {self.why_not}", stacklevel=2)
            short = ran_out(error)
        else:
            self.graphs[_kind(reading)] = _Graph(static.tensors, hidden, graph)
            self._recorded.add(Size(reading.segments.num_tokens, len(reading.segments.lengths)))
        if short:
            # what the error held in memory is gone here
            self._make_way()

    def forget(self) -> None:
        """Let all graphs go."""
        self.graphs.clear()
        self._recorded.clear()


def _kind(reading: Reading) -> Any:
    """Return what two passes have in common that one graph can run."""
    return reading.fresh, reading.segments.fixed, tuple(part.shape for part in reading.tensors)

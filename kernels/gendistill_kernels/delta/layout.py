"""How a call is cut up and what it allocates, in words that torch alone understands: no triton here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gendistill_kernels.delta.rule import Inputs, Rule
from gendistill_kernels.runtime.memory import Shape, Space, offsets
from gendistill_kernels.runtime.room import TILE, fill

# tokens of a chunk
CHUNK = TILE
# A longer sequence is cut into spans of this many chunks, which are scanned at the same time. Its own length alone
# decides that, so that a sequence does not depend on what else is in the batch; and no GPU, for bits depend on it.
SPAN = 128
# Without gradients few sequences may be all there is, and somebody waits for them. A step of a scan takes 1.6 us of an
# H200 whether 32 programs take it or one for each processor, 132. So a sequence of 64 chunks, 16 heads of 128, takes
# 105 us whole, and in four spans 16 steps that find what these do to a state, three that carry it, and 16 more. Of more
# spans some would wait for a processor. A sequence of no more chunks than ``UNCUT`` would gain little, and where there
# are many lose: it has 2,048 tokens, and the pass that it alone is read in has tiles for three more sequences.
PARTS = 4
UNCUT = 36


class Sizes(NamedTuple):
    """How much there is of everything; capital letters as in ``chunk``.

    Attributes:
        HQ, HK, HV: Heads of q, k and v.
        BK, wide: K and V, rounded up to a size of tile.
        chunks, sequences: In all rows.
    """

    B: int
    T: int
    H: int
    HQ: int
    HK: int
    HV: int
    K: int
    V: int
    BK: int
    wide: int
    chunks: int
    sequences: int

    @classmethod
    def of(cls, q: Shape, k: Shape, v: Shape, decay: Shape, packed: tuple[int, int] | None) -> Sizes:
        """Count from shapes, and from the numbers of chunks and sequences if sequences are packed."""
        B, T, HQ, K = q
        chunks, sequences = (B * -(-T // CHUNK), B) if packed is None else packed
        V = v[3]
        return cls(B, T, decay[2], HQ, k[2], v[2], K, V, power_of_2(K), power_of_2(V), chunks, sequences)


def power_of_2(channels: int) -> int:
    """Round up to a size of tile that products accept."""
    return max(16, 1 << (channels - 1).bit_length())


def num_spans(n: Sizes, span: int, packed: int | None) -> int:
    """Count the spans into which long sequences are cut: ``packed`` of them, or of equal rows; zero if none is long.

    Keys of more than 128 channels make matrices too large to carry.
    """
    if n.BK > 128:
        return 0
    if packed is not None:
        return packed
    return n.B * -(-n.T // (span * CHUNK)) if span * CHUNK < n.T else 0


def work_spaces(
    n: Sizes, rule: Rule, dtype: torch.dtype, *, beta: bool, scalar: bool, spans: int, save: bool
) -> tuple[dict[str, Space], dict[str, Space]]:
    """List what the forward pass allocates besides its results, with ``save`` for the backward pass.

    The last to read the first piece of memory is the first half of the backward pass:

    - ``qd``, ``kd``, ``kt``: ``[chunks, H, 64, BK]`` decayed q, decayed k, and k decayed to the chunk's end.
    - ``scores``, ``inverse``: ``[chunks, H, 64, 64]``, the latter of the chunk's triangular system.

    The second one, whose ``total``, ``strength``, ``matrices`` and ``marks`` the forward pass needs in any case:

    - ``total``: ``[chunks, H, BK]`` float32, base-2 log-decay of whole chunks.
    - ``strength``: ``[chunks, H, 64]`` float32 beta.
    - ``norms``: ``[chunks, H, 2, 64]`` float32 factors of q (with the scale) and k.
    - ``h``: ``[chunks, H, V, BK]`` state before every chunk, transposed.
    - ``v_new``: ``[chunks, H, 64, V]`` values that the keys write.
    - ``matrices``: ``[spans, H, K, K]`` float32, what every span does to a state; the identity where nothing is
      carried past it, or anything without ``save``.
    - ``marks``: ``[chunks, H]`` int32, one where the decay of a chunk is out of range, two where that of a block of 16
      of its tokens is.

    None is what there is not: without erase ``kd`` and ``inverse``, without beta ``strength``, if no sequence is long
    ``matrices``, and with one decay per head ``marks``.
    """
    erases = rule.erase != "none"
    tall, square, float32 = (n.chunks, n.H, CHUNK, n.BK), (n.chunks, n.H, CHUNK, CHUNK), torch.float32
    early: dict[str, Space] = {
        "qd": (tall, dtype),
        "kd": (tall, dtype) if erases else None,
        "kt": (tall, dtype),
        "scores": (square, dtype),
        "inverse": (square, dtype) if erases else None,
    }
    late: dict[str, Space] = {
        "total": ((n.chunks, n.H, n.BK), float32),
        "strength": ((n.chunks, n.H, CHUNK), float32) if beta else None,
        "norms": ((n.chunks, n.H, 2, CHUNK), float32) if save else None,
        "h": ((n.chunks, n.H, n.V, n.BK), dtype) if save else None,
        "v_new": ((n.chunks, n.H, CHUNK, n.V), dtype) if save else None,
        "matrices": ((spans, n.H, n.K, n.K), float32) if spans else None,
        "marks": None if scalar else ((n.chunks, n.H), torch.int32),
    }
    return early, late


def gradient_spaces(n: Sizes, dtype: torch.dtype) -> dict[str, Space]:
    """List what the backward pass hands from half to half.

    - ``dh``: ``[chunks, H, V, BK]`` gradient of the state after every chunk, transposed.
    - ``d_residuals``: ``[chunks, H, 64, V]`` gradient of what was left to write, before the strength.
    """
    return {"dh": ((n.chunks, n.H, n.V, n.BK), dtype), "d_residuals": ((n.chunks, n.H, CHUNK, n.V), dtype)}


class Chunks(NamedTuple):
    """Where the chunks of packed sequences are; all int32 on the device.

    Attributes:
        sequences: ``[N, 6]``, the longest first, so that no program starts late on much work: number of the sequence,
            its first token, tokens, first chunk, one, and the number again.
        starts: ``[chunks]`` first token of every chunk.
        lengths: ``[chunks]`` tokens of every chunk.
        spans: ``[spans, 6]``, likewise: number of the span, its first token, tokens, first chunk, one where a
            sequence is a single span, three for the first of several, two for the last, else zero, and the number of
            the sequence. This and what follows is None if no sequence is cut.
        first_spans: ``[N + 1]`` first span of every sequence, and their number.
    """

    sequences: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    spans: Tensor | None = None
    first_spans: Tensor | None = None

    @classmethod
    def span(cls, chunks: int) -> int:
        """Return the chunks of the spans that a sequence of so many is cut into; it is not, if it has no more."""
        return SPAN

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Chunks:
        """Cut sequences of these lengths, laid end to end; zero is allowed."""
        sequences, starts, sizes = [], [], []
        end = 0
        for number, length in enumerate(lengths):
            sequences.append((number, end, length, len(starts), 1, number))
            for first in range(0, length, CHUNK):
                starts.append(end + first)
                sizes.append(min(CHUNK, length - first))
            end += length
        parts = (_longest_first(sequences), starts, sizes, *_spans(lengths, cls.span))
        return cls(*(torch.tensor(part, dtype=torch.int32).to(device, non_blocking=True) for part in parts))

    def filled(self, tiles: int, sequences: int, longest: int | None = None) -> Chunks:
        """Append dead chunks until there are ``tiles``; ``longest`` does not matter.

        A dead chunk has no token, and no sequence it is of. What is kept of it may be anything; what is added up over
        chunks counts it as zero. Spans stay as they are: there are some only where a sequence is long.
        """
        assert self.starts is not None
        assert self.lengths is not None
        return self._replace(starts=fill(self.starts, tiles, 0), lengths=fill(self.lengths, tiles, 0))

    @classmethod
    def of_rows(cls, rows: int, tokens: int, device: torch.device) -> Chunks:
        """Say only what the spans of equally long, unpacked rows are."""
        parts = _spans([tokens] * rows, cls.span)
        return cls(
            None,
            None,
            None,
            *(torch.tensor(part, dtype=torch.int32).to(device, non_blocking=True) for part in parts),
        )


class InferenceChunks(Chunks):
    """Chunks of calls without gradients, which cut sequences into more spans: :class:`Chunks` but for these.

    With room there are spans, or none, whatever the lengths: sequences that are not cut are one each, and the rest are
    dead. A dead span is of kind zero and has no token: it is read by nobody, and nothing follows from it.
    """

    __slots__ = ()

    @classmethod
    def span(cls, chunks: int) -> int:
        """Return the chunks of the spans that a sequence of so many is cut into; it is not, if it has no more."""
        return max(chunks, 1) if chunks <= min(SPAN, UNCUT) else min(SPAN, math.ceil(chunks / PARTS))

    def filled(self, tiles: int, sequences: int, longest: int | None = None) -> Chunks:
        """Append dead chunks until there are ``tiles``, and dead spans until there are as many as there can be.

        There are none where no sequence can be cut, all having no more than ``longest`` tokens.
        """
        made = super().filled(tiles, sequences)
        if min(tiles, tiles if longest is None else -(-longest // CHUNK)) <= min(SPAN, UNCUT):
            return made
        assert self.sequences is not None
        spans, firsts = self.spans, self.first_spans
        if spans is None:
            # every sequence is one
            firsts = torch.arange(sequences + 1, dtype=torch.int32).to(
                self.sequences.device, non_blocking=True
            )
            spans = self.sequences
        # a sequence of c chunks has no more than 1 + (c - 1) / the fewest chunks of a span
        number = sequences + tiles // self.span(min(SPAN, UNCUT) + 1)
        dead = [(span, 0, 0, 0, 0, 0) for span in range(len(spans), number)]
        if dead:
            rows = torch.tensor(dead, dtype=torch.int32).to(spans.device, non_blocking=True)
            spans = torch.cat([spans, rows])
        return made._replace(spans=spans, first_spans=firsts)


def _longest_first(scans: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted(scans, key=lambda scan: -scan[2])


def _spans(lengths: Sequence[int], span: Callable[[int], int]) -> tuple[list[Any], ...]:
    sizes = [CHUNK * span(math.ceil(length / CHUNK)) for length in lengths]
    if all(length <= size for length, size in zip(lengths, sizes, strict=True)):
        return ()
    spans, firsts = [], [0]
    end = chunks = 0
    for sequence, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        parts = range(0, max(length, 1), size)
        for first in parts:
            tokens = min(size, length - first)
            kind = 1 if len(parts) == 1 else 3 if first == 0 else 2 if first == parts[-1] else 0
            spans.append((len(spans), end, tokens, chunks, kind, sequence))
            chunks += math.ceil(tokens / CHUNK)
            end += tokens
        firsts.append(len(spans))
    return _longest_first(spans), firsts


def _sizes(x: Inputs, chunks: Chunks | None) -> Sizes:
    packed = None if chunks is None else (len(chunks.starts), len(chunks.sequences))  # pyright: ignore
    return Sizes.of(x.q.shape, x.k.shape, x.v.shape, x.decay.shape, packed)


def empty_outputs(
    x: Inputs, chunks: Chunks | None, *, save: bool, rule: Rule
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Allocate what ``chunk_forward`` returns: output, final state, and the tensors of ``Saved`` if asked for."""
    n = _sizes(x, chunks)
    saved = []
    if save:
        cut = None if chunks is None else 0 if chunks.spans is None else chunks.spans.shape[0]
        works = work_spaces(
            n,
            rule,
            x.q.dtype,
            beta=x.beta is not None,
            scalar=x.decay.ndim == 3,
            spans=num_spans(n, SPAN, cut),
            save=True,
        )
        saved = [x.q.new_empty(offsets(spaces.values())[1], dtype=torch.uint8) for spaces in works]
    out = x.v.new_empty(n.B, n.T, n.H, n.V)
    return out, x.v.new_empty(n.sequences, n.H, n.K, n.V, dtype=torch.float32), saved


def empty_gradients(x: Inputs, chunks: Chunks | None) -> Tensor:
    """Allocate the first that ``chunk_backward_scan`` returns."""
    spaces = gradient_spaces(_sizes(x, chunks), x.q.dtype)
    return x.q.new_empty(offsets(spaces.values())[1], dtype=torch.uint8)

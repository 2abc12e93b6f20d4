"""Launch the chunked delta-rule kernels.

One family, each case of which is compiled by itself: the decay is one number per key channel or one per head; what a
write erases is nothing, or has one strength per head or one per key channel; what it writes has one per head or one per
value channel. One strength that both erases and writes, with a decay per channel, is Kimi Delta Attention, and with one
decay per head the gated delta rule; channels everywhere are GDN-2; without erase it is gated linear attention.

Tensors are ``[B, T, heads, channels]``, contiguous; q, k and v may be parts of wider tokens. The output, the gates and
the state have H heads; q, k and v may have fewer, and head h then reads their head ``h // (H / heads)``. Workspaces
hold one tile of 64 tokens per chunk and head.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gendistill_kernels.configs import SEGMENT
from gendistill_kernels.delta_chunk_backward import (
    keys_kernel,
    keys_wild_kernel,
    reverse_scan_kernel,
    sum_chunks_kernel,
    sum_heads_kernel,
    values_kernel,
)
from gendistill_kernels.delta_chunk_forward import (
    carry_kernel,
    prepare_kernel,
    prepare_wild_kernel,
    scan_kernel,
)
from gendistill_kernels.delta_plan import (
    CHUNK,
    LEVELS,
    WHOLE,
    Plan,
    Rule,
    Sizes,
    gradient_spaces,
    num_segments,
    places,
    plan,
    work_spaces,
)
from gendistill_kernels.launch import Blocks, Fixed, Launcher, Part, kinds_of, on_its_device

_prepare = Launcher(prepare_kernel)
_prepare_wild = Launcher(prepare_wild_kernel)
_scan = Launcher(scan_kernel)
_carry = Launcher(carry_kernel)
_reverse_scan = Launcher(reverse_scan_kernel)
_values = Launcher(values_kernel)
_keys = Launcher(keys_kernel)
_keys_wild = Launcher(keys_wild_kernel)
_sum_heads = Launcher(sum_heads_kernel)
_sum_chunks = Launcher(sum_chunks_kernel)

# the interpreter multiplies bfloat16 wrongly
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WIDE = torch.float32 if _INTERPRETED else torch.bfloat16
_KDA = Rule()


class Chunks(NamedTuple):
    """Say where the chunks of packed sequences are; all int32 on the device.

    Attributes:
        sequences: ``[N, 6]``, the longest first, so that no program starts late on much work: number of the sequence,
            its first token, tokens, first chunk, one, and the number again.
        starts: ``[chunks]`` first token of every chunk.
        lengths: ``[chunks]`` tokens of every chunk.
        segments: ``[segments, 6]``, likewise: number of the segment, its first token, tokens, first chunk, one where a
            sequence is a single segment, three for the first of several, two for the last, else zero, and the number of
            the sequence. This and what follows is None if no sequence is long.
        first_segments: ``[N + 1]`` first segment of every sequence, and their number.
    """

    sequences: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    segments: Tensor | None = None
    first_segments: Tensor | None = None

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
        parts = (_longest_first(sequences), starts, sizes, *_segments(lengths))
        return cls(*(torch.tensor(part, dtype=torch.int32, device=device) for part in parts))

    @classmethod
    def of_rows(cls, rows: int, tokens: int, device: torch.device) -> Chunks:
        """Say only what the segments of equally long, unpacked rows are."""
        parts = _segments([tokens] * rows)
        return cls(
            None, None, None, *(torch.tensor(part, dtype=torch.int32, device=device) for part in parts)
        )


def _longest_first(walks: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted(walks, key=lambda walk: -walk[2])


def _segments(lengths: Sequence[int]) -> tuple[list[Any], ...]:
    size = SEGMENT * CHUNK
    if all(length <= size for length in lengths):
        return ()
    segments, firsts = [], [0]
    end = chunks = 0
    for sequence, length in enumerate(lengths):
        parts = range(0, max(length, 1), size)
        for first in parts:
            tokens = min(size, length - first)
            kind = 1 if len(parts) == 1 else 3 if first == 0 else 2 if first == parts[-1] else 0
            segments.append((len(segments), end, tokens, chunks, kind, sequence))
            chunks += math.ceil(tokens / CHUNK)
            end += tokens
        firsts.append(len(segments))
    return _longest_first(segments), firsts


@functools.lru_cache(64)
def _rows(rows: int, tokens: int, segment: int, device: torch.device) -> Chunks:
    return Chunks.of_rows(rows, tokens, device)


_UNPACKED = Chunks(None, None, None)


class Inputs(NamedTuple):
    """Hold the tensors that the forward and the backward pass read.

    Attributes:
        q, k: ``[B, T, HQ, K]``, ``[B, T, HK, K]``.
        v: ``[B, T, HV, V]``.
        decay: ``[B, T, H, K]`` or ``[B, T, H]``, as ``Rule.gate`` says.
        beta: ``[B, T, H]``, as ``Rule.sigmoid`` says; None if neither ``Rule.erase`` nor ``Rule.write`` is ``scalar``.
        A_log, dt_bias: ``[H]`` and ``[H * K]``, or ``[H]`` for one decay per head; float32, of the gate; None without.
        erase: ``[B, T, H, K]`` if ``Rule.erase`` is ``channel``, else None.
        write: ``[B, T, H, V]`` if ``Rule.write`` is ``channel``, else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor | None
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    erase: Tensor | None = None
    write: Tensor | None = None


class Saved(NamedTuple):
    """Hold what the backward pass needs besides inputs and output, as bytes; see ``delta_plan.work_spaces``.

    Attributes:
        early: What the first half of the backward pass is the last to read.
        late: The rest.
    """

    early: Tensor
    late: Tensor


class Gradients(NamedTuple):
    """Hold the gradients of ``Inputs`` and of the initial state, in their shapes and dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    erase: Tensor | None
    write: Tensor | None
    state: Tensor | None


def _plan(x: Inputs, rule: Rule, chunks: Chunks | None) -> tuple[Inputs, Plan]:
    """Look up the plan of a call, and copy what of q, k and v the kernels cannot step through."""
    packed = None
    if chunks is not None:
        assert chunks.starts is not None
        assert chunks.sequences is not None
        segments = 0 if chunks.segments is None else chunks.segments.shape[0]
        packed = chunks.starts.shape[0], chunks.sequences.shape[0], segments, chunks.starts.get_device()
    found = plan(
        tuple([None if part is None else part.shape for part in x]),
        (x.q.stride(), x.k.stride(), x.v.stride()),
        kinds_of(x),
        x.q.device,
        rule,
        packed,
        SEGMENT,
        _WIDE,
        not _INTERPRETED,
    )
    if None not in found.token_strides:
        return x, found
    even = [
        part if stride is not None else part.contiguous()
        for part, stride in zip((x.q, x.k, x.v), found.token_strides, strict=True)
    ]
    return _plan(x._replace(q=even[0], k=even[1], v=even[2]), rule, chunks)


@functools.cache
def _later(device: torch.device, dtype: torch.dtype) -> Blocks:
    """Make the 0/1 matrix that sums over a token and those after it."""
    # on the host first: a graph that is being captured would record this, not do it; a copy from the host it refuses
    return _tiles(torch.ones(CHUNK, CHUNK, dtype=dtype).triu().to(device))


@functools.cache
def _tables(device: torch.device, dtype: torch.dtype = torch.float16) -> Blocks:
    """Make 0/1 matrices, one under the other.

    Per level, what sums log-decays from the middle of a block to a token; the same from a token to the end of the
    chunk, from its start to the token, and from the start of the token's block of 2^WHOLE.
    """
    i, t = torch.arange(CHUNK)[:, None], torch.arange(CHUNK)[None, :]
    sums = []
    for level in range(LEVELS + 1):
        half = 1 << level
        # in the same half, on the inner side of the token: up to it in a right half, after it in a left one
        sums.append(((i ^ t) < half) & (((i & half) != 0) != (t > i)))
    sums += [t <= i, (t <= i) & ((i ^ t) < (1 << WHOLE))]
    return _tiles(torch.cat(sums).to(device=device, dtype=dtype))


def _tiles(whole: Tensor | Part, columns: int | None = None) -> Blocks:
    return Blocks(whole, (CHUNK, columns or whole.shape[-1]))


def _layout(at: Plan, x: Inputs, chunks: Chunks | None) -> Chunks:
    """Say where chunks and segments are."""
    if chunks is not None:
        return chunks if at.segments else Chunks(*chunks[:3])
    return _rows(at.n.B, at.n.T, SEGMENT, x.q.device) if at.segments else _UNPACKED


def _blocks(parts: Sequence[Part | None], columns: int | None = None) -> list[Blocks | None]:
    return [None if part is None else _tiles(part, columns) for part in parts]


def _sizes(x: Inputs, chunks: Chunks | None) -> Sizes:
    packed = None if chunks is None else (len(chunks.starts), len(chunks.sequences))  # pyright: ignore
    return Sizes.of(x.q.shape, x.k.shape, x.v.shape, x.decay.shape, packed)


def empty_outputs(
    x: Inputs, chunks: Chunks | None, *, save: bool, rule: Rule = _KDA
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Allocate what ``chunk_forward`` returns: output, final state, and the tensors of ``Saved`` if asked for."""
    n = _sizes(x, chunks)
    saved = []
    if save:
        cut = None if chunks is None else 0 if chunks.segments is None else chunks.segments.shape[0]
        works = work_spaces(
            n,
            rule,
            x.q.dtype,
            beta=x.beta is not None,
            scalar=x.decay.ndim == 3,
            segments=num_segments(n, SEGMENT, cut),
            save=True,
        )
        saved = [x.q.new_empty(places(spaces.values())[1], dtype=torch.uint8) for spaces in works]
    out = x.v.new_empty(n.B, n.T, n.H, n.V)
    return out, x.v.new_empty(n.sequences, n.H, n.K, n.V, dtype=torch.float32), saved


def empty_gradients(x: Inputs, chunks: Chunks | None) -> Tensor:
    """Allocate the first that ``chunk_backward_scan`` returns."""
    spaces = gradient_spaces(_sizes(x, chunks), x.q.dtype)
    return x.q.new_empty(places(spaces.values())[1], dtype=torch.uint8)


@on_its_device
def chunk_forward(
    x: Inputs, rule: Rule, *, state: Tensor | None = None, chunks: Chunks | None = None, save: bool = False
) -> tuple[Tensor, Tensor, Saved | None]:
    """Run the delta rule over whole sequences.

    Args:
        x: Inputs.
        rule: What they mean.
        state: ``[N, H, K, V]`` float32, or None for zeros.
        chunks: Packed sequences (then ``B == 1``).
        save: Keep what the backward pass needs.
    Raises:
        ValueError: There is no token, or the inputs do not fit the rule.
    Returns:
        ``[B, T, H, V]`` in ``v.dtype``, the final state ``[N, H, K, V]`` float32, and what was saved.
    """
    x, at = _plan(x, rule, chunks)
    n = at.n
    if not n.chunks:
        raise ValueError("chunk_forward needs at least one token")
    todo, where = at.forward(save=save, state=kinds_of([state])[0]), _layout(at, x, chunks)
    out, state_out = todo.results.allocate()
    saved = Saved(todo.early.allocate(), todo.late.allocate())
    early = todo.early.parts(saved.early)
    total, strength, norms, states, news, matrices, wild = todo.late.parts(saved.late)
    *_, kt, scores, inverse = early
    tiles = _blocks(early)
    sums = _tables(at.device, todo.operands)
    wide = tiles if todo.width == n.BK else [*_blocks(early[:3], todo.width), *tiles[3:]]
    _prepare[todo.prepare](
        x.q, x.k, x.decay, x.beta, x.A_log, x.dt_bias, sums, *wide, total, strength, norms, wild,
        where.starts, where.lengths, n.T, at.scale, at.lower_bound, x.erase,
    )  # fmt: skip
    if todo.prepare_wild is not None:
        _prepare_wild[todo.prepare_wild](
            x.q, x.k, x.decay, x.beta, x.A_log, x.dt_bias, sums,
            tiles[2] if todo.width_wild == n.BK else _tiles(kt, todo.width_wild), scores, inverse, wild,
            where.starts, where.lengths, n.T, at.scale, at.lower_bound, x.erase,
        )  # fmt: skip
    walks = where.sequences
    if todo.between is not None:
        ends, starts = todo.between.parts(todo.between.allocate())
        walks = where.segments
        _scan[todo.summary](
            *tiles, total, strength, x.v, None,
            out, ends, None, None, matrices, walks, n.T, x.write,
        )  # fmt: skip
        _carry[todo.carry](matrices, ends, state, starts, where.first_segments)
        state = starts
    _scan[todo.scan](
        *tiles, total, strength, x.v, state,
        out, state_out, states, news, None, walks, n.T, x.write,
    )  # fmt: skip
    return out, state_out, saved if save else None


@on_its_device
def chunk_backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Inputs,
    rule: Rule,
    out: Tensor,
    saved: Saved | list[Tensor],
    *,
    chunks: Chunks | None = None,
    want_state: bool = False,
) -> Gradients:
    """Differentiate ``chunk_forward``.

    Args:
        grad_out: ``[B, T, H, V]``, contiguous.
        grad_state: ``[N, H, K, V]`` float32 gradient of the final state, or None.
        x, rule, chunks: As in the forward pass.
        out, saved: What it returned. A list of the latter's two is emptied, and so memory freed on the way.
        want_state: Whether the initial state needs a gradient.
    """
    x, at = _plan(x, rule, chunks)
    early, late = saved
    scanned, grad_in = _backward_scan(grad_out, grad_state, x, at, early, late, chunks, want_state=want_state)
    del early
    if isinstance(saved, list):
        saved.clear()
    return _backward_local(grad_out, x, at, out, late, scanned, chunks)._replace(state=grad_in)


@on_its_device
def chunk_backward_scan(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Inputs,
    rule: Rule,
    saved: Saved,
    *,
    chunks: Chunks | None = None,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the first half of the backward pass, the last to need ``saved.early``.

    Returns:
        As bytes, gradients of the states after every chunk and of what the keys write, as
        ``delta_plan.gradient_spaces`` lists them; and the gradient of the initial state, if wanted.
    """
    x, at = _plan(x, rule, chunks)
    return _backward_scan(grad_out, grad_state, x, at, *saved, chunks, want_state=want_state)


def _backward_scan(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Inputs,
    at: Plan,
    early: Tensor,
    late: Tensor,
    chunks: Chunks | None,
    *,
    want_state: bool,
) -> tuple[Tensor, Tensor | None]:
    n, where = at.n, _layout(at, x, chunks)
    todo = at.reverse_scan(*kinds_of([grad_out, grad_state]), want_state=want_state)
    (grad_in,), scanned = todo.results.allocate(), at.gradients.allocate()
    grads, errors = at.gradients.parts(scanned)
    tiles = _blocks(at.saved[0].parts(early))
    total, strength, *_, matrices, _ = at.saved[1].parts(late)
    walks = where.sequences
    if todo.between is not None:
        heads, tails = todo.between.parts(todo.between.allocate())
        walks = where.segments
        _reverse_scan[todo.summary](
            *tiles, total, strength, grad_out, None,
            None, None, heads, walks, n.T,
        )  # fmt: skip
        _carry[todo.carry](matrices, heads, grad_state, tails, where.first_segments)
        grad_state = tails
    _reverse_scan[todo.scan](
        *tiles, total, strength, grad_out, grad_state,
        grads, errors, grad_in, walks, n.T,
    )  # fmt: skip
    return scanned, grad_in


@on_its_device
def chunk_backward_local(
    grad_out: Tensor,
    x: Inputs,
    rule: Rule,
    out: Tensor,
    late: Tensor,
    scanned: Tensor,
    *,
    chunks: Chunks | None = None,
) -> Gradients:
    """Run the second half of the backward pass, every chunk by itself; the initial state's gradient stays None.

    ``late`` is ``Saved.late``, and ``scanned`` what the first half returned.
    """
    x, at = _plan(x, rule, chunks)
    return _backward_local(grad_out, x, at, out, late, scanned, chunks)


def _backward_local(
    grad_out: Tensor,
    x: Inputs,
    at: Plan,
    out: Tensor,
    late: Tensor,
    scanned: Tensor,
    chunks: Chunks | None,
) -> Gradients:
    n, todo, where = at.n, at.local(*kinds_of([grad_out])), chunks or _UNPACKED
    total, strength, norms, states, news, _, wild = at.saved[1].parts(late)
    grads, errors = at.gradients.parts(scanned)
    dq, dk, dv, d_decay, d_write, d_beta, d_erase = todo.results.allocate()
    d_bias, d_rate, scores, lower, units, rows = todo.work.parts(todo.work.allocate())
    _values[todo.values](
        x.v, strength, out, grad_out, news, errors, dv, d_beta, scores, lower, units, rows,
        where.starts, where.lengths, n.T, x.write, d_write,
    )  # fmt: skip
    arguments = (
        x.q, x.k, x.decay, x.A_log, x.dt_bias, _tables(at.device), _later(at.device, at.wide_any), total,
        norms, rows, scores, lower, units, strength, errors, grad_out, states, grads, news, wild,
        dq, dk, d_decay, d_bias, d_rate, where.starts, where.lengths, n.T, at.scale, at.lower_bound,
        x.erase, d_erase,
    )  # fmt: skip
    _keys[todo.keys](*arguments)
    if todo.keys_wild is not None:
        _keys_wild[todo.keys_wild](*arguments)

    def summed(grad: Tensor, like: Tensor, launch: Fixed | None) -> Tensor:
        if launch is None:
            return grad
        total = torch.empty_like(like, memory_format=torch.contiguous_format)
        _sum_heads[launch](grad, total, total.numel())
        return total

    d_gate = None, None
    if todo.sum_gate is not None:
        # bias and rate, whose shapes and dtype these are
        d_gate = [torch.empty_like(part) for part in (x.dt_bias, x.A_log) if part is not None]
        _sum_chunks[todo.sum_gate](d_bias, d_rate, *d_gate, n.chunks)
    if at.erase == "scalar" and x.beta is not None:
        d_beta, d_erase = d_erase.sum(3).to(x.beta.dtype), None
    return Gradients(
        summed(dq, x.q, todo.sum_q),
        summed(dk, x.k, todo.sum_k),
        summed(dv, x.v, todo.sum_v),
        d_decay.sum(3).to(x.decay.dtype) if at.scalar else d_decay,
        d_beta,
        d_gate[1],
        d_gate[0],
        d_erase,
        d_write,
        None,
    )

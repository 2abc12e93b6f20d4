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
from typing import Any, Literal, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from gendistill_kernels.configs import SEGMENT, Config, is_many, lookup
from gendistill_kernels.delta_chunk_backward import (
    keys_kernel,
    keys_wild_kernel,
    reverse_scan_kernel,
    sum_heads_kernel,
    values_kernel,
)
from gendistill_kernels.delta_chunk_forward import (
    carry_kernel,
    prepare_kernel,
    prepare_wild_kernel,
    scan_kernel,
)
from gendistill_kernels.launch import Blocks, Launcher

_prepare = Launcher(prepare_kernel)
_prepare_wild = Launcher(prepare_wild_kernel)
_scan = Launcher(scan_kernel)
_carry = Launcher(carry_kernel)
_reverse_scan = Launcher(reverse_scan_kernel)
_values = Launcher(values_kernel)
_keys = Launcher(keys_kernel)
_keys_wild = Launcher(keys_wild_kernel)
_sum_heads = Launcher(sum_heads_kernel)

# operands with the range of float32; the interpreter multiplies bfloat16 wrongly
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_WIDE = torch.float32 if _INTERPRETED else torch.bfloat16
CHUNK = 64
LEVELS = 6
# A chunk whose decay, as a power of two, stays above this in every channel takes one product for all its pairs of
# tokens: its factors stay in the range of the operands, and what they are multiplied with keeps its bits. Other chunks
# go level by level down to blocks of 2^_WHOLE tokens, which then take one product if they are in range.
_RANGE, _RANGE_FLOAT16 = -200.0, -12.0
_WHOLE = 4


class Rule(NamedTuple):
    """Say what the inputs are.

    Attributes:
        gate: ``none``: ``decay`` holds log-decays; ``softplus``: raw values, log-decay
            ``-exp(A_log) softplus(raw + dt_bias)``; ``bounded``: ``lower_bound sigmoid(exp(A_log) (raw + dt_bias))``.
        lower_bound: Of the bounded gate.
        norm: L2-normalise q and k.
        sigmoid: ``beta``, ``Inputs.erase`` and ``Inputs.write`` hold logits.
        scale: Factor on q; ``K ** -0.5`` by default.
        erase: What a write first erases under its key: ``none``; ``scalar``: ``beta`` of it; ``channel``: of every key
            channel what ``Inputs.erase`` says.
        write: How much of v is written: ``scalar``: ``beta`` of it; ``channel``: of every value channel what
            ``Inputs.write`` says.

    Whether the decay is one per head shows in the shape of ``Inputs.decay``.
    """

    gate: Literal["none", "softplus", "bounded"] = "none"
    lower_bound: float = -5.0
    norm: bool = True
    sigmoid: bool = True
    scale: float | None = None
    erase: Literal["none", "scalar", "channel"] = "scalar"
    write: Literal["scalar", "channel"] = "scalar"


_ERASE, _WRITE = ("none", "scalar", "channel"), ("scalar", "channel")
_KDA = Rule()


class Chunks(NamedTuple):
    """Say where the chunks of packed sequences are; all int32 on the device.

    Attributes:
        cu_seqlens: ``[N + 1]`` ends of the sequences.
        offsets: ``[N]`` first chunk of every sequence.
        starts: ``[chunks]`` first token of every chunk.
        lengths: ``[chunks]`` tokens of every chunk.
        segment_ends: ``[segments + 1]`` ends of the segments. This and what follows is None if no sequence is long.
        segment_offsets: ``[segments]`` first chunk of every segment.
        first_segments: ``[N + 1]`` first segment of every sequence, and their number.
        kinds: ``[segments]`` one where a sequence is a single segment, two for the last of several, else zero.
    """

    cu_seqlens: Tensor | None
    offsets: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    segment_ends: Tensor | None = None
    segment_offsets: Tensor | None = None
    first_segments: Tensor | None = None
    kinds: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Chunks:
        """Cut sequences of these lengths, laid end to end; zero is allowed."""
        ends, offsets, starts, sizes = [0], [], [], []
        for length in lengths:
            offsets.append(len(starts))
            for first in range(0, length, CHUNK):
                starts.append(ends[-1] + first)
                sizes.append(min(CHUNK, length - first))
            ends.append(ends[-1] + length)
        parts = (ends, offsets, starts, sizes, *_segments(lengths))
        return cls(*(torch.tensor(part, dtype=torch.int32, device=device) for part in parts))

    @classmethod
    def of_rows(cls, rows: int, tokens: int, device: torch.device) -> Chunks:
        """Say only what the segments of equally long, unpacked rows are."""
        parts = _segments([tokens] * rows)
        return cls(
            None, None, None, None, *(torch.tensor(part, dtype=torch.int32, device=device) for part in parts)
        )


def _segments(lengths: Sequence[int]) -> tuple[list[int], ...]:
    size = SEGMENT * CHUNK
    if all(length <= size for length in lengths):
        return ()
    ends, offsets, firsts, kinds = [0], [], [0], []
    chunks = 0
    for length in lengths:
        parts = range(0, max(length, 1), size)
        for first in parts:
            tokens = min(size, length - first)
            offsets.append(chunks)
            chunks += math.ceil(tokens / CHUNK)
            ends.append(ends[-1] + tokens)
            kinds.append(1 if len(parts) == 1 else 2 if first == parts[-1] else 0)
        firsts.append(len(ends) - 1)
    return ends, offsets, firsts, kinds


@functools.lru_cache(64)
def _rows(rows: int, tokens: int, segment: int, device: torch.device) -> Chunks:
    return Chunks.of_rows(rows, tokens, device)


_UNPACKED = Chunks(None, None, None, None)


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
    """Hold what the backward pass needs besides inputs and output.

    Attributes:
        tall: ``[3, chunks, H, 64, BK]``: decayed q, decayed k, and k decayed to the chunk's end.
            Without erase ``[2, ...]``, no decayed k.
        square: ``[2, chunks, H, 64, 64]``: scores, and the inverse of the chunk's triangular system. Without erase only
            the scores.
        total: ``[chunks, H, BK]`` float32, base-2 log-decay of whole chunks.
        strength: ``[chunks, H, 64]`` float32 beta; empty if there is none.
        norms: ``[chunks, H, 2, 64]`` float32 factors of q (with the scale) and k.
        states: ``[chunks, H, V, BK]`` state before every chunk, transposed.
        news: ``[chunks, H, 64, V]`` values that the keys write.
        matrices: ``[segments, H, K, K]`` float32, what every segment does to a state; empty if no sequence is long.
        wild: ``[chunks, H]`` int32, one where the decay of a chunk is out of range, two where that of a block of 16
            of its tokens is; empty with one decay per head.
    """

    tall: Tensor
    square: Tensor
    total: Tensor
    strength: Tensor
    norms: Tensor
    states: Tensor
    news: Tensor
    matrices: Tensor
    wild: Tensor


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


class _Sizes(NamedTuple):
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
    def of(cls, x: Inputs, chunks: Chunks | None) -> _Sizes:
        B, T, HQ, K = x.q.shape
        V = x.v.shape[3]
        return cls(
            B=B,
            T=T,
            H=x.decay.shape[2],
            HQ=HQ,
            HK=x.k.shape[2],
            HV=x.v.shape[2],
            K=K,
            V=V,
            BK=_power_of_2(K),
            wide=_power_of_2(V),
            chunks=B * math.ceil(T / CHUNK) if chunks is None else len(chunks.starts),  # pyright: ignore
            sequences=B if chunks is None else len(chunks.offsets),  # pyright: ignore
        )


def _power_of_2(channels: int) -> int:
    """Round up to a size of tile that products accept."""
    return max(16, 1 << (channels - 1).bit_length())


def _token_stride(part: Tensor) -> int | None:
    """Return how many elements lie between tokens, if tokens of all rows do so and heads are next to each other."""
    B, T, heads, channels = part.shape
    by_row, by_token, by_head, by_channel = part.stride()
    stride = by_token if T > 1 else by_row if B > 1 else heads * channels
    even = B == 1 or T == 1 or by_row == T * by_token
    dense = (channels == 1 or by_channel == 1) and (heads == 1 or by_head == channels)
    return stride if even and dense and stride >= heads * channels else None


def _even(x: Inputs) -> Inputs:
    """Copy what of q, k and v the kernels cannot step through."""
    uneven = {
        name: part.contiguous()
        for name, part in (("q", x.q), ("k", x.k), ("v", x.v))
        if _token_stride(part) is None
    }
    return x._replace(**uneven) if uneven else x


def _blocks(channels: int, size: int) -> int:
    """Count blocks of this size."""
    return -(-channels // size)


def _config(kernel: str, x: Inputs, n: _Sizes, *, save: bool = False) -> Config:
    """Choose how a kernel is launched; a ValueError says that it cannot be."""
    many = is_many(n.sequences * n.H, n.wide)
    return lookup(x.q.device, kernel, n.BK, n.wide, x.q.dtype.itemsize, many, save)


@functools.cache
def _later(device: torch.device, dtype: torch.dtype) -> Blocks:
    """Make the 0/1 matrix that sums over a token and those after it."""
    return _tiles(torch.ones(CHUNK, CHUNK, dtype=dtype, device=device).triu())


@functools.cache
def _tables(device: torch.device, dtype: torch.dtype = torch.float16) -> Blocks:
    """Make 0/1 matrices, one under the other.

    Per level, what sums log-decays from the middle of a block to a token; the same from a token to the end of the
    chunk, from its start to the token, and from the start of the token's block of 2^_WHOLE.
    """
    i, t = torch.arange(CHUNK)[:, None], torch.arange(CHUNK)[None, :]
    sums = []
    for level in range(LEVELS + 1):
        half = 1 << level
        # in the same half, on the inner side of the token: up to it in a right half, after it in a left one
        sums.append(((i ^ t) < half) & (((i & half) != 0) != (t > i)))
    sums += [t <= i, (t <= i) & ((i ^ t) < (1 << _WHOLE))]
    return _tiles(torch.cat(sums).to(device=device, dtype=dtype))


def _tiles(part: Tensor, columns: int | None = None) -> Blocks:
    return Blocks(part, (CHUNK, columns or part.shape[-1]))


def _range(dtype: torch.dtype) -> float:
    return _RANGE_FLOAT16 if dtype == torch.float16 else _RANGE


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Choose the operands that hold factors as far out as the limit of a chunk's decay."""
    return dtype if dtype == torch.float16 and not _INTERPRETED else _WIDE


def _wide_exact(dtype: torch.dtype) -> Any:
    """As ``_wide``, and float32 for float32 inputs, which the forward pass multiplies as they are."""
    return _TRITON[torch.float32 if dtype == torch.float32 else _wide(dtype)]


def _never_wild(rule: Rule, dtype: torch.dtype) -> bool:
    """Say whether a gate keeps every chunk in range, whatever the inputs."""
    return rule.gate == "bounded" and CHUNK * rule.lower_bound * math.log2(math.e) > _range(dtype)


def _layout(x: Inputs, n: _Sizes, chunks: Chunks | None) -> Chunks:
    """Say where chunks and segments are. Keys of more than 128 channels make matrices too large to carry."""
    if chunks is None:
        if n.BK > 128 or n.T <= SEGMENT * CHUNK:
            return _UNPACKED
        return _rows(n.B, n.T, SEGMENT, x.q.device)
    return Chunks(*chunks[:4]) if n.BK > 128 else chunks


def _num_segments(x: Inputs, n: _Sizes, chunks: Chunks | None) -> int:
    if chunks is None:
        return n.B * math.ceil(n.T / (SEGMENT * CHUNK)) if n.BK <= 128 and n.T > SEGMENT * CHUNK else 0
    at = _layout(x, n, chunks)
    return 0 if at.kinds is None else at.kinds.shape[0]


def _erase_case(rule: Rule) -> str:
    """Say how the kernels erase: ``tied`` if what strengthens a write is what erases."""
    return "tied" if rule.erase == rule.write == "scalar" else rule.erase


def check_rule(x: Inputs, rule: Rule) -> None:
    """Refuse inputs that do not fit the rule; the kernels would read what is not there.

    Raises:
        ValueError: A tensor is missing, superfluous, or of another shape.
    """
    for name, kind, kinds in (("erase", rule.erase, _ERASE), ("write", rule.write, _WRITE)):
        if kind not in kinds:
            raise ValueError(
                f"Rule.{name} must be one of {', '.join(kinds)}, got {kind!r}; choose one of them"
            )
    rows, K, V = tuple(x.decay.shape[:3]), x.q.shape[3], x.v.shape[3]
    scalar = "scalar" in (rule.erase, rule.write)
    parts = (
        ("beta", x.beta, rows if scalar else None),
        ("erase", x.erase, (*rows, K) if rule.erase == "channel" else None),
        ("write", x.write, (*rows, V) if rule.write == "channel" else None),
    )
    for name, part, shape in parts:
        if (part is None) != (shape is None) or (part is not None and tuple(part.shape) != shape):
            got = None if part is None else list(part.shape)
            fix = "leave it out" if shape is None else "pass it"
            raise ValueError(
                f'with erase "{rule.erase}" and write "{rule.write}" {name} must be'
                f" {None if shape is None else list(shape)}, got {got}; {fix}, or change Rule.erase or Rule.write"
            )


def _work(x: Inputs, rule: Rule, n: _Sizes) -> list[Tensor]:
    """Allocate what the first kernel hands to the second: the first four of ``Saved``."""
    new = functools.partial(torch.empty, device=x.q.device)
    less = rule.erase == "none"
    return [
        new(3 - less, n.chunks, n.H, CHUNK, n.BK, dtype=x.q.dtype),
        new(2 - less, n.chunks, n.H, CHUNK, CHUNK, dtype=x.q.dtype),
        new(n.chunks, n.H, n.BK, dtype=torch.float32),
        new(*((0,) if x.beta is None else (n.chunks, n.H, CHUNK)), dtype=torch.float32),
    ]


def _empty_wild(x: Inputs, n: _Sizes) -> Tensor:
    shape = (0,) if x.decay.ndim == 3 else (n.chunks, n.H)
    return torch.empty(*shape, dtype=torch.int32, device=x.q.device)


def _none_if_empty(part: Tensor) -> Tensor | None:
    return part if part.numel() else None


def _five(tall: Sequence[Any], square: Sequence[Any]) -> list[Any]:
    """Name decayed q, decayed k, k decayed to the end, scores and inverse; None for what nothing that erases needs."""
    if len(tall) == 3:
        return [*tall, *square]
    return [tall[0], None, tall[1], square[0], None]


def empty_outputs(
    x: Inputs, chunks: Chunks | None, *, save: bool, rule: Rule = _KDA
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Allocate what ``chunk_forward`` returns: output, final state, and the tensors of ``Saved`` if asked for."""
    n = _Sizes.of(x, chunks)
    new = functools.partial(torch.empty, device=x.q.device)
    saved = []
    if save:
        saved = [
            *_work(x, rule, n),
            new(n.chunks, n.H, 2, CHUNK, dtype=torch.float32),
            new(n.chunks, n.H, n.V, n.BK, dtype=x.q.dtype),
            new(n.chunks, n.H, CHUNK, n.V, dtype=x.q.dtype),
            new(_num_segments(x, n, chunks), n.H, n.K, n.K, dtype=torch.float32),
            _empty_wild(x, n),
        ]
    out = new(n.B, n.T, n.H, n.V, dtype=x.v.dtype)
    return out, new(n.sequences, n.H, n.K, n.V, dtype=torch.float32), saved


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
    x = _even(x)
    n = _Sizes.of(x, chunks)
    if not n.chunks:
        raise ValueError("chunk_forward needs at least one token")
    check_rule(x, rule)
    scalar, erase = x.decay.ndim == 3, _erase_case(rule)
    prepare = _config("prepare", x, n)
    scan = _config("scan", x, n, save=save)
    if save:
        # of what the backward pass will launch, this takes the fewest sizes
        _config("keys", x, n)
    packed, at = chunks is not None, _layout(x, n, chunks)
    out, state_out, kept = empty_outputs(x, chunks, save=save, rule=rule)
    saved = Saved(*kept) if kept else None
    norms, states, news = (None, None, None) if saved is None else saved[4:7]
    tall, square, total, strength = saved[:4] if saved is not None else _work(x, rule, n)
    strength = _none_if_empty(strength)
    wild = _none_if_empty(_empty_wild(x, n) if saved is None else saved.wild)
    # float32 inputs are for comparisons: what they cost does not matter, what they lose does
    exact = x.q.dtype == torch.float32
    operands, precision = (torch.float32, "tf32x3") if exact else (torch.float16, "tf32")
    tiles = _five(*([*map(_tiles, part)] for part in (tall, square)))
    W = min(n.BK, prepare.block)
    stores = tiles
    if n.BK != W:
        stores = [*(None if part is None else _tiles(part.base, W) for part in tiles[:3]), *tiles[3:]]
    arguments = (
        x.q, x.k, x.decay, x.beta, x.A_log, x.dt_bias, _tables(x.q.device, operands),
        *stores, total, strength, norms, wild,
        at.starts, at.lengths, n.T, n.K**-0.5 if rule.scale is None else rule.scale, rule.lower_bound,
        x.erase,
    )  # fmt: skip
    settings = {
        "H": n.H, "HQ": n.HQ, "HK": n.HK, "SQ": _token_stride(x.q), "SK": _token_stride(x.k), "K": n.K,
        "BK": n.BK, "C": CHUNK, "GATE": rule.gate, "NORM": rule.norm,
        "SIGMOID": rule.sigmoid, "PACKED": packed, "DOT": tl.float32 if exact else tl.float16, "LEVELS": LEVELS,
        "W": W, "SAVE": save, "PRECISION": precision, "RANGE": _range(x.q.dtype),
        "WIDE": _wide_exact(x.q.dtype),
        "ERASE": erase,
    }  # fmt: skip
    _prepare[(n.chunks, n.H)](
        *arguments, **settings, SCALAR=scalar, num_warps=prepare.warps, num_stages=prepare.stages
    )
    if not scalar and not _never_wild(rule, x.q.dtype):
        again = _config("prepare_wild", x, n)
        W = min(n.BK, again.block)
        _prepare_wild[(n.chunks, n.H)](
            *arguments[:7], tiles[2] if n.BK == W else _tiles(tiles[2].base, W), square[0],
            None if rule.erase == "none" else square[1], wild, *arguments[-6:],
            **settings | {"W": W}, WHOLE=_WHOLE, num_warps=again.warps, num_stages=again.stages,
        )  # fmt: skip
    sequences, where = n.sequences, (at.cu_seqlens, at.offsets)
    final = state_out
    if at.kinds is not None:
        sequences, where = at.kinds.shape[0], (at.segment_ends, at.segment_offsets)
        matrices = saved.matrices if saved else torch.empty(
            sequences, n.H, n.K, n.K, dtype=torch.float32, device=x.q.device
        )  # fmt: skip
        ends, starts = (state_out.new_empty(sequences, n.H, n.K, n.V) for _ in range(2))
        summary = _config("summary", x, n, save=save)
        BV = min(n.wide, summary.block)
        _scan[(_blocks(n.V, BV) + _blocks(n.K, BV), sequences * n.H)](
            *tiles, total, strength, x.v, None,
            out, ends, None, None, matrices, *where, at.kinds, n.T, x.write,
            H=n.H, HV=n.HV, SV=_token_stride(x.v), K=n.K, V=n.V, BK=n.BK, BV=BV, C=CHUNK, PACKED=True,
            HAS_STATE=False, SAVE=save, STAGES=summary.stages, SUMMARY=True, PRECISION=precision, ERASE=erase,
            SIGMOID=rule.sigmoid, num_warps=summary.warps, num_stages=summary.stages,
        )  # fmt: skip
        _run_carry(x, n, matrices, ends, state, starts, at.first_segments, back=False)
        state, final = starts, ends
        packed = True
    BV = min(n.wide, scan.block)
    _scan[(_blocks(n.V, BV), sequences * n.H)](
        *tiles, total, strength, x.v, state,
        out, final, states, news, None, *where, None, n.T, x.write,
        H=n.H, HV=n.HV, SV=_token_stride(x.v), K=n.K, V=n.V, BK=n.BK, BV=BV, C=CHUNK, PACKED=packed,
        HAS_STATE=state is not None, SAVE=save, STAGES=scan.stages, SUMMARY=False, PRECISION=precision, ERASE=erase,
        SIGMOID=rule.sigmoid,
        num_warps=scan.warps, num_stages=scan.stages,
    )  # fmt: skip
    if at.first_segments is not None:
        torch.index_select(final, 0, at.first_segments[1:] - 1, out=state_out)
    return out, state_out, saved


def _run_carry(
    x: Inputs,
    n: _Sizes,
    matrices: Tensor,
    ends: Tensor,
    state: Tensor | None,
    starts: Tensor,
    first_segments: Tensor | None,
    *,
    back: bool,
) -> None:
    carry = _config("carry", x, n)
    BV = min(n.wide, carry.block)
    _carry[(_blocks(n.V, BV), n.sequences * n.H)](
        matrices, ends, state, starts, first_segments,
        H=n.H, K=n.K, V=n.V, BK=n.BK, BV=BV, HAS_STATE=state is not None, BACK=back,
        num_warps=carry.warps, num_stages=carry.stages,
    )  # fmt: skip


def chunk_backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Inputs,
    rule: Rule,
    out: Tensor,
    saved: Saved,
    *,
    chunks: Chunks | None = None,
    want_state: bool = False,
) -> Gradients:
    """Differentiate ``chunk_forward``.

    Args:
        grad_out: ``[B, T, H, V]``, contiguous.
        grad_state: ``[N, H, K, V]`` float32 gradient of the final state, or None.
        x, rule, chunks: As in the forward pass.
        out, saved: What it returned.
        want_state: Whether the initial state needs a gradient.
    """
    grads, errors, grad_in = chunk_backward_scan(
        grad_out, grad_state, x, rule, saved, chunks=chunks, want_state=want_state
    )
    return chunk_backward_local(grad_out, x, rule, out, saved, grads, errors, chunks=chunks)._replace(
        state=grad_in
    )


def chunk_backward_scan(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Inputs,
    rule: Rule,
    saved: Saved,
    *,
    chunks: Chunks | None = None,
    want_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the first half of the backward pass, the last to need ``saved.tall`` and ``saved.square``.

    Returns:
        Gradients of the states after every chunk, as ``Saved.states``; of what the keys write, as ``Saved.news``; and
        of the initial state, if wanted.
    """
    n = _Sizes.of(x, chunks)
    packed, at = chunks is not None, _layout(x, n, chunks)
    grads, errors = torch.empty_like(saved.states), torch.empty_like(saved.news)
    erase, strength = _erase_case(rule), _none_if_empty(saved.strength)
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.q.device)
    tiles = _five(*([*map(_tiles, part)] for part in (saved.tall, saved.square)))
    sequences, where = n.sequences, (at.cu_seqlens, at.offsets)
    if at.kinds is not None:
        sequences, where = at.kinds.shape[0], (at.segment_ends, at.segment_offsets)
        heads, packed, summary = new(sequences, n.H, n.K, n.V), True, _config("reverse_summary", x, n)
        BV = min(n.wide, summary.block)
        _reverse_scan[(_blocks(n.V, BV), sequences * n.H)](
            *tiles, saved.total, strength, grad_out, None,
            None, None, heads, *where, at.kinds, n.T,
            H=n.H, K=n.K, V=n.V, BK=n.BK, BV=BV, C=CHUNK, PACKED=True, HAS_GRAD=False,
            WANT_GRAD=True, STAGES=summary.stages, SUMMARY=True, ERASE=erase,
            num_warps=summary.warps, num_stages=summary.stages,
        )  # fmt: skip
        tails = torch.empty_like(heads)
        _run_carry(x, n, saved.matrices, heads, grad_state, tails, at.first_segments, back=True)
        grad_state = tails
    grad_in = new(sequences, n.H, n.K, n.V) if want_state else None
    scan = _config("reverse_scan", x, n, save=True)
    BV = min(n.wide, scan.block)
    _reverse_scan[(_blocks(n.V, BV), sequences * n.H)](
        *tiles, saved.total, strength, grad_out, grad_state,
        grads, errors, grad_in, *where, None, n.T,
        H=n.H, K=n.K, V=n.V, BK=n.BK, BV=BV, C=CHUNK, PACKED=packed, HAS_GRAD=grad_state is not None,
        WANT_GRAD=want_state, STAGES=scan.stages, SUMMARY=False, ERASE=erase,
        num_warps=scan.warps, num_stages=scan.stages,
    )  # fmt: skip
    if grad_in is not None and at.first_segments is not None:
        grad_in = grad_in.index_select(0, at.first_segments[:-1])
    return grads, errors, grad_in


def chunk_backward_local(
    grad_out: Tensor,
    x: Inputs,
    rule: Rule,
    out: Tensor,
    saved: Saved,
    grads: Tensor,
    errors: Tensor,
    *,
    chunks: Chunks | None = None,
) -> Gradients:
    """Run the second half of the backward pass, every chunk by itself; the initial state's gradient stays None.

    ``saved.tall`` and ``saved.square`` are not read.
    """
    x = _even(x)
    n = _Sizes.of(x, chunks)
    new = functools.partial(torch.empty, device=x.q.device)
    packed, at = chunks is not None, chunks or _UNPACKED
    scale = n.K**-0.5 if rule.scale is None else rule.scale
    values, keys = _config("values", x, n), _config("keys", x, n)

    def per_head(like: Tensor, heads: int) -> Tensor:
        shared = heads != n.H
        return new(n.B, n.T, n.H, like.shape[3], dtype=torch.float32 if shared else like.dtype)

    dq, dk, dv = per_head(x.q, n.HQ), per_head(x.k, n.HK), per_head(x.v, n.HV)
    scalar, erase, strength = x.decay.ndim == 3, _erase_case(rule), _none_if_empty(saved.strength)
    W = min(n.BK, keys.block)
    parts = n.BK // W
    # what is summed over key channels comes in parts
    d_decay = new(*x.decay.shape, parts, dtype=torch.float32) if scalar else torch.empty_like(x.decay)
    d_write, d_beta, d_erase = (
        None if part is None else torch.empty_like(part) for part in (x.write, x.beta, x.erase)
    )
    if erase == "scalar":
        d_erase = new(*x.decay.shape[:3], parts, dtype=torch.float32)
    has_gate = rule.gate != "none"
    d_bias = new(n.chunks, n.H, parts if scalar else n.K, dtype=torch.float32) if has_gate else None
    d_rate = new(n.chunks, n.H, parts, dtype=torch.float32) if has_gate else None
    d_scores = new(2, n.chunks, n.H, CHUNK, CHUNK, dtype=_wide(x.q.dtype))
    units = new(n.chunks, n.H, dtype=torch.float32)
    rows = new(n.chunks, n.H, 3, CHUNK, dtype=torch.float32)
    _values[(n.chunks, n.H)](
        x.v, strength, out, grad_out, saved.news, errors, dv, d_beta, *d_scores, units, rows,
        at.starts, at.lengths, n.T, x.write, d_write,
        H=n.H, HV=n.HV, SV=_token_stride(x.v), V=n.V, BV=n.wide, C=CHUNK, NORM=rule.norm, SIGMOID=rule.sigmoid,
        PACKED=packed,
        ERASE=erase, num_warps=values.warps, num_stages=values.stages,
    )  # fmt: skip
    arguments = (
        x.q, x.k, x.decay, x.A_log, x.dt_bias, _tables(x.q.device), _later(x.q.device, _WIDE), saved.total,
        saved.norms, rows, *d_scores, units, strength, errors, grad_out, saved.states, grads, saved.news,
        _none_if_empty(saved.wild), dq, dk, d_decay, d_bias, d_rate, at.starts, at.lengths, n.T, scale,
        rule.lower_bound, x.erase, d_erase,
    )  # fmt: skip
    settings = {
        # 64 values are padded to 128: with fewer, ptxas 12.8 loses operands (tests/ops/test_machine_code.py)
        "H": n.H, "HQ": n.HQ, "HK": n.HK, "SQ": _token_stride(x.q), "SK": _token_stride(x.k), "K": n.K, "V": n.V,
        "BK": n.BK, "BV": max(n.wide, 128), "C": CHUNK,
        "GATE": rule.gate, "NORM": rule.norm, "PACKED": packed, "DOT": tl.float16, "LEVELS": LEVELS,
        "WHOLE": _WHOLE, "W": W, "SIGMOID": rule.sigmoid, "ERASE": erase, "SCALAR": scalar,
        "RANGE": _range(x.q.dtype),
    }  # fmt: skip
    _keys[(parts * n.chunks, n.H)](*arguments, **settings, num_warps=keys.warps, num_stages=keys.stages)
    if not scalar and not _never_wild(rule, x.q.dtype):
        again = _config("keys_wild", x, n)
        _keys_wild[(parts * n.chunks, n.H)](
            *arguments, **settings | {"BV": n.wide}, num_warps=again.warps, num_stages=again.stages
        )

    if erase == "scalar" and d_erase is not None and x.beta is not None:
        d_beta, d_erase = d_erase.sum(3).to(x.beta.dtype), None

    def summed(grad: Tensor, like: Tensor, heads: int) -> Tensor:
        if heads == n.H:
            return grad
        total, config = new(like.shape, dtype=like.dtype), _config("sum_heads", x, n)
        _sum_heads[(_blocks(total.numel(), config.block),)](
            grad, total, total.numel(), GROUP=n.H // heads, WIDTH=like.shape[3], BLOCK=config.block,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return total

    return Gradients(
        summed(dq, x.q, n.HQ),
        summed(dk, x.k, n.HK),
        summed(dv, x.v, n.HV),
        d_decay.sum(3).to(x.decay.dtype) if scalar else d_decay,
        d_beta,
        None if d_rate is None else d_rate.sum((0, 2)),
        None if d_bias is None else d_bias.sum((0, 2)) if scalar else d_bias.sum(0).flatten(),
        d_erase,
        d_write,
        None,
    )

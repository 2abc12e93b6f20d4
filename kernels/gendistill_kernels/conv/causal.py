"""Depthwise causal convolution over a few tokens, forward and backward: one launch each.

With W taps per channel, and x continued before the first token of a sequence by its state::

    z_t = sum_j w_j x_(t - W + 1 + j) + b      y_t = act(z_t)      g_t = dy_t act'(z_t)
    dx_s = sum_j w_j g_(s + W - 1 - j)         dw_j = sum_t g_t x_(t - W + 1 + j)         db = sum_t g_t

The same sum of g, at the negative positions, is the gradient of the state. A sequence is cut into tiles of tokens, and
a tile into strips, one for every warp. A warp walks along its strip and keeps the last x, and on the way back the last
g, in registers: x is converted and the activation repeated once, not once per tap. A walk begins with the inputs before
its strip; the backward one goes on for ``W - 1`` tokens after it.

Legend: T tokens, C channels, W taps, BC channels of one program, N sequences.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.conv.layout import TILE, Gradients, Tiles
from gendistill_kernels.conv.rows import TABLE
from gendistill_kernels.runtime.launch import Launcher, on_its_device
from gendistill_kernels.runtime.lookup import Config

_UNPACKED = Tiles(None, None, None)


@triton.jit
def _locate(tile, tokens, cu_seqlens, owners, firsts, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Return the sequence of a tile, its row and first token there, the tile's offset in it, and its length."""
    if PACKED:
        sequence = tl.load(owners + tile).to(tl.int64)
        start = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - start
        return sequence, sequence * 0, start.to(tl.int64), tl.load(firsts + tile), length
    # a row without tokens has a tile too
    per_row = tl.maximum(tl.cdiv(tokens, TILE), 1)
    sequence = (tile // per_row).to(tl.int64)
    return sequence, sequence, sequence * 0, (tile % per_row) * TILE, tokens


@triton.jit
def _column(matrix, line, column, inside, WIDTH: tl.constexpr):
    """Load one column of a narrow matrix."""
    return tl.load(matrix + line * WIDTH + column, mask=inside, other=0.0)


@triton.jit
def _taps(weight, c, inside, W: tl.constexpr):
    """Load the taps as a tuple of W float32 rows ``[1, BC]``."""
    taps = ()
    for tap in tl.static_range(W):
        taps += (_column(weight, c, tap, inside, W).to(tl.float32)[None, :],)
    return taps


@triton.jit
def _history(
    at_x, token_stride, state, line, begins, first, length, wide, W: tl.constexpr, HAS_STATE: tl.constexpr
):
    """Load what comes before every strip as a tuple of ``W - 1`` tiles ``[strips, BC]``, the oldest token first."""
    window = ()
    for slot in tl.static_range(W - 1):
        place = begins + (slot - (W - 1))
        known = ((first + place >= 0) & (first + place < length))[:, None] & wide
        value = tl.load(at_x + place[:, None] * token_stride, mask=known, other=0.0)
        if HAS_STATE and first == 0:
            column = (place + (W - 1))[:, None]
            before = _column(state, line, column, (place < 0)[:, None] & wide, W - 1)
            value = tl.where((place < 0)[:, None], before.to(value.dtype), value)
        window += (value,)
    return window


@triton.jit
def _convolve(window, taps, W: tl.constexpr):
    """Add up the last W inputs, the oldest first, each times its tap."""
    total = window[0].to(tl.float32) * taps[0]
    for tap in tl.static_range(1, W):
        total += window[tap].to(tl.float32) * taps[tap]
    return total


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    x, weight, bias, state, out, state_out,
    cu_seqlens, owners, firsts, tokens, C, row_stride, token_stride,
    W: tl.constexpr, TILE: tl.constexpr, STRIPS: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    LENGTH: tl.constexpr = TILE // STRIPS
    blocks = tl.cdiv(C, BC)
    program = tl.program_id(0)
    c = (program % blocks) * BC + tl.arange(0, BC)
    inside = c < C
    wide = inside[None, :]
    sequence, row, start, first, length = _locate(
        program // blocks, tokens, cu_seqlens, owners, firsts, TILE, PACKED
    )
    begins = tl.arange(0, STRIPS) * LENGTH
    x += row * row_stride + (start + first) * token_stride
    at_x = x + c[None, :]
    at_out = out + (row * tokens + start + first) * C + c[None, :]
    line = sequence * C + c
    # all loads before the first store, which they must not overtake
    window = _history(at_x, token_stride, state, line[None, :], begins, first, length, wide, W, HAS_STATE)
    for ahead in tl.static_range(LENGTH):
        place = begins + ahead
        live = (first + place < length)[:, None] & wide
        window += (tl.load(at_x + place[:, None] * token_stride, mask=live, other=0.0),)
    taps = _taps(weight, c, inside, W)
    offset = tl.zeros([1, BC], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for ahead in tl.static_range(LENGTH):
        place = begins + ahead
        live = (first + place < length)[:, None] & wide
        z = _convolve(window[ahead : ahead + W], taps, W) + offset
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(at_out + place[:, None] * C, z.to(out.dtype.element_ty), mask=live)
    if first + TILE >= length:
        for slot in tl.static_range(W - 1):
            last = length - (W - 1) + slot
            at_last = x + (last - first).to(tl.int64) * token_stride + c
            new = tl.load(at_last, mask=inside & (last >= 0), other=0.0)
            if HAS_STATE:
                # a sequence shorter than its state keeps the end of it
                kept = _column(state, line, length + slot, inside & (last < 0), W - 1)
                new = tl.where(last < 0, kept.to(new.dtype), new)
            tl.store(state_out + line * (W - 1) + slot, new, mask=inside)


@triton.jit(do_not_specialize=["tokens", "tiles", "share"])
def backward_kernel(
    grad_out, grad_state_out, x, weight, bias, state, grad_x, grad_state_in, partial,
    cu_seqlens, owners, firsts, tokens, tiles, share, C, row_stride, token_stride, grad_row_stride, grad_token_stride,
    W: tl.constexpr, TILE: tl.constexpr, STRIPS: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_GRAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HISTORY: tl.constexpr = W - 1
    LENGTH: tl.constexpr = TILE // STRIPS
    blocks = tl.cdiv(C, BC)
    program = tl.program_id(0)
    worker = program // blocks
    c = (program % blocks) * BC + tl.arange(0, BC)
    inside = c < C
    wide = inside[None, :]
    begins = tl.arange(0, STRIPS) * LENGTH
    zero = tl.zeros([STRIPS, BC], tl.float32)
    taps = _taps(weight, c, inside, W)
    offset = tl.zeros([1, BC], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    d_taps = ()
    for _ in tl.static_range(W):
        d_taps += (zero,)
    d_bias = zero

    for tile in range(worker * share, tl.minimum(worker * share + share, tiles)):
        sequence, row, start, first, length = _locate(tile, tokens, cu_seqlens, owners, firsts, TILE, PACKED)
        line = (sequence * C + c)[None, :]
        at_x = x + row * row_stride + (start + first) * token_stride + c[None, :]
        at_grad = grad_out + row * grad_row_stride + (start + first) * grad_token_stride + c[None, :]
        at_dx = grad_x + (row * tokens + start + first) * C + c[None, :]
        xs = _history(at_x, token_stride, state, line, begins, first, length, wide, W, HAS_STATE)
        gs = ()
        for _ in tl.static_range(HISTORY):
            gs += (zero,)
        # the gradient of x lies W - 1 tokens behind
        steps = tl.minimum(length - first, LENGTH) + HISTORY
        for step in tl.range(0, steps, W, num_stages=STAGES):
            # all loads before the first store, which they must not overtake
            new_gs = ()
            for ahead in tl.static_range(W):
                place = begins + step + ahead
                live = (first + place < length)[:, None] & wide
                xs += (tl.load(at_x + place[:, None] * token_stride, mask=live, other=0.0),)
                new_gs += (tl.load(at_grad + place[:, None] * grad_token_stride, mask=live, other=0.0),)
            for ahead in tl.static_range(W):
                g = new_gs[ahead].to(tl.float32)
                if SILU:
                    z = _convolve(xs[ahead : ahead + W], taps, W) + offset
                    s = tl.sigmoid(z)
                    g *= s + z * s * (1.0 - s)
                gs += (g,)
                # what lies after the strip counts for the weights in the next one
                own = tl.where(step + ahead < LENGTH, g, 0.0)
                d_bias += own
                dx = g * taps[0]
                sums = (d_taps[0] + own * xs[ahead].to(tl.float32),)
                for tap in tl.static_range(1, W):
                    dx += gs[HISTORY - tap] * taps[tap]
                    sums += (d_taps[tap] + own * xs[ahead + tap].to(tl.float32),)
                d_taps = sums
                gs = gs[1:]
                back = begins + step + ahead - HISTORY
                token = first + back
                if HAS_GRAD and first + TILE > length - HISTORY:
                    column = token + HISTORY - length
                    saved = ((column >= 0) & (column < HISTORY))[:, None] & wide
                    dx += _column(grad_state_out, line, column[:, None], saved, HISTORY).to(tl.float32)
                mine = ((back >= begins) & (back < begins + LENGTH) & (token < length))[:, None] & wide
                tl.store(at_dx + back[:, None] * C, dx.to(grad_x.dtype.element_ty), mask=mine)
                if HAS_STATE and ahead < HISTORY and first + step == 0:
                    cells = grad_state_in + line * HISTORY + (token + HISTORY)[:, None]
                    tl.store(cells, dx.to(grad_state_in.dtype.element_ty), mask=(token < 0)[:, None] & wide)
            xs = xs[W:]

    WIDTH: tl.constexpr = W + 1 if HAS_BIAS else W
    partial += worker.to(tl.int64) * C * WIDTH
    for tap in tl.static_range(W):
        tl.store(partial + c * W + tap, tl.sum(d_taps[tap], 0), mask=inside)
    if HAS_BIAS:
        tl.store(partial + C * W + c, tl.sum(d_bias, 0), mask=inside)


_forward = Launcher(forward_kernel)
_backward = Launcher(backward_kernel)


def _sizes(
    x: Tensor, weight: Tensor, activation: str, state: Tensor | None, tiles: Tiles | None, config: Config
) -> tuple[int, int, int, int]:
    """Count sequences, tiles, channels of a block and blocks; refuse what the kernels would misread."""
    B, T, C = x.shape
    if activation not in ("identity", "silu"):
        raise ValueError(f'activation must be identity or silu, got "{activation}"')
    N = B if tiles is None else len(tiles.cu_seqlens) - 1  # pyright: ignore
    if tiles is not None and B != 1:
        raise ValueError(f"packed input must be one row, got {B}")
    if weight.shape[0] != C:
        raise ValueError(f"weight must have {C} channels, as x has, got {weight.shape[0]}")
    if state is not None and tuple(state.shape) != (N, C, weight.shape[1] - 1):
        raise ValueError(f"state must have shape {(N, C, weight.shape[1] - 1)}, got {tuple(state.shape)}")
    number = B * max(1, math.ceil(T / TILE)) if tiles is None else len(tiles.owners)  # pyright: ignore
    block = min(config.block, 1 << (C - 1).bit_length())
    return N, number, block, math.ceil(C / block)


def _check_rows(name: str, part: Tensor) -> None:
    if part.shape[2] > 1 and part.stride(2) != 1:
        raise ValueError(f"the channels of {name} must lie side by side, got stride {part.stride(2)}")


@on_its_device
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["identity", "silu"] = "identity",
    state: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps; float32 inside.

    Args:
        x: ``[B, T, C]``; rows and tokens may be strided, channels not.
        weight: ``[C, W]``; the last tap multiplies the current token.
        bias: ``[C]`` or None.
        activation: What is applied to the sum.
        state: ``[N, C, W - 1]``, inputs before the first token, or None for zeros; read in the precision of x.
        tiles: Packed sequences (then ``B == 1`` and T is the sum of their lengths).
    Raises:
        ValueError: Shapes disagree, the channels of x are strided, or the activation is unknown.
    Returns:
        ``[B, T, C]`` and the new state ``[N, C, W - 1]``, both contiguous and in ``x.dtype``.
    """
    _check_rows("x", x)
    config = TABLE.lookup(x.device, "conv_forward", x.dtype.itemsize)
    N, number, block, blocks = _sizes(x, weight, activation, state, tiles, config)
    (B, T, C), W = x.shape, weight.shape[1]
    out = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    state_out = torch.empty(N, C, W - 1, dtype=x.dtype, device=x.device)
    _forward[(number * blocks,)](
        x, weight.contiguous(), bias, None if state is None else state.contiguous(), out, state_out,
        *(tiles or _UNPACKED), T, C, x.stride(0), x.stride(1),
        W=W, TILE=TILE, STRIPS=config.warps, BC=block, SILU=activation == "silu", PACKED=tiles is not None,
        HAS_BIAS=bias is not None, HAS_STATE=state is not None,
        num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return out, state_out


@on_its_device
def conv_backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["identity", "silu"] = "identity",
    state: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Gradients:
    """Differentiate ``conv_forward`` from its inputs alone.

    Args:
        grad_out: ``[B, T, C]``; rows and tokens may be strided, channels not.
        grad_state: ``[N, C, W - 1]`` gradient of the new state, or None.
        x, weight, bias, activation, state, tiles: As in the forward pass.
    Raises:
        ValueError: As in the forward pass, for ``grad_out`` too.
    """
    _check_rows("x", x)
    _check_rows("grad_out", grad_out)
    config = TABLE.lookup(x.device, "conv_backward", x.dtype.itemsize)
    _, number, block, blocks = _sizes(x, weight, activation, state, tiles, config)
    (B, T, C), W = x.shape, weight.shape[1]
    # each program sums over a share of the tiles that only the shape decides: the same input gives the same bits
    share = math.ceil(number / max(1, min(number, config.programs // blocks)))
    workers = math.ceil(number / max(1, share))
    grad_x = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    grad_in = None if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
    # taps of all channels, then biases
    width = C * W if bias is None else C * (W + 1)
    partial = torch.empty(workers, width, dtype=torch.float32, device=x.device)
    _backward[(workers * blocks,)](
        grad_out, None if grad_state is None else grad_state.contiguous(), x, weight.contiguous(), bias,
        None if state is None else state.contiguous(), grad_x, grad_in, partial,
        *(tiles or _UNPACKED), T, number, share, C, x.stride(0), x.stride(1), grad_out.stride(0), grad_out.stride(1),
        W=W, TILE=TILE, STRIPS=config.warps, BC=block, SILU=activation == "silu", PACKED=tiles is not None,
        HAS_BIAS=bias is not None, HAS_STATE=state is not None, HAS_GRAD=grad_state is not None,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    sums = partial.sum(0)
    return Gradients(
        grad_x,
        sums[: C * W].view(C, W).to(weight.dtype),
        None if bias is None else sums[C * W :].to(bias.dtype),
        grad_in,
    )

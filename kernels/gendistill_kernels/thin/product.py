"""Products of few rows with matrices whose rows lie in memory one after the other.

With x a row, s the residual stream after an addition, and r = 1 / sqrt(mean(s^2) + eps)::

    y = W x + b                      (or + a row of another tensor)
    h = silu(r G (g s)) r U (g s)    G and U the upper and the lower half of a matrix, g the gain of a norm

Such a product takes as long as its weights take to arrive, so that all depends on how many are under way at a time.

A thread multiplies its eight weights of every tile with those of x that it holds, in float32, and threads meet once,
at the end. Many tiles are asked for before anything is computed, and before the kernel before has ended: they must not
be what it writes. The norm's factor is applied last, so that nothing waits for a sum of squares.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gendistill_kernels.runtime.hardware import can_overlap
from gendistill_kernels.runtime.launch import Launcher, on_its_device
from gendistill_kernels.thin.rows import TABLE

# weights of a row are read eight at a time, so that their number is a multiple of this
STEP = 8
# threads of a warp, which lie along a row of the matrix, and weights of each in a tile
_LANES = tl.constexpr(32)
_STEP = tl.constexpr(STEP)
# bytes of x of a thread that are asked for ahead of their turn
_AHEAD = 128


@triton.jit
def _columns(tile: tl.constexpr, first: tl.constexpr, number: tl.constexpr):
    lane = tl.arange(0, _LANES)[:, None, None, None, None]
    return tile * (_LANES * _STEP) + lane * _STEP + first + tl.arange(0, number)[None, None, None, None, :]


@triton.jit
def _load_tile(at, tile: tl.constexpr, K: tl.constexpr, EVICTION: tl.constexpr):
    """Load of every row at ``at`` what a thread has of a tile.

    The axes are lanes, warps, rows of the matrix that a warp has, rows of x, and what a lane reads at once. In this
    order the compiler gives them to threads: what a warp computes stays in it, and no layout is converted.
    """
    column = _columns(tile, 0, _STEP)
    if at.dtype.element_ty.primitive_bitwidth == 32:
        # A thread reads 16 bytes at once, which would give it every other four numbers. Each half of what it needs
        # lies as it should.
        HALF: tl.constexpr = _STEP // 2
        first, second = _columns(tile, 0, HALF), _columns(tile, HALF, HALF)
        first = tl.load(at + first, mask=first < K, other=0.0, eviction_policy=EVICTION)
        second = tl.load(at + second, mask=second < K, other=0.0, eviction_policy=EVICTION)
        both = tl.permute(tl.join(first, second), [0, 1, 2, 3, 5, 4])
        return tl.reshape(both, both.shape[0], both.shape[1], both.shape[2], both.shape[3], _STEP)
    if (tile + 1) * (_LANES * _STEP) <= K:
        return tl.load(at + column, eviction_policy=EVICTION)
    return tl.load(at + column, mask=column < K, other=0.0, eviction_policy=EVICTION)


@triton.jit
def _store_tile(at, value, wanted, tile: tl.constexpr, K: tl.constexpr):
    """Store what a thread has of a tile, in the dtype of ``at``, where it lies."""
    HALF: tl.constexpr = _STEP // 2
    if at.dtype.element_ty.primitive_bitwidth == 32:
        both = tl.reshape(value, value.shape[0], value.shape[1], value.shape[2], value.shape[3], 2, HALF)
        one, other = tl.split(tl.permute(both, [0, 1, 2, 3, 5, 4]))
        first, second = _columns(tile, 0, HALF), _columns(tile, HALF, HALF)
        tl.store(at + first, one, mask=wanted & (first < K))
        tl.store(at + second, other, mask=wanted & (second < K))
    else:
        column = _columns(tile, 0, _STEP)
        tl.store(at + column, value, mask=wanted & (column < K))


@triton.jit(do_not_specialize=["rows", "N"])
def product_kernel(
    x, mixed, gain, matrix, bias, added, total, out, rows, N, x_row, eps,
    K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    AHEAD_X: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (K + _LANES * _STEP - 1) // (_LANES * _STEP)
    program = tl.program_id(0)
    warp = tl.arange(0, WARPS)[None, :, None, None, None]
    n = program * (R * WARPS) + tl.arange(0, R)[None, None, :, None, None] * WARPS + warp
    # what lies beyond the matrix repeats its last row, so that no load needs a mask
    at = matrix + tl.minimum(n, N - 1).to(tl.int64) * K
    # what is normalised is what a gated layer reads
    at_up = at + N.to(tl.int64) * K if gain is not None else at
    weights, ups, gains = (), (), ()
    for tile in tl.static_range(TILES):
        if tile < AHEAD:
            weights += (_load_tile(at, tile, K, "evict_first"),)
            if gain is not None:
                ups += (_load_tile(at_up, tile, K, "evict_first"),)
        if gain is not None and tile < AHEAD_X:
            gains += (_load_tile(gain + warp * 0, tile, K, ""),)
    if OVERLAP:
        # Programs of the kernel after may be placed, and ask for their weights, while this one waits for all that the
        # kernel before writes. Nothing above depends on it, and nothing is written before.
        gdc_launch_dependents()
        gdc_wait()
    m = tl.arange(0, M)[None, None, None, :, None]
    # every warp reads x for itself
    row = tl.minimum(m, rows - 1).to(tl.int64) * x_row + warp * 0
    row_mixed = tl.minimum(m, rows - 1) * K + warp * 0
    xs, others = (), ()
    for tile in tl.static_range(TILES):
        if tile < AHEAD_X:
            xs += (_load_tile(x + row, tile, K, ""),)
            if mixed is not None:
                others += (_load_tile(mixed + row_mixed, tile, K, ""),)
    acc = tl.zeros([_LANES, WARPS, R, M], tl.float32)
    acc_up = tl.zeros([_LANES, WARPS, R, M], tl.float32)
    squares = tl.zeros([_LANES, WARPS, 1, M], tl.float32)
    for tile in tl.static_range(TILES):
        if tile + AHEAD < TILES:
            weights += (_load_tile(at, tile + AHEAD, K, "evict_first"),)
            if gain is not None:
                ups += (_load_tile(at_up, tile + AHEAD, K, "evict_first"),)
        if tile + AHEAD_X < TILES:
            if gain is not None:
                gains += (_load_tile(gain + warp * 0, tile + AHEAD_X, K, ""),)
            xs += (_load_tile(x + row, tile + AHEAD_X, K, ""),)
            if mixed is not None:
                others += (_load_tile(mixed + row_mixed, tile + AHEAD_X, K, ""),)
        value = xs[tile].to(tl.float32)
        if mixed is not None:
            stored = (value + others[tile].to(tl.float32)).to(total.dtype.element_ty)
            _store_tile(total + row_mixed, stored, (program == 0) & (warp == 0), tile, K)
            # what the next layer reads is what is normalised here
            value = stored.to(tl.float32)
        if gain is not None:
            squares += tl.sum(value * value, 4)
            value *= gains[tile].to(tl.float32)
        acc += tl.sum(weights[tile].to(tl.float32) * value, 4)
        if gain is not None:
            acc_up += tl.sum(ups[tile].to(tl.float32) * value, 4)
    product = tl.sum(acc, 0)
    if gain is not None:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        product *= factor
        product *= tl.sigmoid(product) * tl.sum(acc_up, 0) * factor
    m = tl.arange(0, M)[None, None, :]
    n = program * (R * WARPS) + tl.arange(0, R)[None, :, None] * WARPS + tl.arange(0, WARPS)[:, None, None]
    if bias is not None:
        product += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    inside = (m < rows) & (n < N)
    cells = m * N + n
    if added is not None:
        product += tl.load(added + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cells, product.to(out.dtype.element_ty), mask=inside)


_product = Launcher(product_kernel)


@on_its_device
def product(
    x: Tensor, matrix: Tensor, bias: Tensor | None = None, *, added: Tensor | None = None, out: Tensor
) -> Tensor:
    """Multiply a few rows with a matrix; sums are float32.

    Neither ``matrix`` nor ``bias`` may be what a kernel launched shortly before writes; see the op.

    Args:
        x: ``[M, K]`` with 1 to 4 rows, each contiguous; K a multiple of ``STEP``.
        matrix: ``[N, K]``, contiguous, in the dtype of x.
        bias: ``[N]``.
        added: ``[M, N]``, contiguous.
        out: ``[M, N]``, contiguous, to write to; may be ``added``.
    Returns: ``out``.
    """
    _launch(x, None, None, matrix, bias, added, None, out, eps=0.0)
    return out


@on_its_device
def gated_of_sum(
    stream: Tensor,
    mixed: Tensor | None,
    gain: Tensor,
    matrix: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Add, normalise, and run the gated half of an MLP, in one launch; all sums are float32.

    Args:
        stream: ``[M, K]`` with 1 to 4 rows, contiguous; K a multiple of ``STEP``.
        mixed: ``[M, K]`` in any dtype, contiguous, or None.
        gain: ``[K]`` of an RMSNorm.
        matrix: ``[2 N, K]``: gates, then values; contiguous. As ``gain`` not written shortly before; see the op.
        eps: Of the norm.
    Returns: The sum in the dtype of ``stream``, ``stream`` itself without ``mixed``; and ``[M, N]`` in that of the
        matrix.
    """
    out = torch.empty(len(stream), len(matrix) // 2, dtype=matrix.dtype, device=matrix.device)
    total = stream if mixed is None else torch.empty_like(stream)
    _launch(stream, mixed, gain, matrix, None, None, total, out, eps=eps)
    return total, out


def _launch(
    x: Tensor,
    mixed: Tensor | None,
    gain: Tensor | None,
    matrix: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    *,
    eps: float,
) -> None:
    (M, K), N = x.shape, out.shape[1]
    config = TABLE.lookup(x.device, "thin_product", matrix.dtype.itemsize)
    # both halves of a gated layer count
    halves = 1 if gain is None else 2
    block = max(config.block // halves, config.warps)
    while block > config.warps and -(-N // block) < config.programs:
        block //= 2
    each = block // config.warps
    number = triton.next_power_of_2(M)
    overlap = can_overlap(x.device)
    size = STEP * number * (x.dtype.itemsize + (0 if mixed is None else mixed.dtype.itemsize))
    _product[(-(-N // block),)](
        x, mixed, gain, matrix, bias, added, total, out, M, N, x.stride(0), eps,
        K=K, M=number, R=each, WARPS=config.warps, AHEAD=max(1, config.stages // (each * halves)),
        AHEAD_X=max(1, _AHEAD // size), OVERLAP=overlap, launch_pdl=overlap,
        num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip

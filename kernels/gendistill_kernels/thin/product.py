"""Products of few rows with matrices whose rows lie in memory one after the other.

With x a row, s the residual stream after an addition, and r = 1 / sqrt(mean(s^2) + eps)::

    y = W x + b                      (or + a row of another tensor)
    h = silu(r G (g s)) r U (g s)    G and U the upper and the lower half of a matrix, g the gain of a norm

Such a product takes as long as its weights take to arrive, so that all depends on how many are under way at a time.

Up to four rows, a thread multiplies its eight weights of every tile with those of x that it holds, in float32, and
threads meet once, at the end. Many tiles are asked for before anything is computed, and before the kernel before has
ended: they must not be what it writes. The norm's factor is applied last, so that nothing waits for a sum of squares.

More rows, padded to sixteen or 32, are multiplied by matrix units; a pipelined loop has some tiles of the weights
under way.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gendistill_kernels.block.norm import rms_norm_forward
from gendistill_kernels.runtime.hardware import can_overlap
from gendistill_kernels.runtime.launch import Launcher, on_its_device
from gendistill_kernels.runtime.lookup import Config
from gendistill_kernels.thin.rows import TABLE

# rows up to which threads multiply by themselves
MOST_VECTORS = 4
# weights of a row are read eight at a time, so that their number is a multiple of this
STEP = 8
# threads of a warp, which lie along a row of the matrix, and weights of each in a tile
_LANES = tl.constexpr(32)
_STEP = tl.constexpr(STEP)
# bytes of x of a thread that are asked for ahead of their turn
_AHEAD = 128
# columns of a tile for matrix units
_COLUMNS = 128


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


@triton.jit
def _finish(value, up, bias, added, out, rows, N, m, n):
    """Store products, or what a gated layer makes of those with both halves."""
    inside = (m < rows) & (n < N)
    if up is not None:
        value *= tl.sigmoid(value) * up
    if bias is not None:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    cells = m * N + n
    if added is not None:
        value += tl.load(added + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cells, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "N"])
def vectors_kernel(
    x, mixed, gain, matrix, bias, added, total, out, rows, N, x_row, eps,
    K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    AHEAD_X: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (K + _LANES * _STEP - 1) // (_LANES * _STEP)
    program = tl.program_id(0)
    warp = tl.arange(0, WARPS)[None, :, None, None, None]
    n = program * (R * WARPS) + tl.arange(0, R)[None, None, :, None, None] * WARPS + warp
    # what lies beyond the matrix repeats its last row, so that no load needs a mask
    at = matrix + tl.minimum(n, N - 1).to(tl.int64) * K
    at_up = at + N.to(tl.int64) * K if GATED else at
    weights, ups, gains = (), (), ()
    for tile in tl.static_range(TILES):
        if tile < AHEAD:
            weights += (_load_tile(at, tile, K, "evict_first"),)
            if GATED:
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
            if GATED:
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
        if GATED:
            acc_up += tl.sum(ups[tile].to(tl.float32) * value, 4)
    product = tl.sum(acc, 0)
    up = None
    if gain is not None:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        product *= factor
    if GATED:
        up = tl.sum(acc_up, 0)
        if gain is not None:
            up *= factor
    m = tl.arange(0, M)[None, None, :]
    n = program * (R * WARPS) + tl.arange(0, R)[None, :, None] * WARPS + tl.arange(0, WARPS)[:, None, None]
    _finish(product, up, bias, added, out, rows, N, m, n)


@triton.jit
def _fetch(at, size):
    """Have bytes brought into the GPU's cache, by one thread."""
    tl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0; "
        "@first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "N"])
def tiles_kernel(
    x, matrix, bias, added, out, rows, N, x_row,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    start = matrix + first.to(tl.int64) * K
    half = N.to(tl.int64) * K
    if OVERLAP:
        # into the cache only: what the kernel before writes there is seen
        size = tl.minimum(BN, N - first) * K * (matrix.dtype.element_ty.primitive_bitwidth // 8)
        _fetch(start, size)
        if GATED:
            _fetch(start + half, size)
        gdc_launch_dependents()
        gdc_wait()
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    at_x = x + m[:, None].to(tl.int64) * x_row + k[None, :]
    # what lies beyond the matrix repeats its last row
    at = start + tl.minimum(n, N - 1 - first)[:, None] * K + k[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    acc_up = tl.zeros([BM, BN], tl.float32)
    for column in range(0, K, BK):
        there = k < K - column
        tile_x = tl.load(at_x + column, mask=(m < rows)[:, None] & there[None, :], other=0.0)
        tile = tl.load(at + column, mask=there[None, :], other=0.0, eviction_policy="evict_first")
        acc = tl.dot(tile_x, tl.trans(tile), acc, input_precision="ieee")
        if GATED:
            tile = tl.load(at + half + column, mask=there[None, :], other=0.0, eviction_policy="evict_first")
            acc_up = tl.dot(tile_x, tl.trans(tile), acc_up, input_precision="ieee")
    up = acc_up if GATED else None
    _finish(acc, up, bias, added, out, rows, N, m[:, None], first + n[None, :])


_vectors = Launcher(vectors_kernel)
_tiles = Launcher(tiles_kernel)


def _share(N: int, config: Config, least: int) -> int:
    """Return how many rows of a matrix a program takes: fewer if there would be few programs, at least ``least``."""
    block = max(config.block, least)
    while block > least and -(-N // block) < config.programs:
        block //= 2
    return block


@on_its_device
def product(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None = None,
    *,
    added: Tensor | None = None,
    out: Tensor,
    gated: bool = False,
) -> Tensor:
    """Multiply a few rows with a matrix; sums are float32.

    Neither ``matrix`` nor ``bias`` may be what a kernel launched shortly before writes; see the op.

    Args:
        x: ``[M, K]`` with 1 to 32 rows, each contiguous; K a multiple of ``STEP``.
        matrix: ``[N, K]``, or ``[2 N, K]`` if gated, contiguous, in the dtype of x.
        bias: ``[N]``.
        added: ``[M, N]``, contiguous.
        out: ``[M, N]``, contiguous, to write to; may be ``added``.
        gated: Return ``silu(gate) up`` of the products with the upper and the lower half.
    Returns: ``out``.
    """
    M, K = x.shape
    N = out.shape[1]
    if M <= MOST_VECTORS:
        _launch_vectors(x, None, None, matrix, bias, added, None, out, gated=gated, eps=0.0)
        return out
    config = TABLE.lookup(x.device, "thin_tiles", x.dtype.itemsize)
    block = _share(N, config, 8)
    overlap = can_overlap(x.device) and matrix.data_ptr() % 16 == 0
    _tiles[(-(-N // block),)](
        x, matrix, bias, added, out, M, N, x.stride(0),
        K=K, BM=max(16, triton.next_power_of_2(M)), BN=block, BK=_COLUMNS, GATED=gated, OVERLAP=overlap,
        launch_pdl=overlap, num_warps=min(config.warps, max(1, block // 8)), num_stages=config.stages,
    )  # fmt: skip
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
    """Add, normalise, and run the gated half of an MLP; all sums are float32.

    One launch does it for up to ``MOST_VECTORS`` rows. For more, each program would normalise as many numbers as it
    multiplies, so that another launch does it for all.

    Args:
        stream: ``[M, K]`` with 1 to 32 rows, contiguous; K a multiple of ``STEP``.
        mixed: ``[M, K]`` in any dtype, contiguous, or None.
        gain: ``[K]`` of an RMSNorm.
        matrix: ``[2 N, K]``: gates, then values; contiguous. As ``gain`` not written shortly before; see the op.
        eps: Of the norm.
    Returns: The sum in the dtype of ``stream``, ``stream`` itself without ``mixed``; and ``[M, N]`` in that of the
        matrix.
    """
    out = torch.empty(len(stream), len(matrix) // 2, dtype=matrix.dtype, device=matrix.device)
    if len(stream) > MOST_VECTORS:
        total, x, _ = rms_norm_forward(stream, mixed, gain, eps=eps, dtype=matrix.dtype)
        return total, product(x, matrix, out=out, gated=True)
    total = stream if mixed is None else torch.empty_like(stream)
    _launch_vectors(stream, mixed, gain, matrix, None, None, total, out, gated=True, eps=eps)
    return total, out


def _launch_vectors(
    x: Tensor,
    mixed: Tensor | None,
    gain: Tensor | None,
    matrix: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    *,
    gated: bool,
    eps: float,
) -> None:
    (M, K), N = x.shape, out.shape[1]
    config = TABLE.lookup(x.device, "thin_vectors", matrix.dtype.itemsize)
    # both halves of a gated layer count
    block = _share(N, config._replace(block=config.block // 2) if gated else config, config.warps)
    each = block // config.warps
    number = triton.next_power_of_2(M)
    overlap = can_overlap(x.device)
    size = STEP * number * (x.dtype.itemsize + (0 if mixed is None else mixed.dtype.itemsize))
    _vectors[(-(-N // block),)](
        x, mixed, gain, matrix, bias, added, total, out, M, N, x.stride(0), eps,
        K=K, M=number, R=each, WARPS=config.warps, AHEAD=max(1, config.stages // (each * (1 + gated))),
        AHEAD_X=max(1, _AHEAD // size), GATED=gated, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip

"""Causal attention within packed documents, forwards, with as many query heads to a key head as there are.

A program takes a tile of queries of one head and walks over the keys of its document, keeping the running maximum m and
sum l of every query's scores::

    s = scale q k^T      m' = max(m, max s)
    l' = l e^(m - m') + sum e^(s - m')      o' = o e^(m - m') + e^(s - m') v

What is kept for a backward pass is the logarithm of the sum, ``m + log l``.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.block.rows import TABLE, power_of_2
from gendistill_kernels.runtime.launch import Launcher, on_its_device

# queries of a tile: the table of tiles, which is made where a batch is, depends on it
QUERIES = 64
_BITS = 1.4426950408889634
_NATS = tl.constexpr(0.6931471805599453)


def tiles_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Cut documents that lie end to end into tiles of queries.

    Returns: ``[tiles, 3]`` int32: first query, first and one past the last token of its document; those with the most
        keys come first.
    """
    tiles, start = [], 0
    for length in lengths:
        tiles += [(start + first, start, start + length) for first in range(0, length, QUERIES)]
        start += length
    tiles.sort(key=lambda tile: tile[1] - tile[0])
    return torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3).to(device, non_blocking=True)


@triton.jit
def _step(
    q, k, v, first, last, acc, most, total, row, window, scale,
    column, D: tl.constexpr, BN: tl.constexpr, KV: tl.constexpr, V_ROW: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys."""
    key = first + tl.arange(0, BN)
    there = (key < last)[:, None] & (column < D)[None, :] if MASKED else (column < D)[None, :]
    keys = tl.load(k + key.to(tl.int64)[:, None] * (KV * D) + column[None, :], mask=there, other=0.0)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    if MASKED:
        seen = key[None, :] <= row[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > row[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(most, tl.max(scores, 1))
    # a query may have seen no key so far
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(most - shift)
    values = tl.load(v + key.to(tl.int64)[:, None] * V_ROW + column[None, :], mask=there, other=0.0)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, top, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["window"])
def forward_kernel(
    q, k, v, tiles, out, lse, tokens, window, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V_ROW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    # one number for both: only the first of a grid may be large
    head, tile = tl.program_id(0) % H, tl.program_id(0) // H
    first = tl.load(tiles + tile * 3)
    start = tl.load(tiles + tile * 3 + 1)
    end = tl.load(tiles + tile * 3 + 2)
    row, column = first + tl.arange(0, BM), tl.arange(0, BD)
    inside = (row < end)[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * (H * D) + head * D + column[None, :]
    query = tl.load(q + place, mask=inside, other=0.0)
    shared = head // (H // KV)
    k += shared * D
    v += shared * D
    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    last = tl.minimum(end, first + BM)
    if WINDOW:
        whole = tl.maximum(start, first - window + 1)
    else:
        # keys that every query of the tile sees
        whole = start + (first + 1 - start) // BN * BN
        for key in range(start, whole, BN):
            acc, most, total = _step(
                query, k, v, key, last, acc, most, total, row, window, scale,
                column, D, BN, KV, V_ROW, False, False,
            )  # fmt: skip
    for key in range(whole, last, BN):
        acc, most, total = _step(
            query, k, v, key, last, acc, most, total, row, window, scale,
            column, D, BN, KV, V_ROW, True, WINDOW,
        )  # fmt: skip
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head.to(tl.int64) * tokens + row, (most + tl.log2(total)) * _NATS, mask=row < end)


_forward = Launcher(forward_kernel)


@on_its_device
def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, *, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attend; float32 scores and sums.

    Args:
        q: ``[N, H, D]`` contiguous, D up to 256.
        k: ``[N, KV, D]`` contiguous.
        v: ``[N, KV, D]``, heads and channels contiguous, rows any distance apart.
        tiles: What :func:`tiles_of` returns for the documents.
        window: Positions a query sees, its own included; None for all earlier ones.
    Returns: ``[N, H, D]``, and float32 ``[H, N]``, the logarithm of every query's sum.
    """
    tokens, H, D = q.shape
    config = TABLE.lookup(q.device, "block_attention", q.dtype.itemsize)
    wide = max(16, power_of_2(D))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, tokens, dtype=torch.float32, device=q.device)
    _forward[(H * len(tiles),)](
        q, k, v, tiles, out, lse, tokens, 0 if window is None else window, D**-0.5 * _BITS,
        H=H, KV=k.shape[1], D=D, BD=wide, V_ROW=v.stride(0), BM=QUERIES, BN=config.block,
        WINDOW=window is not None, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, lse

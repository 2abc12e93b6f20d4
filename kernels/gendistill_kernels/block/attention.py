"""Causal attention within packed documents, forwards and backwards; query heads may share a key and a value.

A program takes a tile of queries of one head and walks over the keys of its document, keeping the running maximum m and
sum l of every query's scores::

    s = scale q k^T      m' = max(m, max s)
    l' = l e^(m - m') + sum e^(s - m')      o' = o e^(m - m') + e^(s - m') v

What is kept for a backward pass is the logarithm of the sum, L = m + log l. With p = e^(s - L) and D the sum of do o
over a query's channels::

    dv = sum p do      ds = p (do v^T - D)      dq = scale sum ds k      dk = scale sum ds q

One launch walks over the keys of every tile of queries, and finds D and dq; another walks over the queries of every
tile of keys, all heads that share them, and finds dk and dv. No sum depends on the order in which programs run.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.block.layout import TILE, Tiles
from gendistill_kernels.block.rows import TABLE, power_of_2
from gendistill_kernels.runtime.launch import Launcher, on_its_device
from gendistill_kernels.runtime.lookup import Config

_BITS = tl.constexpr(1.4426950408889634)
_NATS = tl.constexpr(0.6931471805599453)


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


@triton.jit
def _weigh(
    q, keys, row, key, lse, window, scale, MASKED: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Return the weights of a tile of queries on a tile of keys."""
    weights = tl.exp2(tl.dot(q, tl.trans(keys), input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        seen = key[None, :] <= row[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > row[:, None] - window)
        weights = tl.where(seen, weights, 0.0)
    return weights


@triton.jit
def _step_queries(
    q, grad, k, v, first, last, acc, sums, row, lse, window, scale,
    column, D: tl.constexpr, BN: tl.constexpr, KV: tl.constexpr, V_ROW: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys for the gradient of queries."""
    key = first + tl.arange(0, BN)
    there = (key < last)[:, None] & (column < D)[None, :] if MASKED else (column < D)[None, :]
    keys = tl.load(k + key.to(tl.int64)[:, None] * (KV * D) + column[None, :], mask=there, other=0.0)
    values = tl.load(v + key.to(tl.int64)[:, None] * V_ROW + column[None, :], mask=there, other=0.0)
    weights = _weigh(q, keys, row, key, lse, window, scale, MASKED, WINDOW)
    d_weights = tl.dot(grad, tl.trans(values), input_precision="ieee")
    d_scores = weights * (d_weights - sums[:, None])
    return tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["window"])
def queries_kernel(
    grad_out, q, k, v, out, lse, tiles, grad_q, sums, tokens, window, scale, plain_scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V_ROW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0) % H, tl.program_id(0) // H
    first = tl.load(tiles + tile * 3)
    start = tl.load(tiles + tile * 3 + 1)
    end = tl.load(tiles + tile * 3 + 2)
    row, column = first + tl.arange(0, BM), tl.arange(0, BD)
    inside = (row < end)[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * (H * D) + head * D + column[None, :]
    query = tl.load(q + place, mask=inside, other=0.0)
    grad = tl.load(grad_out + place, mask=inside, other=0.0)
    found = tl.load(out + place, mask=inside, other=0.0)
    total = tl.sum(grad.to(tl.float32) * found.to(tl.float32), 1)
    mine = head.to(tl.int64) * tokens + row
    tl.store(sums + mine, total, mask=row < end)
    # what lies outside a document has weights of zero
    level = tl.load(lse + mine, mask=row < end, other=float("inf")) * _BITS
    shared = head // (H // KV)
    k += shared * D
    v += shared * D
    acc = tl.zeros([BM, BD], tl.float32)
    last = tl.minimum(end, first + BM)
    if WINDOW:
        whole = tl.maximum(start, first - window + 1)
    else:
        whole = start + (first + 1 - start) // BN * BN
        for key in range(start, whole, BN):
            acc = _step_queries(
                query, grad, k, v, key, last, acc, total, row, level, window, scale,
                column, D, BN, KV, V_ROW, False, False,
            )  # fmt: skip
    for key in range(whole, last, BN):
        acc = _step_queries(
            query, grad, k, v, key, last, acc, total, row, level, window, scale,
            column, D, BN, KV, V_ROW, True, WINDOW,
        )  # fmt: skip
    tl.store(grad_q + place, (acc * plain_scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def _step_keys(
    keys, values, q, grad_out, lse, sums, first, end, d_keys, d_values, key, window, scale,
    column, D: tl.constexpr, BM: tl.constexpr, H: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Take one tile of queries for the gradients of keys and values."""
    row = first + tl.arange(0, BM)
    place = row.to(tl.int64)[:, None] * (H * D) + column[None, :]
    inside = (row < end)[:, None] & (column < D)[None, :]
    query = tl.load(q + place, mask=inside, other=0.0)
    grad = tl.load(grad_out + place, mask=inside, other=0.0)
    level = tl.load(lse + row, mask=row < end, other=float("inf")) * _BITS
    total = tl.load(sums + row, mask=row < end, other=0.0)
    weights = _weigh(query, keys, row, key, level, window, scale, MASKED, WINDOW)
    d_values = tl.dot(tl.trans(weights.to(grad.dtype)), grad, d_values, input_precision="ieee")
    d_weights = tl.dot(grad, tl.trans(values), input_precision="ieee")
    d_scores = (weights * (d_weights - total[:, None])).to(query.dtype)
    d_keys = tl.dot(tl.trans(d_scores), query, d_keys, input_precision="ieee")
    return d_keys, d_values


@triton.jit(do_not_specialize=["window"])
def keys_kernel(
    grad_out, q, k, v, lse, sums, tiles, grad_k, grad_v, tokens, window, scale, plain_scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V_ROW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    shared, tile = tl.program_id(0) % KV, tl.program_id(0) // KV
    first = tl.load(tiles + tile * 3)
    end = tl.load(tiles + tile * 3 + 2)
    key, column = first + tl.arange(0, BN), tl.arange(0, BD)
    inside = (key < end)[:, None] & (column < D)[None, :]
    place = key.to(tl.int64)[:, None] * (KV * D) + shared * D + column[None, :]
    keys = tl.load(k + place, mask=inside, other=0.0)
    values = tl.load(
        v + key.to(tl.int64)[:, None] * V_ROW + shared * D + column[None, :], mask=inside, other=0.0
    )
    d_keys = tl.zeros([BN, BD], tl.float32)
    d_values = tl.zeros([BN, BD], tl.float32)
    # queries behind the tile see all of its keys, as long as a window reaches them
    behind = first + BN
    last = tl.minimum(end, behind + window - 1) if WINDOW else end
    for member in range(0, H // KV):
        head = shared * (H // KV) + member
        at = head.to(tl.int64) * tokens
        for query in range(first, tl.minimum(behind, end), BM):
            d_keys, d_values = _step_keys(
                keys, values, q + head * D, grad_out + head * D, lse + at, sums + at, query, end,
                d_keys, d_values, key, window, scale, column, D, BM, H, True, WINDOW,
            )  # fmt: skip
        for query in range(behind, last, BM):
            d_keys, d_values = _step_keys(
                keys, values, q + head * D, grad_out + head * D, lse + at, sums + at, query, end,
                d_keys, d_values, key, window, scale, column, D, BM, H, WINDOW, WINDOW,
            )  # fmt: skip
    tl.store(grad_k + place, (d_keys * plain_scale).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + place, d_values.to(grad_v.dtype.element_ty), mask=inside)


# channels of a tile that four warps hold in registers
_WIDE = 128


def _warps(config: Config, channels: int) -> int:
    return config.warps if channels <= _WIDE else 2 * config.warps


_forward = Launcher(forward_kernel)
_queries = Launcher(queries_kernel)
_keys = Launcher(keys_kernel)


@on_its_device
def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, *, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attend; float32 scores and sums.

    Args:
        q: ``[N, H, D]`` contiguous, D up to 256.
        k: ``[N, KV, D]`` contiguous.
        v: ``[N, KV, D]``, heads and channels contiguous, rows any distance apart.
        tiles: Of the documents.
        window: Positions a query sees, its own included; None for all earlier ones.
    Returns: ``[N, H, D]``, and float32 ``[H, N]``, the logarithm of every query's sum.
    """
    tokens, H, D = q.shape
    config = TABLE.lookup(q.device, "block_attention", q.dtype.itemsize)
    wide = max(16, power_of_2(D))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, tokens, dtype=torch.float32, device=q.device)
    _forward[(H * len(tiles.places),)](
        q, k, v, tiles.places, out, lse, tokens, 0 if window is None else window, D**-0.5 * _BITS.value,
        H=H, KV=k.shape[1], D=D, BD=wide, V_ROW=v.stride(0), BM=TILE, BN=config.block,
        WINDOW=window is not None, num_warps=_warps(config, wide), num_stages=config.stages,
    )  # fmt: skip
    return out, lse


@on_its_device
def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tiles,
    *,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate ``attend_forward``.

    Args:
        grad_out: ``[N, H, D]``.
        q, k, v, tiles, window: As in the forward pass.
        out, lse: What it returned.
    Returns: The gradients of q ``[N, H, D]``, k and v ``[N, KV, D]``, contiguous.
    """
    tokens, H, D = q.shape
    KV, wide = k.shape[1], max(16, power_of_2(D))
    grad_out = grad_out.contiguous()
    grad_q, grad_k, sums = torch.empty_like(q), torch.empty_like(k), torch.empty_like(lse)
    grad_v = torch.empty(k.shape, dtype=v.dtype, device=v.device)
    constants = {"H": H, "KV": KV, "D": D, "BD": wide, "V_ROW": v.stride(0), "WINDOW": window is not None}
    reach, scale = 0 if window is None else window, D**-0.5
    config = TABLE.lookup(q.device, "block_attention_queries", q.dtype.itemsize)
    _queries[(H * len(tiles.places),)](
        grad_out, q, k, v, out, lse, tiles.places, grad_q, sums, tokens, reach, scale * _BITS.value, scale,
        **constants, BM=TILE, BN=config.block, num_warps=_warps(config, wide), num_stages=config.stages,
    )  # fmt: skip
    config = TABLE.lookup(q.device, "block_attention_keys", q.dtype.itemsize)
    _keys[(KV * len(tiles.places),)](
        grad_out, q, k, v, lse, sums, tiles.places, grad_k, grad_v, tokens, reach, scale * _BITS.value, scale,
        **constants, BM=min(config.block, TILE), BN=TILE, num_warps=_warps(config, wide), num_stages=config.stages,
    )  # fmt: skip
    return grad_q, grad_k, grad_v

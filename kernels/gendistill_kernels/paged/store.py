"""From projected queries, keys and values of new tokens to queries that attention reads, and cells of pages.

One launch for all heads: those of q and k are normalised and turned, those of v are copied; k and v go to the cells of
their tokens.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.block.rope import turn
from gendistill_kernels.block.rows import power_of_2
from gendistill_kernels.paged.rows import TABLE
from gendistill_kernels.runtime.launch import Launcher, on_its_device


@triton.jit(do_not_specialize=["rows"])
def store_kernel(
    qkv, q_weight, k_weight, cos, sin, cells, q, keys, values, rows, eps,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    head = tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, BH)
    there = first + row < rows
    inside = there[:, None] & (column < HALF)[None, :]
    D: tl.constexpr = 2 * HALF
    source = qkv + (first + row[:, None]) * ((H + 2 * KV) * D) + head * D + column[None, :]
    if head < H:
        target = q + (first + row[:, None]) * (H * D) + head * D + column[None, :]
    else:
        cell = tl.load(cells + first + row, mask=there, other=0)
        side = keys if head < H + KV else values
        target = side + cell[:, None] * (KV * D) + (head - H) % KV * D + column[None, :]
    if head < H + KV:
        weight = q_weight if head < H else k_weight
        place = (first + row[:, None]) * D + column[None, :]
        one, two = turn(source, weight, cos + place, sin + place, eps, column, inside, HALF, NORM)
    else:
        one = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, one.to(q.dtype.element_ty), mask=inside)
    tl.store(target + HALF, two.to(q.dtype.element_ty), mask=inside)


_store = Launcher(store_kernel)


@on_its_device
def turn_and_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    *,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Normalise and turn the heads of queries and keys, and write keys and values into pages; float32 inside.

    Args:
        qkv: ``[N, (H + 2 KV) * D]`` contiguous: queries, keys, values; N at least 1.
        q_weight, k_weight: ``[D]`` of the head norms, or None for no norm.
        cos, sin: ``[N, D]``, each angle twice; contiguous.
        keys, values: ``[pages, PAGE, KV, D]`` contiguous, of the dtype of qkv; written.
        cells: ``[N]`` int64, places among all tokens of all pages.
        num_heads: H.
        eps: Of the norms.
    Returns: ``[N, H, D]`` queries.
    """
    rows, (KV, D) = qkv.shape[0], keys.shape[2:]
    config = TABLE.lookup(qkv.device, "paged_store", qkv.dtype.itemsize)
    wide = power_of_2(D // 2)
    number = min(max(1, config.block // (2 * wide)), power_of_2(rows))
    q = torch.empty(rows, num_heads, D, dtype=qkv.dtype, device=qkv.device)
    norm = q_weight is not None
    _store[(-(-rows // number), num_heads + 2 * KV)](
        qkv, q_weight if norm else cos, k_weight if norm else cos, cos, sin, cells, q, keys, values, rows, eps,
        H=num_heads, KV=KV, HALF=D // 2, BH=wide, ROWS=number, NORM=norm, num_warps=config.warps,
    )  # fmt: skip
    return q

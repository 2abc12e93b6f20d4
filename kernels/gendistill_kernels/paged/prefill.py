"""Causal attention of any number of new tokens of each sequence to all of its keys, which lie in pages.

A program takes a tile of queries of one sequence: some tokens, and of each of them the heads that share a key, as far
as they are a power of two. It walks over the pages of the sequence, keeping the running maximum m and sum l of every
query's scores, as :mod:`gendistill_kernels.block.attention` does.

Which sequence a tile is of, the device finds out. Sequence s owns the tiles from ``starts[s] // tokens + s`` on, for
tiles of so many tokens: never fewer than it needs, and all together so many that the number of new tokens and the
number of sequences say it. Those that it does not need end at once.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.block.rows import power_of_2
from gendistill_kernels.paged.rows import TABLE
from gendistill_kernels.paged.step import BITS, step
from gendistill_kernels.runtime.launch import Launcher, on_its_device

# queries that a warp takes, by bytes of an element: as many as a product's rows, or as registers hold
_QUERIES = {2: 16, 4: 4}
# channels of a tile above which a program has shared memory for fewer tiles of keys
_WIDE = 128
# what no tile's number reaches
_NEVER = tl.constexpr(2**30)


@triton.jit(do_not_specialize=["sequences", "width", "tiles", "window"])
def prefill_kernel(
    q, keys, values, table, lengths, starts, out, sequences, width, tiles, window, scale,
    H: tl.constexpr, KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BM // G
    # one number for both: only the first of a grid may be large; of a sequence the tiles with the most keys come first
    group, tile = tl.program_id(0) % (H // G), tiles - 1 - tl.program_id(0) // (H // G)
    index = tl.arange(0, BS)
    there = index < sequences
    owned = tl.load(starts + index, mask=there, other=0) // TOKENS + index
    sequence = tl.sum((tl.where(there, owned, _NEVER) <= tile).to(tl.int32), 0) - 1
    start = tl.load(starts + sequence)
    end = tl.load(starts + sequence + 1)
    first = start + (tile - start // TOKENS - sequence) * TOKENS
    if first >= end:
        return
    # from places among new tokens to positions
    ahead = tl.load(lengths + sequence) - end
    member, column = tl.arange(0, BM), tl.arange(0, BD)
    token = first + member // G
    inside = (token < end)[:, None] & (column < D)[None, :]
    place = (token.to(tl.int64) * H + group * G + member % G)[:, None] * D + column[None, :]
    query = tl.load(q + place, mask=inside, other=0.0)
    shared = group * G // (H // KV)
    keys += shared * D
    values += shared * D
    table += sequence * width
    row = token + ahead
    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    last = tl.minimum(end, first + TOKENS) + ahead
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, first + ahead - window + 1)
        whole = begin // BN * BN
        page = tl.load(table + whole // PAGE)
    else:
        # keys that every query of the tile sees
        whole = (first + ahead + 1) // BN * BN
        page = tl.load(table)
        for key in range(0, whole, BN):
            page, acc, most, total = step(
                query, keys, values, table, page, key, begin, last, acc, most, total, row, window, scale,
                column, D, BN, KV, PAGE, False, False,
            )  # fmt: skip
    for key in range(whole, last, BN):
        page, acc, most, total = step(
            query, keys, values, table, page, key, begin, last, acc, most, total, row, window, scale,
            column, D, BN, KV, PAGE, True, WINDOW,
        )  # fmt: skip
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


_prefill = Launcher(prefill_kernel)


@on_its_device
def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    *,
    window: int | None,
) -> Tensor:
    """Attend from the last tokens of every sequence; float32 scores and sums.

    Args:
        q: ``[N, H, D]`` contiguous, N at least 1, D up to 256.
        keys, values: ``[pages, PAGE, KV, D]`` contiguous, the new tokens' in them.
        table: ``[S, P]`` int32, the sequences' pages.
        lengths: ``[S]`` int32, tokens of each sequence.
        starts: ``[S + 1]`` int32, ends of the sequences' new tokens.
        window: Positions a query sees, its own included; None for all earlier ones.
    Returns: ``[N, H, D]``.
    """
    tokens, H, D = q.shape
    PAGE, KV = keys.shape[1:3]
    config = TABLE.lookup(q.device, "paged_prefill", q.dtype.itemsize)
    wide = max(16, power_of_2(D))
    queries, shared = _QUERIES[q.dtype.itemsize] * config.warps, H // KV
    # the largest power of two that divides it
    group = min(shared & -shared, queries)
    sequences = len(lengths)
    tiles = tokens * group // queries + sequences
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _prefill[(H // group * tiles,)](
        q, keys, values, table, lengths, starts, out, sequences, table.shape[1], tiles,
        0 if window is None else window, D**-0.5 * BITS.value,
        H=H, KV=KV, G=group, D=D, BD=wide, BM=queries, BN=min(config.block, PAGE), BS=power_of_2(sequences),
        PAGE=PAGE, WINDOW=window is not None, num_warps=config.warps,
        num_stages=config.stages if wide <= _WIDE else min(config.stages, 2),
    )  # fmt: skip
    return out

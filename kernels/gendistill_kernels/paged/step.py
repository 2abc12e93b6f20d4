"""One tile of keys of a sequence that lies in pages, for a tile of queries."""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import triton
import triton.language as tl

BITS = tl.constexpr(1.4426950408889634)


@triton.jit
def step(
    q, keys, values, table, page, first, begin, end, acc, most, total, row, window, scale,
    column, D: tl.constexpr, BN: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Take the keys from ``first`` on, which lie in ``page``; with a mask those from ``begin`` to before ``end`` only.

    ``row`` are the positions of the queries; scores are logarithms to the base of two. Returns the page of the keys
    that follow, too: a load whose address comes from another load of the same turn would be started late.
    """
    following = tl.load(table + tl.minimum(first + BN, end - 1) // PAGE)
    token = tl.arange(0, BN)
    key = first + token
    cell = (page.to(tl.int64) * PAGE + first % PAGE) * (KV * D) + token[:, None] * (KV * D) + column[None, :]
    there = (column < D)[None, :]
    if MASKED:
        there = there & ((key >= begin) & (key < end))[:, None]
    found = tl.load(keys + cell, mask=there, other=0.0)
    scores = tl.dot(q, tl.trans(found), input_precision="ieee") * scale
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
    found = tl.load(values + cell, mask=there, other=0.0)
    acc = tl.dot(weights.to(found.dtype), found, acc * shrink[:, None], input_precision="ieee")
    return following, acc, top, total * shrink + tl.sum(weights, 1)

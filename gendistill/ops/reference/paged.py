"""Attention to paged keys and values, in eager torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gendistill.ops.reference.attention import sliding_window_attention
from gendistill.ops.reference.block import turn
from gendistill.ops.types import PAGE, Pages


def paged_attend(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: tuple[int, int],
    eps: float,
    window: int | None,
    pages: Pages,
) -> Tensor:
    """Store and attend; arguments as :func:`gendistill.ops.paged.paged_attend`."""
    num_heads, num_kv_heads = heads
    parts = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, keys.shape[-1]))
    q, k, v = parts.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = (turn(part, weight, cos, sin, eps=eps) for part, weight in ((q, q_weight), (k, k_weight)))
    # by token, whatever the page
    keys, values = keys.view(-1, *k.shape[1:]), values.view(-1, *v.shape[1:])
    keys.index_copy_(0, pages.cells, k)
    values.index_copy_(0, pages.cells, v)
    attend = _attend_single if pages.single else _attend_each
    return attend(q, keys, values, pages, window).flatten(1)


def _attend_single(q: Tensor, keys: Tensor, values: Tensor, pages: Pages, window: int | None) -> Tensor:
    """Attend from one token of each sequence; on a GPU nothing depends on numbers that only the device knows."""
    width = pages.table.shape[1]
    if q.device.type == "cpu" and len(q):
        width = min(width, max(1, -(-int(pages.lengths.max()) // PAGE)))
    place = torch.arange(width * PAGE, device=q.device)
    length = pages.lengths[:, None]
    seen = place < length
    if window is not None:
        seen = seen & (place >= length - window)
    # as whole pages: one at a time, numbers that are taken by an index cost far more
    chosen = pages.table[:, :width].flatten()
    found = (
        part.view(-1, PAGE, *part.shape[1:]).index_select(0, chosen).view(*seen.shape, *part.shape[1:])
        for part in (keys, values)
    )
    # pages that are not the sequence's may hold anything, infinities too
    k, v = (part.masked_fill_(~seen[..., None, None], 0).transpose(1, 2) for part in found)
    out = F.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[:, :, 0].masked_fill(~seen.any(-1)[:, None, None], 0)


def _attend_each(q: Tensor, keys: Tensor, values: Tensor, pages: Pages, window: int | None) -> Tensor:
    """Attend from any number of tokens, one sequence after the other."""
    out = torch.zeros_like(q)
    starts, lengths = pages.starts.tolist(), pages.lengths.tolist()
    for row, length in enumerate(lengths):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        first = 0 if window is None else max(0, length - (end - start) + 1 - window)
        place = torch.arange(first, length, device=q.device)
        cell = pages.table[row].long()[place // PAGE] * PAGE + place % PAGE
        k, v = (part.index_select(0, cell)[None] for part in (keys, values))
        out[start:end] = sliding_window_attention(q[None, start:end], k, v, window=window)[0]
    return out

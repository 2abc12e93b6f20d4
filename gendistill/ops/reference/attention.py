"""Causal attention over packed documents or rows, optionally within a sliding window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gendistill.ops.types import Segments


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    segments: Segments | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attend to the last ``window`` positions, the current one included.

    Args:
        q: ``[B, T, H, D]``.
        k, v: ``[B, S, Hkv, D]`` with ``S >= T``: queries are the last ``T`` of the ``S`` positions. Query head
            ``h`` reads key/value head ``h // (H / Hkv)``.
        window: Positions a query sees; None for all earlier ones.
        scale: Factor on scores; ``D ** -0.5`` by default.
        segments: Documents packed on the token axis (then ``B == 1`` and ``S == T``).
        key_mask: ``[B, S]`` bool, False where a key is padding.
    Returns: ``[B, T, H, D]`` in ``v.dtype``. A query that sees nothing gets zeros.
    """
    queries, keys = q.shape[1], k.shape[1]
    position = torch.arange(keys, device=q.device)
    distance = position[keys - queries :, None] - position[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    if segments is not None:
        document = torch.bucketize(position, segments.cu_seqlens[1:].long(), right=True)
        allowed = allowed & (document[keys - queries :, None] == document[None, :])
    allowed = allowed[None, None]
    if key_mask is not None:
        allowed = allowed & key_mask.bool()[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.masked_fill(~allowed.any(-1, keepdim=True), 0.0).transpose(1, 2).to(v.dtype)

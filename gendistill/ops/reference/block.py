"""What a decoder layer does between its matrix products, in eager torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gendistill.ops.reference.attention import sliding_window_attention
from gendistill.ops.types import Segments


def rms_norm(
    x: Tensor, weight: Tensor, added: Tensor | None, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add and normalise; arguments as :func:`gendistill.ops.block.rms_norm`."""
    total = x if added is None else x + added.to(x.dtype)
    precise = total.to(torch.promote_types(total.dtype, torch.float32))
    scale = torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    return total, (precise * scale * weight.to(precise.dtype)).to(dtype)


def swiglu(both: Tensor) -> Tensor:
    """Compute ``silu(gate) * up`` of ``[..., gate | up]``."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def attend(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: tuple[int, int],
    eps: float,
    window: int | None,
    segments: Segments,
) -> Tensor:
    """Normalise, turn and attend; arguments as :func:`gendistill.ops.block.attend`."""
    num_heads, num_kv_heads = heads
    parts = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = parts.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = (turn(part, weight, cos, sin, eps=eps) for part, weight in ((q, q_weight), (k, k_weight)))
    return sliding_window_attention(q[None], k[None], v[None], window=window, segments=segments)[0].flatten(1)


def turn(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, *, eps: float) -> Tensor:
    """Normalise the heads of ``x`` ``[N, H, D]`` if there is a weight, and turn them by their positions."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        precise = F.rms_norm(precise, weight.shape, weight.to(precise.dtype), eps)
    first, second = precise.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (precise * cos[:, None].to(precise.dtype) + turned * sin[:, None].to(precise.dtype)).to(x.dtype)

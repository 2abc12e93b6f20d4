"""Gates and normalisation of the delta-rule mixers, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bounded_log_decay(raw: Tensor, a_log: Tensor, dt_bias: Tensor, *, lower_bound: float) -> Tensor:
    """Compute ``lower_bound * sigmoid(exp(A_log) * (raw + dt_bias))``, which stays in ``(lower_bound, 0)``.

    Args:
        raw: ``[..., H, K]`` projected gate, any float dtype.
        a_log: ``[H]`` log of the slope.
        dt_bias: ``[H * K]``.
        lower_bound: Most negative log-decay per token, < 0.
    Returns: ``[..., H, K]`` natural-log decay in float32 (float64 for float64 input).
    """
    raw, a_log, dt_bias = _same_dtype(raw, a_log, dt_bias)
    return lower_bound * torch.sigmoid(a_log.exp()[:, None] * (raw + dt_bias.view(raw.shape[-2:])))


def softplus_log_decay(raw: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute ``-exp(A_log) * softplus(raw + dt_bias)``; shapes as :func:`bounded_log_decay`.

    Source: arXiv 2510.26692, the KDA decay gate.
    """
    raw, a_log, dt_bias = _same_dtype(raw, a_log, dt_bias)
    return -a_log.exp()[:, None] * F.softplus(raw + dt_bias.view(raw.shape[-2:]))


def l2norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Divide the last dimension by ``sqrt(sum(x^2) + eps)``; float32 inside, ``x.dtype`` outside."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _same_dtype(raw: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if raw.dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in (raw, *others))

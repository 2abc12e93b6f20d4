"""RMSNorm of every head and an output gate, in eager torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(
    out: Tensor, weight: Tensor | None, gate: Tensor | None, *, activation: str, eps: float
) -> Tensor:
    """Compute ``rms_norm(out) * weight * activation(gate)``; arguments as :func:`gendistill.ops.gated_rms_norm`."""
    if weight is not None:
        out = F.rms_norm(out, weight.shape, weight, eps)
    out = out.flatten(-2)
    if gate is None:
        return out
    return out * (F.silu(gate) if activation == "silu" else torch.sigmoid(gate))

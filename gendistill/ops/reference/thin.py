"""Products of few rows, in eager torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gendistill.ops.reference.block import rms_norm, swiglu


def thin_linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply; arguments as :func:`gendistill.ops.thin.thin_linear`."""
    return F.linear(x, matrix, bias)


def thin_mlp(
    stream: Tensor, mixed: Tensor | None, norm_weight: Tensor, gate_up: Tensor, down: Tensor, *, eps: float
) -> Tensor:
    """Add, normalise and run the MLP; arguments as :func:`gendistill.ops.thin.thin_mlp`."""
    total, x = rms_norm(stream, norm_weight, mixed, eps=eps, dtype=gate_up.dtype)
    hidden = swiglu(F.linear(x, gate_up))
    # the sum is rounded once, to the dtype of the stream
    wide = torch.promote_types(total.dtype, torch.float32)
    return (total.to(wide) + hidden.to(wide) @ down.to(wide).T).to(total.dtype)

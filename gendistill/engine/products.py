"""Matrix products whose sums are not rounded on the way."""

from __future__ import annotations

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices into float32 (float64 from such), without rounding the sums on the way."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_product(added: Tensor, left: Tensor, right: Tensor, *, in_place: bool = False) -> Tensor:
    """Return ``added + left @ right`` in the dtype of ``added``, in its memory if it may be overwritten."""
    if added.dtype == left.dtype:
        return torch.addmm(added, left, right, out=added if in_place else None)
    if left.device.type == "cuda" and added.dtype == torch.float32:
        return torch.addmm(added, left, right, out_dtype=torch.float32, out=added if in_place else None)
    return added + product(left, right).to(added.dtype)


def grad_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter's gradient is wanted, which is not always its own."""
    return parameter.grad_dtype or parameter.dtype

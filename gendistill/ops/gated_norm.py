"""What follows the delta rule: an optional RMSNorm of every head and an output gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gendistill.ops.types import Impl, is_triton, triton_ops


def gated_rms_norm(
    out: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    *,
    activation: str = "silu",
    eps: float = 1e-6,
    impl: Impl = Impl.REFERENCE,
) -> Tensor:
    """Compute ``rms_norm(out) * weight * activation(gate)``.

    Args:
        out: ``[..., H, V]``.
        weight: ``[V]``, or None for no norm.
        gate: ``[..., H * V]`` raw, or None with ``activation="none"``.
        activation: ``silu``, ``sigmoid`` or ``none``.
        eps: Of the norm.
        impl: Implementation; :func:`gendistill.ops.resolve_impl` chooses one.
    Returns: ``[..., H * V]`` in ``out.dtype``.
    Raises:
        ValueError: The activation is unknown, or says nothing of the gate's being there.
    """
    if activation not in ("silu", "sigmoid", "none") or (gate is None) != (activation == "none"):
        given = "no gate" if gate is None else "a gate"
        raise ValueError(
            f'activation must be silu or sigmoid with a gate and none without, got "{activation}" and {given}'
        )
    if is_triton(impl):
        return triton_ops().triton_gated_norm(out, weight, gate, activation, eps)
    if weight is not None:
        out = F.rms_norm(out, weight.shape, weight, eps)
    out = out.flatten(-2)
    if gate is None:
        return out
    return out * (F.silu(gate) if activation == "silu" else torch.sigmoid(gate))

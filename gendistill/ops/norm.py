"""What follows the delta rule: an optional RMSNorm of every head and an output gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gendistill.ops.reference.norm import gated_rms_norm as reference_norm
from gendistill.ops.select import Impl, contract, is_triton


def gated_rms_norm(
    out: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    *,
    activation: str = "silu",
    eps: float = 1e-6,
    impl: Impl | str = Impl.REFERENCE,
) -> Tensor:
    """Compute ``rms_norm(out) * weight * activation(gate)``.

    Args:
        out: ``[..., H, V]``.
        weight: ``[V]``, or None for no norm.
        gate: ``[..., H * V]`` raw, or None with ``activation="none"``.
        activation: ``silu``, ``sigmoid`` or ``none``.
        eps: Of the norm.
        impl: Implementation; :func:`gendistill.ops.resolve` chooses one.
    Returns: ``[..., H * V]`` in ``out.dtype``.
    Raises:
        ValueError: The activation is unknown, or does not say whether there is a gate.
    """
    if activation not in ("silu", "sigmoid", "none") or (gate is None) != (activation == "none"):
        given = "no gate" if gate is None else "a gate"
        raise ValueError(
            f'activation must be silu or sigmoid with a gate and none without, got "{activation}" and {given}'
        )
    if is_triton(impl):
        return _contract().gated_rms_norm(out, weight, gate, activation=activation, eps=eps)
    return reference_norm(out, weight, gate, activation=activation, eps=eps)


def _contract():
    if TYPE_CHECKING:
        import gendistill.ops.contracts.norm as found

        return found
    return contract("norm")

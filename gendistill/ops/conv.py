"""Short causal convolution of every channel, before the delta rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gendistill.ops.reference.conv import causal_conv as reference_conv
from gendistill.ops.select import Impl, contract, is_triton
from gendistill.ops.types import OpOutput, Segments


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "identity",
    state: Tensor | None = None,
    segments: Segments | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> OpOutput:
    """Convolve every channel with its own ``W`` taps: ``y_t = sum_j weight[j] x_{t - (W - 1) + j} + bias``.

    Args:
        x: ``[B, T, C]``.
        weight: ``[C, W]``; the last tap multiplies the current token.
        bias: ``[C]`` or None.
        activation: ``identity`` or ``silu``.
        state: ``[N, C, W - 1]``, inputs before the first token, or None for zeros. ``N`` is B, or the number of
            segments.
        segments: Documents packed on the token axis (then ``B == 1``), each with its own history.
        impl: Implementation; :func:`gendistill.ops.resolve` chooses one.
    Returns:
        ``out`` ``[B, T, C]`` in ``x.dtype``; ``state`` ``[N, C, W - 1]``, the last inputs of every sequence.
    Raises:
        ValueError: Shapes disagree or the activation is unknown.
    """
    if is_triton(impl):
        return _contract().causal_conv(x, weight, bias, activation=activation, state=state, segments=segments)
    return reference_conv(x, weight, bias, activation=activation, state=state, segments=segments)


def _contract():
    if TYPE_CHECKING:
        import gendistill.ops.contracts.conv as found

        return found
    return contract("conv")

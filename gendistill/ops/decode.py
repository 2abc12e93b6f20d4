"""One decode step of a delta-rule layer: all that lies between its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from gendistill.ops.gates import Gate
from gendistill.ops.reference.decode import decode_delta_rule as reference_decode
from gendistill.ops.select import Impl, contract, is_triton


def decode_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    gate: Gate = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    scale: float | None = None,
    conv_weight: Sequence[Tensor] | None = None,
    conv_bias: Sequence[Tensor] | None = None,
    conv_state: Tensor | None = None,
    conv_activation: str = "identity",
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    output_gate: Tensor | None = None,
    output_activation: str = "none",
    lives: Tensor | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> Tensor:
    """Take every sequence a few tokens further, in one launch on the kernels, or two; both states change in place.

    Short convolution, L2 norm of q and k, decay gate, write strength, the delta rule with a decay per key channel, then
    RMSNorm and output gate of every head. Nothing but the output is allocated, so a CUDA graph can hold the step. There
    are no gradients: call it without grad mode.

    Args:
        q: ``[N, T, Hq * K]`` projected, before the convolution; channels side by side, tokens may be apart.
        k: ``[N, T, Hk * K]``.
        v: ``[N, T, Hv * V]``; head ``h`` of the state reads value head ``h // (H / Hv)``, and so on.
        decay: ``[N, T, H, K]``; natural-log decay, or raw values of the gate.
        beta: ``[N, T, H]`` strength in [0, 1] of what is erased and written; with a gate, logits.
        state: ``[N, H, K, V]`` float32, contiguous; **updated in place**.
        gate, a_log, dt_bias, lower_bound, scale: As :func:`gendistill.ops.chunk_delta_rule`; with a gate q and k are
            L2-normalised here.
        conv_weight: ``[channels, W]`` of q, k and v, the last tap multiplies the current token; None: no convolution.
        conv_bias: ``[channels]`` of each, or None.
        conv_state: ``[N, C, W - 1]`` last inputs of all channels, q before k before v, in the dtype of q or float32,
            contiguous; **updated in place**. None without a convolution, or with one tap.
        conv_activation: ``identity`` or ``silu``.
        norm_weight: ``[V]`` of an RMSNorm over every head's channels, or None for no norm.
        norm_eps: Of that norm.
        output_gate: ``[N, T, H * V]`` raw, or None.
        output_activation: Of the output gate: ``silu`` or ``sigmoid``; ``none`` without one.
        lives: ``[N]`` bool, contiguous: rows that have a sequence. The output of others is zero and their states keep
            every bit, whatever those and the inputs hold; the kernels hardly spend time on them. None: all.
        impl: Implementation; :func:`gendistill.ops.resolve` chooses one.
    Returns: ``[N, T, H, V]`` in ``q.dtype``.
    Raises:
        ValueError: Shapes disagree, a tensor is missing, or a state cannot be changed in place.
    """
    if output_gate is not None and output_activation not in ("silu", "sigmoid"):
        raise ValueError(f'an output gate needs output_activation silu or sigmoid, got "{output_activation}"')
    step = _contract().decode_delta_rule if is_triton(impl) else reference_decode
    return step(
        q,
        k,
        v,
        decay,
        beta,
        state,
        gate=gate,
        a_log=a_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        scale=scale,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        conv_state=conv_state,
        conv_activation=conv_activation,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        output_gate=output_gate,
        output_activation=output_activation,
        lives=lives,
    )


def _contract():
    if TYPE_CHECKING:
        import gendistill.ops.contracts.delta_rule as found

        return found
    return contract("delta_rule")

"""One decode step of a delta-rule layer in eager torch, which the one-launch kernel is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gendistill.ops.gates import apply_gates
from gendistill.ops.reference.conv import causal_conv
from gendistill.ops.reference.delta_rule import recurrent_delta_rule
from gendistill.ops.reference.norm import gated_rms_norm


def decode_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    gate: str,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float,
    scale: float | None,
    conv_weight: Sequence[Tensor] | None,
    conv_bias: Sequence[Tensor] | None,
    conv_state: Tensor | None,
    conv_activation: str,
    norm_weight: Tensor | None,
    norm_eps: float,
    output_gate: Tensor | None,
    output_activation: str,
    lives: Tensor | None,
) -> Tensor:
    """Convolve, gate, apply the rule, normalise and gate; arguments as :func:`gendistill.ops.decode_delta_rule`.

    Float32 inside, but the convolution, which is in the dtype of q; float64 for float64 inputs and states. Both states
    are updated in place.
    """
    K, V = state.shape[2:]
    _check(q, k, v, decay, beta, state, lives)
    if conv_weight is not None and conv_state is None and conv_weight[0].shape[1] > 1:
        raise ValueError(f"conv_state must be given, [N, C, W - 1], for {conv_weight[0].shape[1]} taps")
    if conv_weight is not None:
        mixed, inputs = causal_conv(
            torch.cat([q, k, v], dim=-1),
            torch.cat(list(conv_weight)),
            torch.cat(list(conv_bias)) if conv_bias else None,
            activation=conv_activation,
            state=conv_state,
        )
        if conv_state is not None:
            _keep(conv_state, inputs, lives)
        q, k, v = mixed.split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=-1)
    heads = [part.unflatten(-1, (-1, channels)) for part, channels in ((q, K), (k, K), (v, V))]
    x = apply_gates(
        heads[0],
        heads[1],
        decay,
        beta,
        erase="beta",
        write="beta",
        gate=gate,
        a_log=a_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
    )
    out, memory = recurrent_delta_rule(
        x.q, x.k, heads[2], log_decay=x.log_decay, erase=x.erase, write=x.write, state=state, scale=scale
    )
    _keep(state, memory, lives)
    out = gated_rms_norm(out, norm_weight, output_gate, activation=output_activation, eps=norm_eps)
    out = out.unflatten(-1, (-1, V))
    return out if lives is None else torch.where(_by_row(lives, out), out, 0)


def _keep(state: Tensor, new: Tensor, lives: Tensor | None) -> None:
    state.copy_(new if lives is None else torch.where(_by_row(lives, state), new.to(state.dtype), state))


def _by_row(lives: Tensor, like: Tensor) -> Tensor:
    return lives.view(-1, *[1] * (like.ndim - 1))


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, lives: Tensor | None
) -> None:
    (N, T), (H, K, V) = q.shape[:2], state.shape[1:]
    for name, part, shape in (
        ("decay", decay, (N, T, H, K)),
        ("beta", beta, (N, T, H)),
        ("state", state, (N, H, K, V)),
    ):
        if tuple(part.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(part.shape)}")
    if lives is not None:
        if lives.dtype != torch.bool:
            raise ValueError(f"lives must be bool, got {str(lives.dtype).removeprefix('torch.')}")
        if tuple(lives.shape) != (N,):
            raise ValueError(f"lives must be {[N]}, got {list(lives.shape)}")
        if lives.device != q.device:
            raise ValueError(f"lives is on {lives.device} and q on {q.device}")
    for name, part, channels in (("q", q, K), ("k", k, K), ("v", v, V)):
        number, rest = divmod(part.shape[-1], channels)
        if rest or number < 1 or H % number:
            raise ValueError(
                f"{part.shape[-1]} channels of {name} are not heads of {channels} that divide {H}"
            )

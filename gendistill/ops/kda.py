"""Kimi Delta Attention: decay per key channel, one write strength per head."""

from __future__ import annotations

import torch
from torch import Tensor

from gendistill.ops.reference.delta_rule import chunk_delta_rule, recurrent_delta_rule
from gendistill.ops.reference.gates import bounded_log_decay, l2norm, softplus_log_decay
from gendistill.ops.types import Impl, OpOutput, Segments, is_triton, triton_ops

# below this many tokens a loop is cheaper than the chunked form
RECURRENT_TOKENS = 4


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Segments | None,
) -> None:
    """Refuse tensors that do not belong together; the kernels would read past their ends."""
    batch, length, heads = beta.shape
    keys, values = q.shape[-1], v.shape[-1]
    for name, part, channels in (("q", q, keys), ("k", k, keys), ("v", v, values), ("decay", decay, keys)):
        # its shape is read once: a short call on a GPU waits for all that happens here
        shape = part.shape
        if len(shape) != 4 or shape[0] != batch or shape[1] != length or shape[3] != channels:
            raise ValueError(
                f"{name} must have shape {[batch, length, 'heads', channels]}, got {list(shape)}"
            )
        if heads % shape[2] or (name == "decay" and shape[2] != heads):
            raise ValueError(f"{heads} heads of beta do not fit {shape[2]} heads of {name}")
    number = batch if segments is None else len(segments.lengths)
    if segments is not None and (batch != 1 or segments.num_tokens != length):
        raise ValueError(
            f"packed input must be one row of {segments.num_tokens} tokens, got {batch} rows of {length}"
        )
    if state is not None and state.shape != (number, heads, keys, values):
        raise ValueError(f"state must have shape {[number, heads, keys, values]}, got {list(state.shape)}")


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    segments: Segments | None = None,
    log_decay_floor: float | None = None,
    impl: Impl = Impl.REFERENCE,
) -> OpOutput:
    """Apply Kimi Delta Attention.

    Args:
        q: ``[B, T, Hq, K]``, L2-normalised over K; scaled by ``K ** -0.5`` here.
        k: ``[B, T, Hk, K]``, L2-normalised over K.
        v: ``[B, T, Hv, V]``; head ``h`` of the output reads head ``h // (H / Hq)`` of q, and so on;
            each count divides H.
        log_decay: ``[B, T, H, K]`` natural-log decay per key channel, <= 0.
        beta: ``[B, T, H]`` write strength in [0, 1]. A step with ``log_decay = 0`` and ``beta = 0`` changes nothing.
        state: ``[N, H, K, V]`` float32, or None for zeros; ``N`` is B, or the number of segments.
        segments: Documents packed on the token axis (then ``B == 1``); none sees another.
        log_decay_floor: Known lower bound of ``log_decay``, which lets the chunked form take a shorter path.
        impl: Implementation; :func:`gendistill.ops.resolve_impl` chooses one.
    Returns:
        ``out`` ``[B, T, H, V]`` in ``v.dtype``; ``state`` ``[N, H, K, V]`` float32 after the last token.
    Raises:
        ValueError: Shapes disagree.
    Source: arXiv 2510.26692.
    """
    check_shapes(q, k, v, log_decay, beta, state, segments)
    if is_triton(impl):
        return triton_ops().triton_kda(q, k, v, log_decay, beta, state=state, segments=segments)
    gates = {"log_decay": log_decay, "erase": beta, "write": beta, "state": state}
    if segments is None and q.shape[1] <= RECURRENT_TOKENS:
        return recurrent_delta_rule(q, k, v, **gates)
    return chunk_delta_rule(q, k, v, **gates, segments=segments, log_decay_floor=log_decay_floor)


def gated_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_decay: Tensor,
    raw_beta: Tensor,
    *,
    gate: str,
    a_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float = -5.0,
    state: Tensor | None = None,
    segments: Segments | None = None,
    impl: Impl = Impl.REFERENCE,
) -> OpOutput:
    """Normalise q and k, apply the gates, and run :func:`kda`: one op, so that the kernels fuse it.

    Args:
        q: ``[B, T, Hq, K]``.
        k: ``[B, T, Hk, K]``.
        v: ``[B, T, Hv, V]``; heads as in :func:`kda`.
        raw_decay: ``[B, T, H, K]`` projected gate, before bias and nonlinearity.
        raw_beta: ``[B, T, H]`` logits of the write strength.
        gate: ``bounded``: ``lower_bound * sigmoid(exp(a_log) * (raw + dt_bias))``; ``softplus``:
            ``-exp(a_log) * softplus(raw + dt_bias)``.
        a_log: ``[H]``.
        dt_bias: ``[H * K]``.
        lower_bound: Of the bounded gate, per token, < 0.
        state, segments, impl: As in :func:`kda`.
    Returns: As :func:`kda`.
    Raises:
        ValueError: Shapes disagree or the gate is unknown.
    Source: arXiv 2510.26692.
    """
    if gate not in ("bounded", "softplus"):
        raise ValueError(f'gate must be bounded or softplus, got "{gate}"')
    check_shapes(q, k, v, raw_decay, raw_beta, state, segments)
    if is_triton(impl):
        gates = {"gate": gate, "a_log": a_log, "dt_bias": dt_bias, "lower_bound": lower_bound, "raw": True}
        return triton_ops().triton_kda(q, k, v, raw_decay, raw_beta, **gates, state=state, segments=segments)
    if gate == "bounded":
        log_decay = bounded_log_decay(raw_decay, a_log, dt_bias, lower_bound=lower_bound)
    else:
        log_decay = softplus_log_decay(raw_decay, a_log, dt_bias)
    beta = torch.sigmoid(raw_beta if raw_beta.dtype == torch.float64 else raw_beta.float())
    return kda(
        l2norm(q),
        l2norm(k),
        v,
        log_decay,
        beta,
        state=state,
        segments=segments,
        log_decay_floor=lower_bound if gate == "bounded" else None,
    )

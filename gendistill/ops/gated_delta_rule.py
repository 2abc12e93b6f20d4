"""The family of gated delta rules: what decays, what a write erases, and how much is written."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gendistill.ops.kda import RECURRENT_TOKENS, check_shapes
from gendistill.ops.reference.delta_rule import chunk_delta_rule, recurrent_delta_rule
from gendistill.ops.reference.gates import bounded_log_decay, l2norm, softplus_log_decay
from gendistill.ops.types import Impl, OpOutput, Segments, is_triton, triton_ops


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
    *,
    erase: Tensor | Literal["beta"] | None = "beta",
    write: Tensor | Literal["beta"] = "beta",
    gate: Literal["none", "softplus", "bounded"] = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    state: Tensor | None = None,
    segments: Segments | None = None,
    impl: Impl = Impl.REFERENCE,
) -> OpOutput:
    """Decay the state, erase what it holds under the key, write the value there, and read with the query.

    ``S <- diag(exp(g)) S``, ``S <- S + k (write v - S^T (erase k))^T``, ``o = K ** -0.5 S^T q``. One decay per head and
    ``beta`` for both strengths is the gated delta rule (GDN); channels everywhere GDN-2; no erase gated linear
    attention; a decay per channel and ``beta`` Kimi Delta Attention, :func:`kda`.

    Args:
        q: ``[B, T, H, K]``.
        k: ``[B, T, Hk, K]``; head ``h`` reads key head ``h // (H / Hk)``.
        v: ``[B, T, Hv, V]``, likewise.
        decay: ``[B, T, H]`` per head or ``[B, T, H, K]`` per key channel: natural-log decay, <= 0, without a gate.
        beta: ``[B, T, H]`` strength in [0, 1] of what says ``beta``; None if neither does.
        erase: ``beta``; ``[B, T, H, K]``, a strength per key channel in [0, 1]; or None: a write erases nothing.
        write: ``beta``, or ``[B, T, H, V]``, a strength per value channel in [0, 1].
        gate: ``none``, or how ``decay`` is made of raw values: ``softplus``: ``-exp(a_log) * softplus(raw + dt_bias)``;
            ``bounded``: ``lower_bound * sigmoid(exp(a_log) * (raw + dt_bias))``. With a gate ``beta``, ``erase`` and
            ``write`` are logits, and q and k are L2-normalised here; without, they come normalised.
        a_log: ``[H]``, of the gate.
        dt_bias: ``[H]`` or ``[H * K]``, as ``decay``, of the gate.
        lower_bound: Of the bounded gate, per token, < 0.
        state: ``[N, H, K, V]`` float32, or None for zeros; ``N`` is B, or the number of segments.
        segments: Documents packed on the token axis (then ``B == 1``); none sees another.
        impl: Implementation; :func:`gendistill.ops.resolve_impl` chooses one.
    Returns:
        ``out`` ``[B, T, H, V]`` in ``v.dtype``; ``state`` ``[N, H, K, V]`` float32 after the last token.
    Raises:
        ValueError: Shapes disagree, a tensor is missing or superfluous, or the gate is unknown.
    Source: arXiv 2412.06464 (GDN), arXiv 2605.22791 (separate erase and write), arXiv 2510.26692 (KDA).
    """
    _check_decay(decay, gate, a_log, dt_bias)
    per_head = decay if decay.ndim == 3 else decay[..., 0]
    per_channel = decay if decay.ndim == 4 else decay[..., None].expand(*decay.shape, q.shape[-1])
    check_shapes(q, k, v, per_channel, per_head, state, segments)
    _check_strengths(beta, erase, write, (*decay.shape[:3], q.shape[-1], v.shape[-1]))
    erase_gate = erase if isinstance(erase, Tensor) else None
    write_gate = write if isinstance(write, Tensor) else None
    if is_triton(impl):
        strengths = {"erase": erase_gate, "write": write_gate, "erases": erase is not None}
        gates = {"gate": gate, "a_log": a_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
        return triton_ops().triton_kda(
            q, k, v, decay, beta, **strengths, **gates, raw=gate != "none", state=state, segments=segments
        )
    if gate != "none":
        q, k = l2norm(q), l2norm(k)
        beta, erase_gate, write_gate = (
            None if part is None else torch.sigmoid(part if part.dtype == torch.float64 else part.float())
            for part in (beta, erase_gate, write_gate)
        )
    gates = {
        "log_decay": _log_decay(decay, gate, a_log, dt_bias, lower_bound),
        "erase": None if erase is None else beta if erase_gate is None else erase_gate,
        "write": beta if write_gate is None else write_gate,
        "state": state,
    }
    if segments is None and q.shape[1] <= RECURRENT_TOKENS:
        return recurrent_delta_rule(q, k, v, **gates)
    floor = lower_bound if gate == "bounded" else None
    return chunk_delta_rule(q, k, v, **gates, segments=segments, log_decay_floor=floor)


def _log_decay(
    decay: Tensor, gate: str, a_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float
) -> Tensor:
    if gate == "none" or a_log is None or dt_bias is None:
        return decay
    # a decay per head is one of a single channel
    raw = decay if decay.ndim == 4 else decay[..., None]
    if gate == "bounded":
        found = bounded_log_decay(raw, a_log, dt_bias, lower_bound=lower_bound)
    else:
        found = softplus_log_decay(raw, a_log, dt_bias)
    return found if decay.ndim == 4 else found[..., 0]


def _check_decay(decay: Tensor, gate: str, a_log: Tensor | None, dt_bias: Tensor | None) -> None:
    if gate not in ("none", "softplus", "bounded"):
        raise ValueError(f'gate must be none, softplus or bounded, got "{gate}"; choose one of them')
    if decay.ndim not in (3, 4):
        raise ValueError(
            f"decay must be [B, T, H] per head or [B, T, H, K] per key channel, got {list(decay.shape)}; reshape it"
        )
    shapes = {"a_log": None, "dt_bias": None}
    if gate != "none":
        shapes = {"a_log": [decay.shape[2]], "dt_bias": [decay.shape[2:].numel()]}
    for (name, shape), part in zip(shapes.items(), (a_log, dt_bias), strict=True):
        _check(name, part, shape, f'with gate "{gate}"')


def _check_strengths(
    beta: Tensor | None,
    erase: Tensor | str | None,
    write: Tensor | str | None,
    sizes: tuple[int, ...],
) -> None:
    *rows, keys, values = sizes
    for name, strength, others in (("erase", erase, ("beta", None)), ("write", write, ("beta",))):
        if not isinstance(strength, Tensor) and strength not in others:
            choices = " or ".join('"beta"' if other else "None" for other in others)
            raise ValueError(f"{name} must be a tensor, {choices}, got {strength!r}; pass one of them")
    is_read = isinstance(erase, str) or isinstance(write, str)
    reason = 'where erase or write is "beta"' if is_read else 'where neither erase nor write is "beta"'
    _check("beta", beta, rows if is_read else None, reason)
    if isinstance(erase, Tensor):
        _check("erase", erase, [*rows, keys], "per key channel")
    if isinstance(write, Tensor):
        _check("write", write, [*rows, values], "per value channel")


def _check(name: str, part: Tensor | None, shape: list[int] | None, reason: str) -> None:
    got = None if part is None else list(part.shape)
    if got != shape:
        fix = "leave it out" if shape is None else "pass that"
        raise ValueError(f"{name} must be {shape} {reason}, got {got}; {fix}")

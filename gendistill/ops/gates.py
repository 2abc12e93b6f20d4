"""Gates and normalisation of the delta-rule mixers, in float32: the one place that says what raw values mean."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# how a decay is made: it is given as log-decays, or of raw values by one of these
Gate = Literal["none", "softplus", "bounded"]
GATES = ("none", "softplus", "bounded")


def bounded_log_decay(raw: Tensor, a_log: Tensor, dt_bias: Tensor, *, lower_bound: float) -> Tensor:
    """Compute ``lower_bound * sigmoid(exp(A_log) * (raw + dt_bias))``, which stays in ``(lower_bound, 0)``.

    Args:
        raw: ``[..., H, K]`` projected gate, any float dtype.
        a_log: ``[H]`` log of the slope.
        dt_bias: ``[H * K]``.
        lower_bound: Most negative log-decay per token, < 0.
    Returns: ``[..., H, K]`` natural-log decay in float32 (float64 for float64 input).
    """
    raw, a_log, dt_bias = _same_dtype(raw, a_log, dt_bias)
    return lower_bound * torch.sigmoid(a_log.exp()[:, None] * (raw + dt_bias.view(raw.shape[-2:])))


def softplus_log_decay(raw: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute ``-exp(A_log) * softplus(raw + dt_bias)``; shapes as :func:`bounded_log_decay`.

    Source: arXiv 2510.26692, the KDA decay gate.
    """
    raw, a_log, dt_bias = _same_dtype(raw, a_log, dt_bias)
    return -a_log.exp()[:, None] * F.softplus(raw + dt_bias.view(raw.shape[-2:]))


def log_decay(
    raw: Tensor,
    *,
    gate: str,
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
) -> Tensor:
    """Turn raw values into natural-log decays, by the gate of this name.

    Args:
        raw: ``[B, T, H]`` per head or ``[B, T, H, K]`` per key channel; log-decays already with gate ``none``.
        gate: ``none``, ``softplus`` (:func:`softplus_log_decay`) or ``bounded`` (:func:`bounded_log_decay`).
        a_log: ``[H]``, of a gate.
        dt_bias: ``[H]`` or ``[H * K]``, as ``raw``, of a gate.
        lower_bound: Of the bounded gate, per token, < 0.
    Returns: As ``raw``, float32 (float64 for float64 input); ``raw`` itself with gate ``none``.
    Raises:
        ValueError: The gate is unknown or lacks a parameter.
    """
    if gate == "none":
        return raw
    if gate not in GATES:
        raise ValueError(f'gate must be none, softplus or bounded, got "{gate}"; choose one of them')
    if a_log is None or dt_bias is None:
        raise ValueError(f'gate "{gate}" needs a_log and dt_bias; pass both, or gate "none" with log-decays')
    # a decay per head is one of a single channel
    wide = raw if raw.ndim == 4 else raw[..., None]
    if gate == "bounded":
        found = bounded_log_decay(wide, a_log, dt_bias, lower_bound=lower_bound)
    else:
        found = softplus_log_decay(wide, a_log, dt_bias)
    return found if raw.ndim == 4 else found[..., 0]


def strength(logits: Tensor) -> Tensor:
    """Turn logits into strengths in (0, 1), in float32 (float64 for float64 input)."""
    return torch.sigmoid(logits if logits.dtype == torch.float64 else logits.float())


def l2norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Divide the last dimension by ``sqrt(sum(x^2) + eps)``; float32 inside, ``x.dtype`` outside."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class Gated(NamedTuple):
    """What the rule itself takes: normalised q and k, log-decays, and strengths.

    Attributes:
        q, k: ``[B, T, heads, K]``.
        log_decay: ``[B, T, H]``, ``[B, T, H, K]``, or None for no decay.
        erase: ``[B, T, H]``, ``[B, T, H, K]``, or None: a write erases nothing.
        write: ``[B, T, H]`` or ``[B, T, H, V]``.
    """

    q: Tensor
    k: Tensor
    log_decay: Tensor | None
    erase: Tensor | None
    write: Tensor


def apply_gates(
    q: Tensor,
    k: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    *,
    erase: Tensor | Literal["beta"] | None,
    write: Tensor | Literal["beta"],
    gate: str,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float,
) -> Gated:
    """Turn what an op is given into what the rule takes; arguments as ``ops.chunk_delta_rule``.

    With gate ``none`` everything is given as the rule takes it. With another one ``decay`` holds raw values, strengths
    are logits, and q and k are normalised here.
    """
    erase_gate = erase if isinstance(erase, Tensor) else None
    write_gate = write if isinstance(write, Tensor) else None
    if gate != "none":
        q, k = l2norm(q), l2norm(k)
        beta, erase_gate, write_gate = (
            None if part is None else strength(part) for part in (beta, erase_gate, write_gate)
        )
        if decay is not None:
            decay = log_decay(decay, gate=gate, a_log=a_log, dt_bias=dt_bias, lower_bound=lower_bound)
    erases = None if erase is None else beta if erase_gate is None else erase_gate
    writes = beta if write_gate is None else write_gate
    assert writes is not None
    return Gated(q, k, decay, erases, writes)


def _same_dtype(raw: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if raw.dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in (raw, *others))

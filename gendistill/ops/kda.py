"""Kimi Delta Attention: decay per key channel, one write strength per head."""

from __future__ import annotations

from torch import Tensor

from gendistill.ops.reference.delta_rule import chunk_delta_rule, recurrent_delta_rule
from gendistill.ops.types import Impl, OpOutput, Segments

# below this many tokens a loop is cheaper than the chunked form
_RECURRENT_TOKENS = 4


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
        q: ``[B, T, H, K]``, L2-normalised over K; scaled by ``K ** -0.5`` here.
        k: ``[B, T, Hkv, K]``, L2-normalised over K.
        v: ``[B, T, Hkv, V]``; query head ``h`` reads key/value head ``h // (H / Hkv)``.
        log_decay: ``[B, T, H, K]`` natural-log decay per key channel, <= 0.
        beta: ``[B, T, H]`` write strength in [0, 1]. A step with ``log_decay = 0`` and ``beta = 0`` changes nothing.
        state: ``[N, H, K, V]`` float32, or None for zeros; ``N`` is B, or the number of segments.
        segments: Documents packed on the token axis (then ``B == 1``); none sees another.
        log_decay_floor: Known lower bound of ``log_decay``, which lets the chunked form take a shorter path.
        impl: Implementation, resolved when the model was built.
    Returns:
        ``out`` ``[B, T, H, V]`` in ``v.dtype``; ``state`` ``[N, H, K, V]`` float32 after the last token.
    Raises:
        ValueError: Shapes disagree, or ``impl`` does not exist here.
    Source: arXiv 2510.26692.
    """
    if impl is not Impl.REFERENCE:
        raise ValueError(f'kda has no "{impl}" implementation in this version; use "reference"')
    gates = {"log_decay": log_decay, "erase": beta, "write": beta, "state": state}
    if segments is None and q.shape[1] <= _RECURRENT_TOKENS:
        return recurrent_delta_rule(q, k, v, **gates)
    return chunk_delta_rule(q, k, v, **gates, segments=segments, log_decay_floor=log_decay_floor)

"""The general gated delta rule in eager torch: the definition that every kernel is checked against.

Per head, with state ``S`` of shape ``[K, V]``::

    S <- diag(exp(log_decay_t)) S
    S <- S + k_t (write_t * v_t - S^T (erase_t * k_t))^T
    o_t = scale * S^T q_t

Cases: DeltaNet has no decay and ``erase = write = beta``; GDN decays by head; KDA by channel; GDN-2 has channel
gates; gated linear attention has no erase. The decay acts before the read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gendistill.ops.types import OpOutput, Segments

# largest |exponent| that the factorised intra-chunk products may reach: exp(40)**2 still fits float32
_SAFE_EXPONENT = 40.0


def _full_precision(function: Callable[..., OpOutput]) -> Callable[..., OpOutput]:
    """Keep autocast out: the recurrence is float32 whatever the model computes in."""

    @wraps(function)
    def run(q: Tensor, *args: Tensor, **kwargs: Any) -> OpOutput:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **kwargs)

    return run


@_full_precision
def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor,
    state: Tensor | None = None,
    scale: float | None = None,
) -> OpOutput:
    """Apply the gated delta rule token by token.

    Args:
        q: ``[B, T, H, K]`` queries.
        k: ``[B, T, Hk, K]`` keys; head ``h`` of the output reads key head ``h // (H / Hk)``.
        v: ``[B, T, Hv, V]`` values, grouped likewise.
        log_decay: Natural log of the decay, <= 0: ``[B, T, H]``, ``[B, T, H, K]`` or None for no decay.
        erase: Erase gate on the key side: ``[B, T, H]``, ``[B, T, H, K]`` or None for no delta correction.
        write: Write gate on the value side: ``[B, T, H]`` or ``[B, T, H, V]``.
        state: ``[B, H, K, V]`` float32, or None for zeros.
        scale: Factor on queries; ``K ** -0.5`` by default.
    Returns:
        ``out`` ``[B, T, H, V]`` in ``v.dtype``; ``state`` ``[B, H, K, V]`` in float32 (float64 for float64 input).
    Source: arXiv 2510.26692 (KDA recurrence); arXiv 2605.22791 for separate erase and write gates.
    """
    x = _prepare(q, k, v, log_decay, erase, write, state, scale)
    memory, outputs = x.state, []
    for t in range(q.shape[1]):
        key, query = x.k[:, t], x.q[:, t]
        if x.log_decay is not None:
            memory = memory * x.log_decay[:, t].exp()[..., None]
        value = x.write[:, t] * x.v[:, t]
        if x.erase is not None:
            value = value - torch.einsum("bhkv,bhk->bhv", memory, x.erase[:, t] * key)
        memory = memory + key[..., None] * value[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, query))
    out = torch.stack(outputs, dim=1) if outputs else x.v.new_zeros(*x.q.shape[:3], v.shape[-1])
    return OpOutput(out.to(v.dtype), memory)


@_full_precision
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor,
    state: Tensor | None = None,
    scale: float | None = None,
    segments: Segments | None = None,
    log_decay_floor: float | None = None,
    chunk_size: int = 16,
) -> OpOutput:
    """Apply the gated delta rule in chunks; arguments and results as :func:`recurrent_delta_rule`.

    Args:
        segments: Documents packed on the token axis (then ``B == 1``); each starts from its own state and
            ``state`` is ``[N, H, K, V]``, before and after. None: every row is one sequence.
        log_decay_floor: A bound known in advance, ``log_decay >= log_decay_floor``. When a chunk's decays then
            stay in float32's range, decay ratios are split into two factors around the middle of the chunk
            and no ``[chunk, chunk, K]`` tensor is formed.
        chunk_size: Tokens per chunk.
    Source: arXiv 2510.26692, chunkwise form with pairwise decay ratios (exponents masked before ``exp``).
    """
    batch, length = q.shape[:2]
    if segments is None:
        segments = Segments([length] * batch, device=q.device)
    elif batch != 1 or segments.num_tokens != length:
        raise ValueError(
            f"packed input must be one row of {segments.num_tokens} tokens, got {batch} rows of {length}"
        )
    number = len(segments.lengths)
    x = _prepare(q, k, v, log_decay, erase, write, state, scale, number=number)
    layout = segments.chunks(chunk_size)

    def to_chunks(tensor: Tensor) -> Tensor:
        """``[B, T, H, D]`` to ``[chunks, H, C, D]``; padding is zero and so an identity step."""
        flat = torch.cat([tensor.flatten(0, 1), tensor.new_zeros(1, *tensor.shape[2:])])
        return flat[layout.source].unflatten(0, (-1, chunk_size)).transpose(1, 2)

    query, key, value = to_chunks(x.q), to_chunks(x.k), to_chunks(x.write * x.v)
    if x.log_decay is None:
        gate = key.new_zeros(*key.shape[:-1], 1)
    else:
        gate = to_chunks(x.log_decay).cumsum(dim=-2)
    factorise = log_decay_floor is not None and -log_decay_floor * chunk_size / 2 <= _SAFE_EXPONENT
    key_decayed, query_decayed = key * gate.exp(), query * gate.exp()
    attend = _decayed_products(query, key, gate, factorise).tril()
    if x.erase is None:
        update, correction = value, None
    else:
        erased = to_chunks(x.erase) * key
        mixing = _decayed_products(erased, key, gate, factorise).tril(-1)
        eye = torch.eye(chunk_size, dtype=mixing.dtype, device=mixing.device)
        sides = torch.cat([value, to_chunks(x.erase) * key_decayed], dim=-1)
        solved = torch.linalg.solve_triangular(eye + mixing, sides, upper=False, unitriangular=True)
        update, correction = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    tail = gate[..., -1:, :]
    key_to_end = (key * (tail - gate).exp()).transpose(-1, -2)
    carry = tail.exp().transpose(-1, -2)

    # split, not sliced: the backward of a slice writes a tensor of the whole size, at every step
    sides = (query_decayed, attend, update, carry, key_to_end, update if correction is None else correction)
    steps = zip(*(side.split(layout.active) for side in sides), strict=True) if layout.active else ()
    memory, outputs = x.state[layout.order], []
    for query_t, attend_t, update_t, carry_t, key_t, correction_t in steps:
        active = len(query_t)
        current = memory[:active] if active < number else memory
        residual = update_t if correction is None else update_t - correction_t @ current
        outputs.append(query_t @ current + attend_t @ residual)
        current = carry_t * current + key_t @ residual
        memory = current if active == number else torch.cat([current, memory[active:]])
    out = torch.cat(outputs) if outputs else value
    out = out.transpose(1, 2).flatten(0, 1)[layout.slot].unflatten(0, (batch, length))
    return OpOutput(out.to(v.dtype), memory[layout.rank])


def _decayed_products(left: Tensor, right: Tensor, gate: Tensor, factorise: bool) -> Tensor:
    """Compute ``sum_d left_id right_jd exp(G_i - G_j)_d`` for ``i >= j``; entries above the diagonal are void.

    Args:
        left, right: ``[chunks, H, C, K]``.
        gate: ``[chunks, H, C, K]`` or ``[chunks, H, C, 1]``, cumulative log-decay ``G``.
        factorise: Split the ratio into two factors; only when the exponents are known to be small.
    Returns: ``[chunks, H, C, C]``.
    """
    size = gate.shape[-2]
    above = torch.ones(size, size, dtype=torch.bool, device=gate.device).triu(1)
    if gate.shape[-1] == 1:
        ratio = (gate - gate.transpose(-1, -2)).masked_fill(above, 0.0).exp()
        return (left @ right.transpose(-1, -2)) * ratio
    if factorise:
        offset = gate - gate[..., size // 2 - 1 : size // 2, :].detach()
        return (left * offset.exp()) @ (right * (-offset).exp()).transpose(-1, -2)
    ratio = (gate[..., :, None, :] - gate[..., None, :, :]).masked_fill(above[..., None], 0.0).exp()
    return torch.einsum("nhid,nhjd,nhijd->nhij", left, right, ratio)


class _Inputs:
    """Inputs in the compute dtype, one head per output head, gates broadcast to channels where they vary."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, dtype: torch.dtype) -> None:
        self.q, self.k, self.v = (_expand_heads(tensor.to(dtype), heads) for tensor in (q, k, v))
        self.log_decay: Tensor | None = None
        self.erase: Tensor | None = None
        self.write: Tensor
        self.state: Tensor


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor,
    state: Tensor | None,
    scale: float | None,
    number: int | None = None,
) -> _Inputs:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = write.shape[2]
    x = _Inputs(q, k, v, heads, dtype)
    x.q = x.q * (q.shape[-1] ** -0.5 if scale is None else scale)
    x.log_decay = None if log_decay is None else _gate("log_decay", log_decay, q, heads, q.shape[-1], dtype)
    x.erase = None if erase is None else _gate("erase", erase, q, heads, q.shape[-1], dtype)
    x.write = _gate("write", write, q, heads, v.shape[-1], dtype)
    shape = (q.shape[0] if number is None else number, heads, q.shape[-1], v.shape[-1])
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"state must have shape {shape}, got {tuple(state.shape)}")
    x.state = q.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype)
    return x


def _expand_heads(tensor: Tensor, heads: int) -> Tensor:
    if heads % tensor.shape[2]:
        raise ValueError(f"{heads} heads are not a multiple of {tensor.shape[2]} grouped heads")
    return tensor.repeat_interleave(heads // tensor.shape[2], dim=2) if tensor.shape[2] != heads else tensor


def _gate(name: str, gate: Tensor, q: Tensor, heads: int, channels: int, dtype: torch.dtype) -> Tensor:
    if gate.dim() == 3:
        gate = gate[..., None]
    if gate.dim() != 4 or gate.shape[:2] != q.shape[:2] or gate.shape[-1] not in (1, channels):
        raise ValueError(
            f"{name} must be [B, T, H] or [B, T, H, {channels}] with B, T = {tuple(q.shape[:2])}, "
            f"got {tuple(gate.shape)}"
        )
    return _expand_heads(gate.to(dtype), heads)

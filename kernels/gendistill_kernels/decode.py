"""Run one decode step of a delta-rule layer, all that lies between its projections, in one launch.

Short convolution, L2 norm of q and k, decay gate, write strength, delta rule, RMSNorm and output gate, for a few new
tokens per sequence. Both states are updated in place and nothing but the output is allocated, so a CUDA graph can
hold the step.

A program owns one sequence and a group of state heads that shares no q, k or v head with another group. It alone
touches the convolution state of the group's channels, hence no program waits for another. Without a convolution
every state head is a group of its own.

Legend: N sequences, T new tokens, K key channels, V value channels, H heads of the state, C packed channels, W taps.
"""

# pyright: reportGeneralTypeIssues=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gendistill_kernels.configs import lookup
from gendistill_kernels.delta_chunk import Rule
from gendistill_kernels.delta_chunk_forward import log2_decay
from gendistill_kernels.launch import Launcher

# bytes of state above which caching it would only push out what other kernels read
_STREAM_FROM = 1 << 24


class Heads(NamedTuple):
    """Count the heads of q, k and v; each count divides that of the state."""

    q: int
    k: int
    v: int


class Convolution(NamedTuple):
    """Describe the short convolution of q, k and v.

    Attributes:
        weight: ``[C, W]``, contiguous; the last tap multiplies the current token.
        state: ``[N, C, W - 1]`` inputs before the first token, contiguous, in the dtype of the inputs or float32;
            updated in place. None for one tap.
        bias: ``[C]`` or None.
        activation: ``identity`` or ``silu``.
    """

    weight: Tensor
    state: Tensor | None
    bias: Tensor | None = None
    activation: Literal["identity", "silu"] = "identity"


class Finish(NamedTuple):
    """Describe what happens to the output of every head.

    Attributes:
        norm_weight: ``[V]`` of an RMSNorm over the head's channels, or None for no norm.
        norm_eps: Of that norm.
        gate: ``[N, T, H * V]`` raw output gate, or None.
        gate_activation: ``silu``, ``sigmoid`` or ``none``.
    """

    norm_weight: Tensor | None = None
    norm_eps: float = 1e-6
    gate: Tensor | None = None
    gate_activation: Literal["silu", "sigmoid", "none"] = "silu"


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    if ACTIVATION == "sigmoid":
        return tl.sigmoid(x)
    return x


@triton.jit
def _load(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_taps(weight, bias, past, channels, inside, W: tl.constexpr):
    """Load what the convolution of some channels needs besides new tokens: past inputs, factors and bias."""
    window, factors, offset = (), (), 0.0
    for tap in tl.static_range(W):
        factors += (_load(weight + channels * W + tap, inside),)
        if tap < W - 1:
            window += (_load(past + channels * (W - 1) + tap, inside),)
    if bias is not None:
        offset = _load(bias + channels, inside)
    return window, factors, offset


@triton.jit
def _convolve(window, factors, offset, W: tl.constexpr, ACTIVATION: tl.constexpr):
    if W == 0:
        y = window[0]
    else:
        y = window[0] * factors[0] + offset
        for tap in tl.static_range(1, W):
            y += window[tap] * factors[tap]
    return _activate(y, ACTIVATION)


@triton.jit
def _store_window(past, channels, window, inside, W: tl.constexpr):
    for slot in tl.static_range(W - 1):
        tl.store(past + channels * (W - 1) + slot, window[slot].to(past.dtype.element_ty), mask=inside)


@triton.jit
def _add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def decode_kernel(
    qkv, decay, beta, state, out, A_log, dt_bias, weight, bias, history, norm_weight, gate,
    qkv_row, qkv_token, decay_row, decay_token, beta_row, beta_token, gate_row, gate_token,
    scale, lower_bound, eps,
    T: tl.constexpr, H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, GROUPS: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, ACTIVATION: tl.constexpr,
    OUT_GATE: tl.constexpr, EVICTION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        # Programs are placed while the kernel before still runs, and wait here for all that it writes; so may those of
        # the kernel after. What waits is the same as without.
        gdc_wait()
        gdc_launch_dependents()
    GROUP: tl.constexpr = H // GROUPS
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    # the norm of an output that is computed in blocks waits for the last one
    LATE: tl.constexpr = (BLOCKS > 1) & (norm_weight is not None)
    sequence, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    past = history
    if W > 1:
        past += sequence * (((HQ + HK) * K + HV * V) * (W - 1))
    rows = tl.arange(0, BK)
    # Vectors are computed in tiles of their own, with no fewer elements than threads, and then handed to the layout
    # of the state: query, key, decay and an empty place for every row, value and gate for every column. In smaller
    # tiles every thread would load and compute all rows that its part of the state has.
    part, row = tl.arange(0, 4 * BK) % 4, tl.arange(0, 4 * BK) // 4
    is_qk, is_decay = (part < 2) & (row < K), (part == 2) & (row < K)
    half, column = tl.arange(0, 2 * BV) % 2, tl.arange(0, 2 * BV) // 2
    for member in range(GROUP):
        head = group * GROUP + member
        head_q, head_k, head_v = head // (H // HQ), head // (H // HK), head // (H // HV)
        qk_channels = tl.where(part == 0, head_q, HQ + head_k) * K + row
        rate = 0.0
        shift = 0.0
        if GATE != "none":
            rate = tl.load(A_log + head).to(tl.float32)
            shift = _load(dt_bias + head * K + row, is_decay)
        for block in range(BLOCKS):
            is_v = (half == 0) & (block * BV + column < V)
            is_end = (half == 1) & (block * BV + column < V)
            v_channels = (HQ + HK) * K + head_v * V + block * BV + column
            window_qk, factors_qk, offset_qk = _load_taps(weight, bias, past, qk_channels, is_qk, W)
            window_v, factors_v, offset_v = _load_taps(weight, bias, past, v_channels, is_v, W)
            gain = 1.0
            if norm_weight is not None:
                gain = _load(norm_weight + block * BV + column, is_end)
            columns = block * BV + tl.arange(0, BV)
            cells = (sequence * H + head) * (K * V) + rows[:, None] * V + columns[None, :]
            inside = (rows < K)[:, None] & (columns < V)[None, :]
            memory = tl.load(state + cells, mask=inside, other=0.0, eviction_policy=EVICTION)
            # What any thread has read may be overwritten from here on. Without this line ptxas also moves the loads of
            # the state behind the arithmetic of the vectors.
            tl.debug_barrier()
            for token in range(T):
                here = sequence * qkv_row + token * qkv_token
                window_qk += (_load(qkv + here + qk_channels, is_qk),)
                window_v += (_load(qkv + here + v_channels, is_v),)
                raw = _load(decay + sequence * decay_row + token * decay_token + head * K + row, is_decay)
                strength = tl.load(beta + sequence * beta_row + token * beta_token + head).to(tl.float32)
                end = gain
                if gate is not None and not LATE:
                    at_gate = gate + sequence * gate_row + token * gate_token + head * V + block * BV + column
                    end *= _activate(_load(at_gate, is_end), OUT_GATE)
                if SIGMOID:
                    strength = tl.sigmoid(strength)
                forget = tl.exp2(log2_decay(raw, rate, shift, lower_bound, GATE))
                qk = _convolve(window_qk, factors_qk, offset_qk, W, ACTIVATION)
                v = _convolve(window_v, factors_v, offset_v, W, ACTIVATION)
                window_qk, window_v = window_qk[1:], window_v[1:]

                even, odd = tl.split(tl.reshape(tl.where(part == 2, forget, qk), [BK, 2, 2]))
                q, forget = tl.split(even)
                k, _ = tl.split(odd)
                v, end = tl.split(tl.reshape(tl.where(half == 0, v, end), [BV, 2]))
                # lengths and angle in one sum; q and k meet the state as they are, and what they make is scaled
                scale_q, scale_k = scale, 1.0
                square_q, square_k, cross = tl.reduce((q * q, k * k, q * k), 0, _add_three)
                if NORM:
                    scale_q = scale * tl.rsqrt(square_q + 1e-6)
                    scale_k = tl.rsqrt(square_k + 1e-6)

                memory *= forget[:, None]
                # q meets the state before the update, which adds <q, k> times the new value: one sum over rows, not two
                both = tl.join(memory * k[:, None], memory * q[:, None])
                recalled, y = tl.split(tl.sum(both, 0))
                new = strength * (v - recalled * scale_k)
                y = (y + cross * scale_k * new) * scale_q
                memory += k[:, None] * (new * scale_k)[None, :]
                if not LATE:
                    if norm_weight is not None:
                        y *= tl.rsqrt(tl.sum(y * y, 0) / V + eps)
                    if norm_weight is not None or gate is not None:
                        y *= end
                place = ((sequence * T + token) * H + head) * V
                tl.store(out + place + columns, y.to(out.dtype.element_ty), mask=columns < V)
            if W > 1:
                # the last member that reads a channel moves its window on
                ends_q, ends_k = (head + 1) % (H // HQ) == 0, (head + 1) % (H // HK) == 0
                ends = tl.where(part == 0, ends_q, ends_k) & (block == BLOCKS - 1)
                _store_window(past, qk_channels, window_qk, is_qk & ends, W)
                _store_window(past, v_channels, window_v, is_v & ((head + 1) % (H // HV) == 0), W)
            tl.store(state + cells, memory, mask=inside, eviction_policy=EVICTION)
        if LATE:
            tl.debug_barrier()
            wide = tl.arange(0, triton.next_power_of_2(V))
            for token in range(T):
                at_out = out + ((sequence * T + token) * H + head) * V + wide
                y = _load(at_out, wide < V)
                y *= tl.rsqrt(tl.sum(y * y, 0) / V + eps) * _load(norm_weight + wide, wide < V)
                if gate is not None:
                    at_gate = gate + sequence * gate_row + token * gate_token + head * V + wide
                    y *= _activate(_load(at_gate, wide < V), OUT_GATE)
                tl.store(at_out, y.to(out.dtype.element_ty), mask=wide < V)


_decode = Launcher(decode_kernel)


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Say whether a kernel may be placed before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def decode_step(
    qkv: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    rule: Rule,
    heads: Heads,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    convolution: Convolution | None = None,
    finish: Finish | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Take every sequence a few tokens further; heads and channels of the inputs are contiguous, tokens need not be.

    Args:
        qkv: ``[N, T, C]`` projected q, k and v heads, before the convolution; ``C = (HQ + HK) * K + HV * V``. Head
            ``h`` of the state reads q head ``h // (H / HQ)``, and so on.
        decay: ``[N, T, H, K]``, as ``rule.gate`` says.
        beta: ``[N, T, H]``, as ``rule.sigmoid`` says.
        state: ``[N, H, K, V]`` float32, contiguous; updated in place.
        rule: What the inputs mean; here one strength both erases and writes.
        heads: How many heads ``qkv`` packs.
        A_log, dt_bias: ``[H]`` and ``[H * K]`` float32, of the gate; None without one.
        convolution: None has none.
        finish: Norm and gate of the output; None has neither.
        out: ``[N, T, H, V]`` in ``qkv.dtype``, contiguous, to write to.
    Raises:
        ValueError: The rule is another one of the family.
    Returns:
        ``[N, T, H, V]`` in ``qkv.dtype``.
    """
    if decay.ndim != 4 or rule.erase != "scalar" or rule.write != "scalar":
        raise ValueError(
            "decode_step takes a decay per channel and one strength that erases and writes, got"
            f' {decay.ndim} axes of decay, erase "{rule.erase}" and write "{rule.write}"; use chunk_forward'
        )
    N, T = qkv.shape[:2]
    H, K, V = state.shape[1:]
    if out is None:
        out = torch.empty(N, T, H, V, dtype=qkv.dtype, device=qkv.device)
    if not out.numel():
        return out
    weight = None if convolution is None else convolution.weight
    W = 0 if weight is None else weight.shape[1]
    finish = finish or Finish()
    BK, wide = (max(16, triton.next_power_of_2(channels)) for channels in (K, V))
    config = lookup(qkv.device, "decode", BK, wide, qkv.dtype.itemsize)
    BV = min(wide, max(16, config.block // BK))
    groups = math.gcd(*heads) if W > 1 else H
    warps = min(config.warps, max(1, BK * BV // 1024))
    overlap = _can_overlap(qkv.device)
    _decode[(N * groups,)](
        qkv, decay, beta, state, out, A_log, dt_bias,
        weight, convolution and convolution.bias, convolution and convolution.state,
        finish.norm_weight, finish.gate,
        *qkv.stride()[:2], *decay.stride()[:2], *beta.stride()[:2],
        *((0, 0) if finish.gate is None else finish.gate.stride()[:2]),
        K**-0.5 if rule.scale is None else rule.scale, rule.lower_bound, finish.norm_eps,
        T=T, H=H, HQ=heads.q, HK=heads.k, HV=heads.v, K=K, V=V, BK=BK, BV=BV, W=W, GROUPS=groups,
        GATE=rule.gate, NORM=rule.norm, SIGMOID=rule.sigmoid,
        ACTIVATION="identity" if convolution is None else convolution.activation,
        OUT_GATE=finish.gate_activation,
        EVICTION="evict_first" if state.numel() * 4 > _STREAM_FROM else "",
        OVERLAP=overlap, launch_pdl=overlap,
        num_warps=warps, num_stages=config.stages, maxnreg=config.registers if warps == config.warps else None,
    )  # fmt: skip
    return out

"""Run one decode step of a delta-rule layer: all that lies between its projections.

Short convolution, L2 norm of q and k, decay gate, write strength, delta rule, RMSNorm and output gate, for a few new
tokens per sequence. Both states are updated in place and nothing but the output is allocated, except for what heads
share, so a CUDA graph can hold the step.

A program owns one head of one sequence's state, and takes all of its value channels that its registers hold at once. If
no head shares its q, k or v with another, it also convolves them and moves the convolution's state on: one launch. Else
programs would have to wait for each other before they do, so a small launch before convolves every channel once, while
the programs of the second load their states.

A step of as many rows as a graph was recorded for has rows without a sequence. Programs of such a row read whether it
lives and store zeros, but leave its states alone.

Legend: N sequences, T new tokens, K key channels, V value channels, H heads of the state, C packed channels, W taps.
"""

# pyright: reportGeneralTypeIssues=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gendistill_kernels.delta.device import log2_decay
from gendistill_kernels.delta.rows import TABLE
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Rule, check_gate
from gendistill_kernels.runtime.hardware import can_overlap
from gendistill_kernels.runtime.launch import Fixed, Kind, Launcher, check_devices, on_its_device
from gendistill_kernels.runtime.lookup import cached
from gendistill_kernels.runtime.memory import Workspace

_TENSORS = (
    "q", "k", "v", "decay", "beta", "state", "out", "A_log", "dt_bias",
    *(f"the convolution's {kind} of {part}" for kind in ("weight", "bias") for part in "qkv"),
    "the convolution's state", "norm_weight", "gate", "lives",
)  # fmt: skip
_VIEWS = {"q", "k", "v", "decay", "beta", "gate"}
_STATES = {"state", "the convolution's state"}
# bytes of state above which caching it would only push out what other kernels read
_STREAM_FROM = 1 << 24


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
def _load_taps(weight, bias, past, inside, W: tl.constexpr):
    """Load what the convolution of some channels needs besides new tokens: past inputs, factors and bias."""
    window, factors, offset = (), (), 0.0
    for tap in tl.static_range(W):
        factors += (_load(weight + tap, inside),)
        if tap < W - 1:
            window += (_load(past + tap, inside),)
    if bias is not None:
        offset = _load(bias, inside)
    return window, factors, offset


@triton.jit
def _load_gates(decay, beta, gate, is_decay, is_end, exists):
    """Load a token's decay, write strength and output gate; all ones if there is no gate."""
    opened = 1.0
    raw = _load(decay, is_decay)
    strength = _load(beta, exists)
    if gate is not None:
        opened = _load(gate, is_end)
    return raw, strength, opened


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
def _store_window(past, window, inside, W: tl.constexpr):
    for slot in tl.static_range(W - 1):
        tl.store(past + slot, window[slot].to(past.dtype.element_ty), mask=inside)


@triton.jit
def _add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _apply_rule(memory, q, k, v, forget, strength, scale, NORM: tl.constexpr):
    """Take the state one token further; returns it and the output."""
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
    v_new = strength * (v - recalled * scale_k)
    y = (y + cross * scale_k * v_new) * scale_q
    memory += k[:, None] * (v_new * scale_k)[None, :]
    return memory, y


@triton.jit
def _store_zeros(out, sequence, head, T: tl.constexpr, H: tl.constexpr, V: tl.constexpr):
    wide = tl.arange(0, triton.next_power_of_2(V))
    for token in range(T):
        at_out = out + ((sequence * T + token) * H + head) * V + wide
        tl.store(at_out, tl.zeros_like(wide).to(out.dtype.element_ty), mask=wide < V)


@triton.jit
def _finish_last(
    out, norm_weight, gate, sequence, head, gate_row, gate_token, eps,
    T: tl.constexpr, H: tl.constexpr, V: tl.constexpr, OUT_GATE: tl.constexpr,
):  # fmt: skip
    """Normalise and gate the outputs of a head, all blocks of which have been stored."""
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


@triton.jit
def convolve_kernel(
    q_in, k_in, v_in, weight_q, weight_k, weight_v, bias_q, bias_k, bias_v, history, lives, q_out, k_out, v_out,
    q_row, q_token, k_row, k_token, v_row, v_token,
    T: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Convolve some of a sequence's packed channels, of which q has ``Q``, k ``K`` and v ``V``.

    Of a row without a sequence nothing is stored. To know that before anything is loaded would take as long as loading
    it: these states are small.
    """
    C: tl.constexpr = Q + K + V
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    sequence = (tl.program_id(0) // BLOCKS).to(tl.int64)
    channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside, is_q, is_k = channel < C, channel < Q, channel < Q + K
    in_k, in_v = channel - Q, channel - Q - K
    weight = tl.where(is_q, weight_q + channel * W, tl.where(is_k, weight_k + in_k * W, weight_v + in_v * W))
    bias = None
    if bias_q is not None:
        bias = tl.where(is_q, bias_q + channel, tl.where(is_k, bias_k + in_k, bias_v + in_v))
    new_q, new_k = q_in + sequence * q_row + channel, k_in + sequence * k_row + in_k
    new_v, past = v_in + sequence * v_row + in_v, history + (sequence * C + channel) * (W - 1)
    if OVERLAP:
        # Nothing above touches memory. The next kernel's programs may start, and read what was written before here.
        gdc_wait()
        gdc_launch_dependents()
    window, factors, offset = _load_taps(weight, bias, past, inside, W)
    x = _load(tl.where(is_q, new_q, tl.where(is_k, new_k, new_v)), inside)
    # as in decode_kernel
    goes_on = tl.program_id(1) == 0
    if lives is not None:
        goes_on = tl.load(lives + sequence)
    # what any thread has read may be overwritten from here on
    tl.debug_barrier()
    if goes_on:
        for token in range(T):
            window += (x,)
            y = _convolve(window, factors, offset, W, ACTIVATION)
            window = window[1:]
            row = sequence * T + token
            at_v = tl.where(is_k, k_out + row * K + in_k, v_out + row * V + in_v)
            tl.store(tl.where(is_q, q_out + row * Q + channel, at_v), y, mask=inside)
            if T > 1:
                after = tl.where(is_k, new_k + (token + 1) * k_token, new_v + (token + 1) * v_token)
                x = _load(tl.where(is_q, new_q + (token + 1) * q_token, after), inside & (token + 1 < T))
        _store_window(past, window, inside, W)


@triton.jit
def decode_kernel(
    q_in, k_in, v_in, decay, beta, state, out, A_log, dt_bias,
    weight_q, weight_k, weight_v, bias_q, bias_k, bias_v, history, norm_weight, gate, lives,
    q_row, q_token, k_row, k_token, v_row, v_token,
    decay_row, decay_token, beta_row, beta_token, gate_row, gate_token,
    scale, lower_bound, eps,
    T: tl.constexpr, H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, ACTIVATION: tl.constexpr,
    OUT_GATE: tl.constexpr, EVICTION: tl.constexpr, OVERLAP: tl.constexpr, CONVOLVED: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    # the norm of an output that is computed in blocks waits for the last one
    NORM_LAST: tl.constexpr = (BLOCKS > 1) & (norm_weight is not None)
    sequence, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    past = history
    if W > 1:
        # no head shares channels with another
        past += sequence * (H * (2 * K + V) * (W - 1))
    # Vectors are computed in tiles of their own, with no fewer elements than threads, and then handed to the layout
    # of the state: query, key, decay and an empty place for every row, value and gate for every column. In smaller
    # tiles every thread would load and compute all rows that its part of the state has.
    at_row, at_column = tl.arange(0, 4 * BK), tl.arange(0, 2 * BV)
    part, row, half, column = at_row % 4, at_row // 4, at_column % 2, at_column // 2
    is_q, is_row = part == 0, row < K
    is_qk, is_decay = (part < 2) & is_row, (part == 2) & is_row
    in_q, in_k = head // (H // HQ) * K + row, head // (H // HK) * K + row
    if OVERLAP and not CONVOLVED:
        # Programs are placed while the kernel before still runs, and wait here for all that it writes; so may those of
        # the kernel after. Nothing above touches memory.
        gdc_wait()
        gdc_launch_dependents()
    if lives is not None:
        # Where another launch convolves, this is read before that has ended, by the rule of the states below: whatever
        # a step is given was written before its first launch, whose programs have waited for it, and which writes
        # neither. Else it is read after the wait.
        goes_on = tl.load(lives + sequence, cache_modifier=".cg" if CONVOLVED else "")
        if not goes_on:
            if OVERLAP and CONVOLVED:
                # a kernel that ends has waited for all before it, whatever of it had work to do
                gdc_wait()
                gdc_launch_dependents()
            _store_zeros(out, sequence, head, T, H, V)
            return
    for block in range(BLOCKS):
        columns = block * BV + tl.arange(0, BV)
        rows, live = tl.arange(0, BK), columns < V
        cells = (sequence * H + head) * (K * V) + rows[:, None] * V + columns[None, :]
        inside = (rows < K)[:, None] & live[None, :]
        if CONVOLVED:
            # The kernel before starts this one when its own programs have waited for all that was written before it,
            # states too. Only the second cache is sure to have that; what cannot be said besides is what to evict.
            memory = tl.load(state + cells, mask=inside, other=0.0, cache_modifier=".cg")
            if OVERLAP:
                gdc_wait()
                gdc_launch_dependents()
        else:
            memory = tl.load(state + cells, mask=inside, other=0.0, eviction_policy=EVICTION)  # pyright: ignore[reportArgumentType]
        is_column = block * BV + column < V
        is_v, is_end = (half == 0) & is_column, (half == 1) & is_column
        in_v = head // (H // HV) * V + block * BV + column
        rate = 0.0
        shift = 0.0
        if GATE != "none":
            rate = tl.load(A_log + head).to(tl.float32)
            shift = _load(dt_bias + head * K + row, is_decay)
        gain = 1.0
        if norm_weight is not None:
            gain = _load(norm_weight + block * BV + column, is_end)
        new_decay = decay + sequence * decay_row + head * K + row
        new_beta, new_gate = beta + sequence * beta_row + head, None
        if gate is not None and not NORM_LAST:
            new_gate = gate + sequence * gate_row + head * V + block * BV + column
        raw, strength, opened = _load_gates(new_decay, new_beta, new_gate, is_decay, is_end, True)
        new_q, new_k = q_in + sequence * q_row + in_q, k_in + sequence * k_row + in_k
        new_v = v_in + sequence * v_row + in_v
        x_qk, x_v = _load(tl.where(is_q, new_q, new_k), is_qk), _load(new_v, is_v)
        at_qk, at_v, scale_qk, scale_v, shift_qk, shift_v = 0, 0, 0, 0, None, None
        if W > 0:
            scale_qk = tl.where(is_q, weight_q + in_q * W, weight_k + in_k * W)
            scale_v = weight_v + in_v * W
        if W > 1:
            at_qk = past + tl.where(is_q, in_q, H * K + in_k) * (W - 1)
            at_v = past + (2 * H * K + in_v) * (W - 1)
        if bias_q is not None:
            shift_qk, shift_v = tl.where(is_q, bias_q + in_q, bias_k + in_k), bias_v + in_v
        window_qk, factors_qk, offset_qk = _load_taps(scale_qk, shift_qk, at_qk, is_qk, W)
        window_v, factors_v, offset_v = _load_taps(scale_v, shift_v, at_v, is_v, W)
        # What any thread has read may be overwritten from here on.
        tl.debug_barrier()
        # It always is. ptxas moves loads behind arithmetic, so that one waits for another, but not past a branch.
        if tl.program_id(1) == 0:
            for token in range(T):
                window_qk += (x_qk,)
                window_v += (x_v,)
                end = gain
                if gate is not None and not NORM_LAST:
                    end *= _activate(opened, OUT_GATE)
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
                memory, y = _apply_rule(memory, q, k, v, forget, strength, scale, NORM)
                if not NORM_LAST:
                    if norm_weight is not None:
                        y *= tl.rsqrt(tl.sum(y * y, 0) / V + eps)
                    if norm_weight is not None or gate is not None:
                        y *= end
                cells_out = ((sequence * T + token) * H + head) * V + columns
                tl.store(out + cells_out, y.to(out.dtype.element_ty), mask=live)
                if T > 1:
                    after, more = token + 1, token + 1 < T
                    at_after = tl.where(is_q, new_q + after * q_token, new_k + after * k_token)
                    x_qk, x_v = _load(at_after, is_qk & more), _load(new_v + after * v_token, is_v & more)
                    if new_gate is not None:
                        new_gate += gate_token
                    new_decay += decay_token
                    new_beta += beta_token
                    raw, strength, opened = _load_gates(
                        new_decay, new_beta, new_gate, is_decay & more, is_end & more, more
                    )
            if W > 1:
                # values of other blocks were convolved with the same q and k
                _store_window(at_qk, window_qk, is_qk & (block == BLOCKS - 1), W)
                _store_window(at_v, window_v, is_v, W)
            tl.store(state + cells, memory, mask=inside, eviction_policy=EVICTION)
    if NORM_LAST:
        _finish_last(out, norm_weight, gate, sequence, head, gate_row, gate_token, eps, T, H, V, OUT_GATE)


_convolution, _decode = Launcher(convolve_kernel), Launcher(decode_kernel)


def _parts(name: str, packed: Tensor | Sequence[Tensor], sizes: list[int], dim: int) -> Sequence[Tensor]:
    """Return what belongs to q, k and v."""
    if not isinstance(packed, Tensor):
        return packed
    shape = list(packed.shape)
    if shape[dim] != sum(sizes):
        raise ValueError(f"{name} must be {[*shape[:dim], sum(sizes), *shape[dim + 1 :]]}, got {shape}")
    return packed.split(sizes, dim)


@on_its_device
def decode_step(
    qkv: Tensor | Sequence[Tensor],
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
    lives: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Take every sequence a few tokens further; heads and channels of the inputs are contiguous, tokens need not be.

    Args:
        qkv: ``[N, T, C]`` projected q, k and v heads, before the convolution, ``C = (HQ + HK) * K + HV * V``; or
            ``[N, T, HQ * K]``, ``[N, T, HK * K]`` and ``[N, T, HV * V]``, of one dtype. Head ``h`` of the state reads
            q head ``h // (H / HQ)``, and so on.
        decay: ``[N, T, H, K]``, as ``rule.gate`` says.
        beta: ``[N, T, H]``, as ``rule.sigmoid`` says.
        state: ``[N, H, K, V]`` float32, contiguous; updated in place.
        rule: What the inputs mean; here one strength both erases and writes.
        heads: How many heads ``qkv`` has.
        A_log, dt_bias: ``[H]`` and ``[H * K]`` float32, of the gate; None without one.
        convolution: None has none.
        finish: Norm and gate of the output; None has neither.
        lives: ``[N]`` bool, contiguous: rows that have a sequence. The output of others is zero and their states keep
            every bit, whatever those and the inputs hold. None: all.
        out: ``[N, T, H, V]`` in the dtype of ``qkv``, contiguous, to write to.
    Raises:
        ValueError: The rule is another one of the family, or tensors do not fit it or each other.
    Returns:
        ``[N, T, H, V]`` in the dtype of ``qkv``.
    """
    if decay.ndim != 4 or rule.erase != "scalar" or rule.write != "scalar":
        raise ValueError(
            "decode_step takes a decay per channel and one strength that erases and writes, got"
            f' {decay.ndim} axes of decay, erase "{rule.erase}" and write "{rule.write}"; use chunk_forward'
        )
    if state.ndim != 4:
        raise ValueError(f"state must be [N, H, K, V], got {list(state.shape)}")
    H, K, V = state.shape[1:]
    sizes = [heads.q * K, heads.k * K, heads.v * V]
    q, k, v = _parts("qkv", qkv, sizes, 2)
    N, T = q.shape[:2]
    if out is None:
        out = torch.empty(N, T, H, V, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    weights = biases = (None, None, None)
    if convolution is not None:
        weights = _parts("the convolution's weight", convolution.weight, sizes, 0)
        if convolution.bias is not None:
            biases = _parts("the convolution's bias", convolution.bias, sizes, 0)
    finish = finish or Finish()
    past = None if convolution is None else convolution.state
    tensors = (
        q, k, v, decay, beta, state, out, A_log, dt_bias, *weights, *biases, past, finish.norm_weight, finish.gate,
        lives,
    )  # fmt: skip
    plan = _plan(
        tuple(
            [
                None if part is None else (part.dtype, part.get_device(), part.shape, part.stride())
                for part in tensors
            ]
        ),
        heads,
        rule,
        q.device,
        "identity" if convolution is None else convolution.activation,
        finish.gate_activation,
        finish.norm_eps,
    )
    if plan.channels is not None:
        mixed = plan.channels.parts(plan.channels.allocate())
        _convolution[plan.convolution](*tensors[:3], *tensors[9:16], lives, *mixed, *plan.steps)
        # for the step there is no convolution
        tensors = *mixed, *tensors[3:9], *(None,) * 7, *tensors[16:]
    _decode[plan.decode](*tensors, *plan.numbers)
    return out


class Plan(NamedTuple):
    """The launches of steps of the same sizes.

    Attributes:
        decode, numbers: The step, and what it takes after the tensors.
        channels: Room for q, k and v, convolved by a launch of their own; None if the step does.
        convolution, steps: Of that launch, likewise.
    """

    decode: Fixed
    numbers: tuple[float, ...]
    channels: Workspace | None = None
    convolution: Fixed | None = None
    steps: tuple[int, ...] = ()


# shape, and how far it is from one element to the next, along every axis
Layout = tuple[Sequence[int], tuple[int, ...]]


@cached(256)
def _plan(
    about: tuple[tuple[torch.dtype, int, Sequence[int], tuple[int, ...]] | None, ...],
    heads: Heads,
    rule: Rule,
    device: torch.device,
    activation: str,
    gate_activation: str,
    norm_eps: float,
) -> Plan:
    """Plan steps of the same sizes; all that is given here is what they share, of tensors dtype, device and layout.

    Raises:
        ValueError: Tensors are on several devices, do not fit together, or are not laid out as the kernel reads them.
    """
    kinds: list[Kind | None] = [part and part[:2] for part in about]
    layouts: list[Layout | None] = [part and part[2:] for part in about]
    first = kinds[0]
    check_devices(_TENSORS, kinds, first=first)
    W = 0 if layouts[9] is None else layouts[9][0][1]
    N, T, H, K, V = _check(kinds, layouts, heads, rule, W)
    size = 2 if first is None else first[0].itemsize
    BK, wide = (max(16, triton.next_power_of_2(channels)) for channels in (K, V))
    config = TABLE.lookup(device, "decode", BK, wide, size)
    BV = min(wide, max(16, config.block // BK))
    # heads that share a channel would move its window on while others read it
    apart = W > 1 and min(heads) < H
    overlap = can_overlap(device)
    decode = Fixed(
        (N * H,),
        T=T, H=H, HQ=heads.q, HK=heads.k, HV=heads.v, K=K, V=V, BK=BK, BV=BV, W=0 if apart else W,
        GATE=rule.gate, NORM=rule.norm, SIGMOID=rule.sigmoid, ACTIVATION="identity" if apart else activation,
        OUT_GATE=gate_activation, EVICTION="evict_first" if N * H * K * V * 4 > _STREAM_FROM else "",
        OVERLAP=overlap, CONVOLVED=apart, launch_pdl=overlap,
        num_warps=min(config.warps, max(1, BK * BV // 1024)), num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    steps = [
        *itertools.chain(
            *((0, 0) if layout is None else layout[1][:2] for layout in (*layouts[:5], layouts[17]))
        )
    ]
    numbers = float(K**-0.5 if rule.scale is None else rule.scale), float(rule.lower_bound), float(norm_eps)
    if not apart:
        return Plan(decode, (*steps, *numbers))
    sizes = heads.q * K, heads.k * K, heads.v * V
    config = TABLE.lookup(device, "decode_convolution", BK, wide, size)
    block = min(config.block, triton.next_power_of_2(sum(sizes)))
    convolution = Fixed(
        (N * -(-sum(sizes) // block),),
        T=T, Q=sizes[0], K=sizes[1], V=sizes[2], BLOCK=block, W=W, ACTIVATION=activation,
        OVERLAP=overlap, launch_pdl=overlap,
        num_warps=min(config.warps, max(1, block // 32)), num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    channels = Workspace(
        {name: ((N, T, size), torch.float32) for name, size in zip("qkv", sizes, strict=True)}, device
    )
    mixed = itertools.chain(*((T * size, size) for size in sizes))
    return Plan(decode, (*mixed, *steps[6:], *numbers), channels, convolution, tuple(steps[:6]))


def _check(
    kinds: Sequence[Kind | None], layouts: Sequence[Layout | None], heads: Heads, rule: Rule, W: int
) -> tuple[int, int, int, int, int]:
    """Refuse what the kernel would read wrongly, or past its end; returns N, T, H, K and V."""
    q, state = layouts[0], layouts[5]
    assert q is not None
    assert state is not None
    (N, T), (H, K, V) = q[0][:2], state[0][1:]
    sizes = heads.q * K, heads.k * K, heads.v * V
    for name, number in heads._asdict().items():
        if number < 1 or H % number:
            raise ValueError(f"{number} heads of {name} do not divide the state's {H}")
    if W > 1 and layouts[15] is None:
        raise ValueError(f"the convolution's state must be given, [N, C, W - 1], for {W} taps")
    if rule.gate != "none":
        check_gate((N, T, H, K), *(None if part is None else (*part[0],) for part in layouts[7:9]))
    if kinds[5] is not None and kinds[5][0] != torch.float32:
        raise ValueError(f"state must be float32, got {str(kinds[5][0]).removeprefix('torch.')}")
    if kinds[18] is not None and kinds[18][0] != torch.bool:
        raise ValueError(f"lives must be bool, got {str(kinds[18][0]).removeprefix('torch.')}")
    shapes: list[tuple[int, ...] | None] = [
        *((N, T, size) for size in sizes), (N, T, H, K), (N, T, H), (N, H, K, V), (N, T, H, V), None, None,
        *((size, W) for size in sizes), *((size,) for size in sizes),
        (N, sum(sizes), W - 1), (V,), (N, T, H * V), (N,),
    ]  # fmt: skip
    for name, layout, shape in zip(_TENSORS, layouts, shapes, strict=True):
        if layout is None:
            continue
        found, strides = layout
        if shape is not None and tuple(found) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(found)}")
        # of these, tokens may be apart
        views = name in _VIEWS
        if not _is_dense(found[2:] if views else found, strides[2:] if views else strides):
            rule_of = (
                f"channels of {name} must be next to each other" if views else f"{name} must be contiguous"
            )
            why = ", it changes in place" if name in _STATES else ""
            raise ValueError(f"{rule_of}{why}, got {list(found)} with strides {list(strides)}")
    return N, T, H, K, V


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True

"""Run one decode step of a delta-rule layer, all that lies between its projections, in one launch.

Short convolution, L2 norm of q and k, decay gate, write strength, delta rule, RMSNorm and output gate, for a few new
tokens per sequence. Both states are updated in place and nothing but the output is allocated, so a CUDA graph can
hold the step.

A program owns one sequence and a group of state heads that shares no q, k or v head with another group. It alone
touches the convolution state of the group's channels, hence no program waits for another. It takes as many heads of the
group at once as its registers hold, and then the next. Without a convolution every state head is a group of its own.

Legend: N sequences, T new tokens, K key channels, V value channels, H heads of the state, C packed channels, W taps.
"""

# pyright: reportGeneralTypeIssues=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gendistill_kernels.delta.device import log2_decay
from gendistill_kernels.delta.rows import PROCESSORS, TABLE
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Rule, check_gate
from gendistill_kernels.runtime.hardware import can_overlap
from gendistill_kernels.runtime.launch import Fixed, Kind, Launcher, check_devices, on_its_device
from gendistill_kernels.runtime.lookup import cached

_TENSORS = (
    "q", "k", "v", "decay", "beta", "state", "out", "A_log", "dt_bias",
    *(f"the convolution's {kind} of {part}" for kind in ("weight", "bias") for part in "qkv"),
    "the convolution's state", "norm_weight", "gate",
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
def _load_token(
    q_in, k_in, v_in, decay, beta, gate, is_q, is_qk, is_v, is_decay, is_end, exists,
    q_token, k_token, v_token, decay_token, beta_token, gate_token, token,
):  # fmt: skip
    """Load what one token brings; all pointers are those of the sequence's first."""
    opened = 1.0
    x_qk = _load(tl.where(is_q, q_in + token * q_token, k_in + token * k_token), is_qk)
    x_v = _load(v_in + token * v_token, is_v)
    raw = _load(decay + token * decay_token, is_decay)
    strength = _load(beta + token * beta_token, exists)
    if gate is not None:
        opened = _load(gate + token * gate_token, is_end)
    return x_qk, x_v, raw, strength, opened


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


# Of one head tiles are [K, V] and vectors [K] or [V]; of ``M`` heads at once they have another axis before these. The
# next three give vectors the axes of such a tile: a number for every row, for every column, and one for each head.


@triton.jit
def _down(x, M: tl.constexpr):
    return x[:, None] if M == 1 else x[:, :, None]


@triton.jit
def _across(x, M: tl.constexpr):
    return x[None, :] if M == 1 else x[:, None, :]


@triton.jit
def _each(x, M: tl.constexpr):
    return x if M == 1 else x[:, None]


@triton.jit
def _add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _apply_rule(
    memory, q, k, v, forget, strength, scale, NORM: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Take the state one token further; returns it and the output."""
    # lengths and angle in one sum; q and k meet the state as they are, and what they make is scaled
    scale_q, scale_k = scale, 1.0
    square_q, square_k, cross = tl.reduce((q * q, k * k, q * k), ROWS, _add_three)
    if NORM:
        scale_q = _each(scale * tl.rsqrt(square_q + 1e-6), M)
        scale_k = _each(tl.rsqrt(square_k + 1e-6), M)

    memory *= _down(forget, M)
    # q meets the state before the update, which adds <q, k> times the new value: one sum over rows, not two
    both = tl.join(memory * _down(k, M), memory * _down(q, M))
    recalled, y = tl.split(tl.sum(both, ROWS))
    v_new = _each(strength, M) * (v - recalled * scale_k)
    y = (y + _each(cross, M) * scale_k * v_new) * scale_q
    memory += _down(k, M) * _across(v_new * scale_k, M)
    return memory, y


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
def decode_kernel(
    q_in, k_in, v_in, decay, beta, state, out, A_log, dt_bias,
    weight_q, weight_k, weight_v, bias_q, bias_k, bias_v, history, norm_weight, gate,
    q_row, q_token, k_row, k_token, v_row, v_token,
    decay_row, decay_token, beta_row, beta_token, gate_row, gate_token,
    scale, lower_bound, eps,
    T: tl.constexpr, H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, W: tl.constexpr, GROUPS: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, ACTIVATION: tl.constexpr,
    OUT_GATE: tl.constexpr, EVICTION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // GROUPS
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    # the norm of an output that is computed in blocks waits for the last one
    NORM_LAST: tl.constexpr = (BLOCKS > 1) & (norm_weight is not None)
    sequence, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    past = history
    if W > 1:
        past += sequence * (((HQ + HK) * K + HV * V) * (W - 1))
    # the axis of a tile's rows
    ROWS: tl.constexpr = 0 if M == 1 else 1  # pyright: ignore[reportAssignmentType]
    rows = tl.arange(0, BK)
    # Vectors are computed in tiles of their own, with no fewer elements than threads, and then handed to the layout
    # of the state: query, key, decay and an empty place for every row, value and gate for every column. In smaller
    # tiles every thread would load and compute all rows that its part of the state has.
    at_row, at_column = tl.arange(0, M * 4 * BK), tl.arange(0, M * 2 * BV)
    part, row, half, column = at_row % 4, at_row // 4 % BK, at_column % 2, at_column // 2 % BV
    # heads from the first that is taken at once: of a tile, of elements for rows, and of those for columns
    member, member_row, member_column = 0, 0, 0
    if M > 1:
        member, member_row, member_column = tl.arange(0, M), at_row // (4 * BK), at_column // (2 * BV)
    is_q = part == 0
    if OVERLAP:
        # Programs are placed while the kernel before still runs, and wait here for all that it writes; so may those of
        # the kernel after. Nothing above touches memory.
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, GROUP, M):
        start = group * GROUP + first
        head, head_row, head_column = start + member, start + member_row, start + member_column
        is_row, is_column = row < K, column < V
        exists = True
        if GROUP % M != 0:
            # the last are fewer
            exists = first + member < GROUP
            is_row, is_column = (
                is_row & (first + member_row < GROUP),
                is_column & (first + member_column < GROUP),
            )
        is_qk, is_decay = (part < 2) & is_row, (part == 2) & is_row
        in_q, in_k = head_row // (H // HQ) * K + row, head_row // (H // HK) * K + row
        rate = 0.0
        shift = 0.0
        if GATE != "none":
            if M == 1:
                rate = tl.load(A_log + head).to(tl.float32)
            else:
                rate = _load(A_log + head_row, is_decay)
            shift = _load(dt_bias + head_row * K + row, is_decay)
        for block in range(BLOCKS):
            is_v = (half == 0) & is_column & (block * BV + column < V)
            is_end = (half == 1) & is_column & (block * BV + column < V)
            in_v = head_column // (H // HV) * V + block * BV + column
            at_qk, at_v, scale_qk, scale_v, shift_qk, shift_v = 0, 0, 0, 0, None, None
            if W > 0:
                scale_qk = tl.where(is_q, weight_q + in_q * W, weight_k + in_k * W)
                scale_v = weight_v + in_v * W
            if W > 1:
                at_qk = past + tl.where(is_q, in_q, HQ * K + in_k) * (W - 1)
                at_v = past + ((HQ + HK) * K + in_v) * (W - 1)
            if bias_q is not None:
                shift_qk, shift_v = tl.where(is_q, bias_q + in_q, bias_k + in_k), bias_v + in_v
            window_qk, factors_qk, offset_qk = _load_taps(scale_qk, shift_qk, at_qk, is_qk, W)
            window_v, factors_v, offset_v = _load_taps(scale_v, shift_v, at_v, is_v, W)
            gain = 1.0
            if norm_weight is not None:
                gain = _load(norm_weight + block * BV + column, is_end)
            new_q, new_k = q_in + sequence * q_row + in_q, k_in + sequence * k_row + in_k
            new_v = v_in + sequence * v_row + in_v
            new_decay = decay + sequence * decay_row + head_row * K + row
            new_beta, new_gate = beta + sequence * beta_row + head, None
            if gate is not None and not NORM_LAST:
                new_gate = gate + sequence * gate_row + head_column * V + block * BV + column
            x_qk, x_v, raw, strength, opened = _load_token(
                new_q, new_k, new_v, new_decay, new_beta, new_gate, is_q, is_qk, is_v, is_decay, is_end, exists,
                q_token, k_token, v_token, decay_token, beta_token, gate_token, 0,
            )  # fmt: skip
            columns = block * BV + tl.arange(0, BV)
            cells, inside = rows[:, None] * V + columns[None, :], (rows < K)[:, None] & (columns < V)[None, :]
            if M == 1:
                cells, columns_out, live = head * (K * V) + cells, head * V + columns, columns < V
            else:
                cells, inside = head[:, None, None] * (K * V) + cells[None, :, :], inside[None, :, :]
                columns_out, live = head[:, None] * V + columns[None, :], (columns < V)[None, :]
            if GROUP % M != 0:
                inside, live = inside & exists[:, None, None], live & exists[:, None]
            cells += sequence * (H * K * V)
            memory = tl.load(state + cells, mask=inside, other=0.0, eviction_policy=EVICTION)
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

                    vectors, ends = tl.where(part == 2, forget, qk), tl.where(half == 0, v, end)
                    if M == 1:
                        vectors, ends = tl.reshape(vectors, [BK, 2, 2]), tl.reshape(ends, [BV, 2])
                    else:
                        vectors, ends = tl.reshape(vectors, [M, BK, 2, 2]), tl.reshape(ends, [M, BV, 2])
                    even, odd = tl.split(vectors)
                    q, forget = tl.split(even)
                    k, _ = tl.split(odd)
                    v, end = tl.split(ends)
                    memory, y = _apply_rule(memory, q, k, v, forget, strength, scale, NORM, ROWS, M)
                    if not NORM_LAST:
                        if norm_weight is not None:
                            y *= _each(tl.rsqrt(tl.sum(y * y, ROWS) / V + eps), M)
                        if norm_weight is not None or gate is not None:
                            y *= end
                    cells_out = (sequence * T + token) * (H * V) + columns_out
                    tl.store(out + cells_out, y.to(out.dtype.element_ty), mask=live)
                    if T > 1:
                        more = token + 1 < T
                        x_qk, x_v, raw, strength, opened = _load_token(
                            new_q, new_k, new_v, new_decay, new_beta, new_gate,
                            is_q, is_qk & more, is_v & more, is_decay & more, is_end & more, more & exists,
                            q_token, k_token, v_token, decay_token, beta_token, gate_token, token + 1,
                        )  # fmt: skip
                if W > 1:
                    # the last head that reads a channel moves its window on
                    ends_q, ends_k = (head_row + 1) % (H // HQ) == 0, (head_row + 1) % (H // HK) == 0
                    moves = tl.where(is_q, ends_q, ends_k) & (block == BLOCKS - 1)
                    _store_window(at_qk, window_qk, is_qk & moves, W)
                    _store_window(at_v, window_v, is_v & ((head_column + 1) % (H // HV) == 0), W)
                tl.store(state + cells, memory, mask=inside, eviction_policy=EVICTION)
        if NORM_LAST:
            _finish_last(out, norm_weight, gate, sequence, head, gate_row, gate_token, eps, T, H, V, OUT_GATE)


_decode = Launcher(decode_kernel)


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
        q, k, v, decay, beta, state, out, A_log, dt_bias, *weights, *biases, past, finish.norm_weight, finish.gate
    )  # fmt: skip
    launch, numbers = _plan(
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
    _decode[launch](*tensors, *numbers)
    return out


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
) -> tuple[Fixed, tuple[float, ...]]:
    """Plan steps of the same sizes; all that is given here is what they share, of tensors dtype, device and layout.

    Raises:
        ValueError: Tensors are on several devices, do not fit together, or are not laid out as the kernel reads them.
    Returns: The launch, and the numbers that it takes after the tensors.
    """
    kinds: list[Kind | None] = [part and part[:2] for part in about]
    layouts: list[Layout | None] = [part and part[2:] for part in about]
    first = kinds[0]
    check_devices(_TENSORS, kinds, first=first)
    W = 0 if layouts[9] is None else layouts[9][0][1]
    N, T, H, K, V = _check(kinds, layouts, heads, rule, W)
    size = 2 if first is None else first[0].itemsize
    BK, wide = (max(16, triton.next_power_of_2(channels)) for channels in (K, V))
    groups = math.gcd(*heads) if W > 1 else H
    config = TABLE.lookup(
        device, "decode" if groups == H else "decode_group", BK, wide, size, N * groups > PROCESSORS
    )
    BV = min(wide, max(16, config.block // BK))
    # heads of a group that a program takes at once
    members = 1 if wide > BV else min(triton.next_power_of_2(H // groups), max(1, config.block // (BK * BV)))
    warps = min(config.warps, max(1, members * BK * BV // 1024))
    overlap = can_overlap(device)
    launch = Fixed(
        (N * groups,),
        T=T, H=H, HQ=heads.q, HK=heads.k, HV=heads.v, K=K, V=V, BK=BK, BV=BV, M=members, W=W, GROUPS=groups,
        GATE=rule.gate, NORM=rule.norm, SIGMOID=rule.sigmoid, ACTIVATION=activation, OUT_GATE=gate_activation,
        EVICTION="evict_first" if N * H * K * V * 4 > _STREAM_FROM else "",
        OVERLAP=overlap, launch_pdl=overlap,
        num_warps=warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    steps = [(0, 0) if layout is None else layout[1][:2] for layout in (*layouts[:5], layouts[-1])]
    scale = float(K**-0.5 if rule.scale is None else rule.scale)
    return launch, (*itertools.chain(*steps), scale, float(rule.lower_bound), float(norm_eps))


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
    shapes: list[tuple[int, ...] | None] = [
        *((N, T, size) for size in sizes), (N, T, H, K), (N, T, H), (N, H, K, V), (N, T, H, V), None, None,
        *((size, W) for size in sizes), *((size,) for size in sizes),
        (N, sum(sizes), W - 1), (V,), (N, T, H * V),
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

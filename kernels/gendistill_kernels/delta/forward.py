"""Chunked gated delta rule, forward: kernels with no global synchronisation in between but the launch order.

``prepare`` works on every chunk of every head at once: normalises q and k, turns raw gates into decays, and solves the
chunk's unit lower-triangular system. ``prepare_levels`` does chunks again whose decay is out of range. ``scan`` walks
the chunks of a sequence, or span of one, in order and carries the state; ``carry`` joins spans.

The formulas and the words are in README.md, beside this file in the repository. Source: the general rule of
``gendistill.ops.recurrent_delta_rule``, cut into chunks; checked against it in float64.

Legend: C tokens of a chunk, K key channels, V value channels, H heads of the state.
"""

# pyright: reportGeneralTypeIssues=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
import triton
import triton.language as tl

from gendistill_kernels.delta.device import (
    chunk_bounds,
    decay_of_tokens,
    exp2,
    log2_decay,
    meet,
    part_of,
    scan_of,
    sigmoid,
)


@triton.jit
def _inverse_norm(at, live, K: tl.constexpr, BK: tl.constexpr):
    """Return one over the length of every row of channels."""
    channels = tl.arange(0, BK)
    x = tl.load(at + channels[None, :], mask=live[:, None] & (channels < K)[None, :], other=0.0).to(
        tl.float32
    )
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-6)


@triton.jit
def _norms(at_q, at_k, live, scale, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr):
    """Return the factors of the rows of q, with the scale, and of k."""
    norm_q = tl.zeros([C], tl.float32) + scale
    norm_k = tl.zeros([C], tl.float32) + 1.0
    if NORM:
        norm_q *= _inverse_norm(at_q, live, K, BK)
        norm_k *= _inverse_norm(at_k, live, K, BK)
    return norm_q, norm_k


@triton.jit
def _load_decay(at, inside, GATE: tl.constexpr):
    # nothing decays where there is no token or no channel
    if GATE != "none":
        return tl.load(at, mask=inside, other=float("-inf"))
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _decay_tile(raw, A_log, dt_bias, channels, K: tl.constexpr, head, lower_bound, GATE: tl.constexpr):
    bias = 0.0
    rate = 0.0
    if GATE != "none":
        bias = tl.load(dt_bias + head * K + channels, mask=channels < K, other=0.0).to(tl.float32)[None, :]
        rate = tl.load(A_log + head).to(tl.float32)
    # beyond this the decay is zero in float32, and sums of it stay finite in float16 products
    return tl.maximum(log2_decay(raw.to(tl.float32), rate, bias, lower_bound, GATE), -30000.0)


@triton.jit
def _load_pair(at_q, at_k, inside, channels):
    xq = tl.load(at_q + channels[None, :], mask=inside, other=0.0)
    return xq, tl.load(at_k + channels[None, :], mask=inside, other=0.0)


@triton.jit
def _normalised(xq, xk, norm_q, norm_k, DOT: tl.constexpr, OWN: tl.constexpr):
    """Return some channels of a chunk's q and k, and their factors; with ``OWN``, all channels, which tell these."""
    xq, xk = xq.to(tl.float32), xk.to(tl.float32)
    if OWN:
        norm_q *= tl.rsqrt(tl.sum(xq * xq, 1) + 1e-6)
        norm_k *= tl.rsqrt(tl.sum(xk * xk, 1) + 1e-6)
    return (xq * norm_q[:, None]).to(DOT), (xk * norm_k[:, None]).to(DOT), norm_q, norm_k


@triton.jit
def _eraser(xk, erase, at, live, channels, K: tl.constexpr, SIGMOID: tl.constexpr, ERASE: tl.constexpr):
    """Return the key that erases, but for a strength per token."""
    if ERASE == "channel":
        inside = live[:, None] & (channels < K)[None, :]
        gate = tl.load(erase + at[:, None] * K + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        if SIGMOID:
            gate = sigmoid(gate)
        xk = (xk.to(tl.float32) * gate).to(xk.dtype)
    return xk


@triton.jit
def _operands(
    at_q, at_k, at_g, norm_q, norm_k, live, A_log, dt_bias, channels, head, lower_bound,
    K: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Return q and k, normalised, and the log-decay of some channels of a chunk."""
    inside = live[:, None] & (channels < K)[None, :]
    raw = _load_decay(at_g + channels[None, :], inside, GATE)
    log_decay = _decay_tile(raw, A_log, dt_bias, channels, K, head, lower_bound, GATE)
    xq, xk = _load_pair(at_q, at_k, inside, channels)
    xq, xk, _, _ = _normalised(xq, xk, norm_q, norm_k, DOT, False)
    return xq, xk, log_decay.to(DOT)


@triton.jit
def _strength(beta, at, live, SIGMOID: tl.constexpr, DIVIDES: tl.constexpr):
    strength = tl.load(beta + at, mask=live, other=0.0).to(tl.float32)
    if SIGMOID:
        strength = tl.where(live, sigmoid(strength), 0.0)
    elif DIVIDES:
        # the backward pass divides by it
        strength = tl.where(live, tl.maximum(strength, 1e-20), 0.0)
    return strength


@triton.jit
def _invert(lower, rows, DOT: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Invert one plus a strictly lower triangular matrix."""
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, tl.where(meet(rows, 0), -lower, 0.0))
    for level in tl.range(1, LEVELS):
        joint = tl.where(meet(rows, level), lower, 0.0).to(DOT)
        step = tl.dot(joint, inverse.to(DOT), input_precision=PRECISION)
        inverse -= tl.dot(inverse.to(DOT), step.to(DOT), input_precision=PRECISION)
    return inverse


@triton.jit
def prepare_kernel(
    q, k, decay, beta, A_log, dt_bias, sums,
    qd, kd, kt, A_qk, inverse_out, totals, betas, norms, marks,
    chunk_starts, chunk_lengths, tokens, scale, lower_bound, erase,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, SQ: tl.constexpr, SK: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
    LEVELS: tl.constexpr, W: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, RANGE: tl.constexpr,
    WIDE: tl.constexpr, ERASE: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """Prepare every chunk in one product, and mark those whose decay is out of its range."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = chunk_bounds(chunk, tokens, chunk_starts, chunk_lengths, C, PACKED)
    rows, part = tl.arange(0, C), tl.arange(0, W)
    live = rows < length
    token = start + rows
    tile = chunk * H + head
    at_q = q + token[:, None] * SQ + (head // (H // HQ)) * K
    at_k = k + token[:, None] * SK + (head // (H // HK)) * K
    at_g = decay + (token * H + head)[:, None] * K
    if beta is not None:
        strength = _strength(beta, token * H + head, live, SIGMOID, SAVE and ERASE == "tied")
    # loaded once if one iteration of the loop takes all channels
    OWN: tl.constexpr = NORM and W == BK
    norm_q, norm_k = _norms(at_q, at_k, live, scale, K, BK, C, NORM and not OWN)
    if beta is not None:
        tl.store(betas + tile * C + rows, strength)

    row = (tile * C).to(tl.int32)
    attention = tl.zeros([C, C], tl.float32)
    lower = tl.zeros([C, C], tl.float32)
    lowest = tl.zeros([C], tl.float32)
    if SCALAR:
        raw = tl.load(decay + token * H + head, mask=live, other=0.0).to(tl.float32)
        gates = decay_of_tokens(raw, live, A_log, dt_bias, head, lower_bound, GATE)
        upto = tl.sum(tl.where(rows[:, None] >= rows[None, :], gates[None, :], 0.0), 1)
        total = tl.sum(gates, 0)
    SHIFT: tl.constexpr = -RANGE / 2
    UNSHIFT: tl.constexpr = 2.0 ** (RANGE / 2)
    # a loop that is not unrolled: its code stays in the instruction cache
    for first in tl.range(0, BK, W):
        channels = first + part
        inside = live[:, None] & (channels < K)[None, :]
        if SCALAR:
            xq, xk = _load_pair(at_q, at_k, inside, channels)
            xq, xk, factor_q, factor_k = _normalised(xq, xk, norm_q, norm_k, DOT, OWN)
            xa = _eraser(xk, erase, token * H + head, live, channels, K, SIGMOID, ERASE)
            tl.store(totals + tile * BK + channels, total + tl.zeros([W], tl.float32))
            since = exp2(upto)
            qd.store([row, first], (xq.to(tl.float32) * since[:, None]).to(qd.dtype))
            if ERASE == "scalar":
                since *= strength
            if ERASE != "none":
                kd.store([row, first], (xa.to(tl.float32) * since[:, None]).to(qd.dtype))
            kt.store([row, first], (xk.to(tl.float32) * exp2(total - upto)[:, None]).to(qd.dtype))
            other = tl.trans(xk)
            attention = tl.dot(xq, other, attention, input_precision=PRECISION)
            if ERASE != "none":
                lower = tl.dot(xa, other, lower, input_precision=PRECISION)
        else:
            xq, xk = _load_pair(at_q, at_k, inside, channels)
            raw = _load_decay(at_g + channels[None, :], inside, GATE)
            if OWN:
                # without this line ptxas moves loads behind the arithmetic of others
                tl.debug_barrier()
            xq, xk, factor_q, factor_k = _normalised(xq, xk, norm_q, norm_k, DOT, OWN)
            log_decay = _decay_tile(raw, A_log, dt_bias, channels, K, head, lower_bound, GATE).to(DOT)
            xa = _eraser(xk, erase, token * H + head, live, channels, K, SIGMOID, ERASE)
            total = tl.sum(log_decay.to(tl.float32), 0)
            tl.store(totals + tile * BK + channels, total)
            upto = tl.dot(sums.load([(LEVELS + 1) * C, 0]), log_decay, input_precision=PRECISION)
            lowest = tl.minimum(lowest, tl.min(upto, 1))
            # the range of the operands is used on both sides of one: half of it is shifted to the reading factor
            factor = exp2(upto + SHIFT)
            back = exp2(-SHIFT - upto)
            read_q, read_k = (xq.to(tl.float32) * factor).to(WIDE), (xa.to(tl.float32) * factor).to(WIDE)
            # exact: a power of two
            qd.store([row, first], (read_q.to(tl.float32) * UNSHIFT).to(qd.dtype))
            if ERASE == "scalar":
                kd.store([row, first], (read_k.to(tl.float32) * (strength * UNSHIFT)[:, None]).to(qd.dtype))
            elif ERASE != "none":
                kd.store([row, first], (read_k.to(tl.float32) * UNSHIFT).to(qd.dtype))
            write = xk.to(tl.float32) * back
            other = tl.trans(write.to(WIDE))
            attention = tl.dot(read_q, other, attention, input_precision=PRECISION)
            if ERASE != "none":
                lower = tl.dot(read_k, other, lower, input_precision=PRECISION)
            kt.store([row, first], (write * exp2(total + SHIFT)[None, :]).to(qd.dtype))
        if SAVE and first == 0:
            tl.store(norms + tile * 2 * C + rows, factor_q)
            tl.store(norms + tile * 2 * C + C + rows, factor_k)

    if not SCALAR:
        # rows that are out of range come again; until then they must not spoil the inverse's other rows
        out = lowest < RANGE
        tl.store(marks + tile, tl.max(out.to(tl.int32), 0))
    i, j = rows[:, None], rows[None, :]
    if SCALAR:
        ratio = exp2(tl.where(i >= j, upto[:, None] - upto[None, :], 0.0))
        attention *= ratio
        lower *= ratio
    A_qk.store([row, 0], tl.where(i >= j, attention, 0.0).to(A_qk.dtype))
    if ERASE != "none":
        below = i > j
        if not SCALAR:
            below = below & (out[:, None] == 0)
        if ERASE == "channel":
            lower = tl.where(below, lower, 0.0)
        else:
            lower = tl.where(below, lower * strength[:, None], 0.0)
        inverse_out.store([row, 0], _invert(lower, rows, DOT, LEVELS, PRECISION).to(A_qk.dtype))


@triton.jit
def _add_level(
    attention, lower, level, mask, xq, xk, xa, log_decay, sums,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """Add the pairs of tokens of a level, both of whose decays are taken from the middle of a block."""
    small = exp2(tl.dot(sums.load([level * C, 0]), log_decay, input_precision=PRECISION)).to(DOT)
    left = xk * small
    scores = tl.dot(xq * small, tl.trans(left), input_precision=PRECISION)
    attention += tl.where(mask, scores, 0.0)
    if ERASE == "channel":
        scores = tl.dot(xa * small, tl.trans(left), input_precision=PRECISION)
    else:
        scores = tl.dot(left, tl.trans(left), input_precision=PRECISION)
    lower += tl.where(mask, scores, 0.0)
    return attention, lower


@triton.jit
def prepare_levels_kernel(
    q, k, decay, beta, A_log, dt_bias, sums, kt, A_qk, inverse_out, marks,
    chunk_starts, chunk_lengths, tokens, scale, lower_bound, erase,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, SQ: tl.constexpr, SK: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
    LEVELS: tl.constexpr, WHOLE: tl.constexpr, W: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    RANGE: tl.constexpr, WIDE: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """Prepare the marked chunks again; mark with two those with rows that go through all levels."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(marks + chunk * H + head) != 0:
        start, length = chunk_bounds(chunk, tokens, chunk_starts, chunk_lengths, C, PACKED)
        rows, part = tl.arange(0, C), tl.arange(0, W)
        i, j = rows[:, None], rows[None, :]
        live = rows < length
        token = start + rows
        tile = chunk * H + head
        at_q = q + token[:, None] * SQ + (head // (H // HQ)) * K
        at_k = k + token[:, None] * SK + (head // (H // HK)) * K
        at_g = decay + (token * H + head)[:, None] * K
        if beta is not None:
            strength = _strength(beta, token * H + head, live, SIGMOID, SAVE and ERASE == "tied")
        norm_q, norm_k = _norms(at_q, at_k, live, scale, K, BK, C, NORM)

        row = (tile * C).to(tl.int32)
        attention = tl.zeros([C, C], tl.float32)
        lower = tl.zeros([C, C], tl.float32)
        from_start = tl.zeros([C], tl.float32)
        from_block = tl.zeros([C], tl.float32)
        SHIFT: tl.constexpr = -RANGE / 2
        for first in tl.range(0, BK, W):
            channels = first + part
            xq, xk, log_decay = _operands(
                at_q,
                at_k,
                at_g,
                norm_q,
                norm_k,
                live,
                A_log,
                dt_bias,
                channels,
                head,
                lower_bound,
                K,
                GATE,
                DOT,
            )
            xa = _eraser(xk, erase, token * H + head, live, channels, K, SIGMOID, ERASE)
            upto = tl.dot(sums.load([(LEVELS + 1) * C, 0]), log_decay, input_precision=PRECISION)
            from_start = tl.minimum(from_start, tl.min(upto, 1))
            after = tl.dot(sums.load([LEVELS * C, 0]), log_decay, input_precision=PRECISION)
            kt.store([row, first], (xk.to(tl.float32) * exp2(after)).to(kt.dtype))
            upto = tl.dot(sums.load([(LEVELS + 2) * C, 0]), log_decay, input_precision=PRECISION)
            from_block = tl.minimum(from_block, tl.min(upto, 1))
            factor = exp2(upto + SHIFT)
            write = tl.trans((xk.to(tl.float32) * exp2(-SHIFT - upto)).to(WIDE))
            near = (i ^ j) < (1 << WHOLE)
            scores = tl.dot((xq.to(tl.float32) * factor).to(WIDE), write, input_precision=PRECISION)
            attention += tl.where(near & (i >= j), scores, 0.0)
            scores = tl.dot((xa.to(tl.float32) * factor).to(WIDE), write, input_precision=PRECISION)
            lower += tl.where(near & (i > j), scores, 0.0)
            for level in tl.range(WHOLE, LEVELS):
                attention, lower = _add_level(
                    attention,
                    lower,
                    level,
                    meet(rows, level),
                    xq,
                    xk,
                    xa,
                    log_decay,
                    sums,
                    C,
                    DOT,
                    PRECISION,
                    ERASE,
                )

        all_levels = from_block < RANGE
        if tl.max(all_levels.to(tl.int32), 0) != 0:
            tl.store(marks + tile, 2)
            attention = tl.where(all_levels[:, None], 0.0, attention)
            lower = tl.where(all_levels[:, None], 0.0, lower)
            for first in tl.range(0, BK, W):
                channels = first + part
                xq, xk, log_decay = _operands(
                    at_q, at_k, at_g, norm_q, norm_k, live, A_log, dt_bias, channels, head, lower_bound, K, GATE, DOT,
                )  # fmt: skip
                xa = _eraser(xk, erase, token * H + head, live, channels, K, SIGMOID, ERASE)
                own = tl.sum(xq.to(tl.float32) * xk.to(tl.float32), 1)
                attention += tl.where((i == j) & all_levels[:, None], own[:, None], 0.0)
                for level in tl.range(0, LEVELS):
                    attention, lower = _add_level(
                        attention, lower, level, meet(rows, level) & all_levels[:, None], xq, xk, xa, log_decay, sums,
                        C, DOT, PRECISION, ERASE,
                    )  # fmt: skip

        # only rows that are out of range themselves
        out = (from_start < RANGE)[:, None]
        if ERASE == "tied" or ERASE == "scalar":
            lower *= strength[:, None]
        if ERASE != "none":
            inverse = _invert(lower, rows, DOT, LEVELS, PRECISION)
        at = tile * C * C + i * C + j
        tl.store(A_qk + at, attention.to(A_qk.dtype.element_ty), mask=out)
        if ERASE != "none":
            tl.store(inverse_out + at, inverse.to(A_qk.dtype.element_ty), mask=out)


@triton.jit
def scan_kernel(
    qd, kd, kt, A_qk, inverse, totals, betas, v, state_in,
    out, state_out, h, v_new, matrices,
    scans, tokens, write, begins,
    H: tl.constexpr, HV: tl.constexpr, SV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BLOCKS: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr, SAVE: tl.constexpr,
    STAGES: tl.constexpr, SUMMARY: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr, ERASE: tl.constexpr,
    SIGMOID: tl.constexpr,
):  # fmt: skip
    """Scan one sequence, or if ``CUT`` a span; as ``SUMMARY`` find what it does to any state it may start from.

    A state S before the span becomes ``M S + c``: c is its end when it starts from zero, and the columns of M are
    its ends when it starts from those of the identity and writes no values. No output is made.

    Unless it is to ``SAVE``, a span that a sequence begins with starts from the sequence's own state, ``begins``, or
    zero, and what no carry reads is not written.
    """
    block, chain = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    head = chain % H
    sequence, start, length, first = scan_of(scans, chain // H, tokens, C, PACKED)
    channels = tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    rows = tl.arange(0, C)
    wide = columns < V
    VALUES: tl.constexpr = (V + BV - 1) // BV
    if SUMMARY:
        writes = block < VALUES
        columns = tl.where(writes, columns, columns - VALUES * BV)
        wide = columns < tl.where(writes, V, K)
        # No state is carried past the last span, nor a gradient past the first, which has no state to change unless
        # the sequence starts from one.
        kind, _ = part_of(scans, chain // H)
        carried = (kind == 3) | ((kind == 0) & (length > 0))
        idle = (
            (kind == 1)
            | ((kind == 2) & (writes | (not SAVE)))
            | ((kind == 3) & (not writes) & (not HAS_STATE))
        )
        length = tl.where(idle, 0, length)
    dtype = kt.dtype
    # the state is kept transposed, [V, K]: it is then the left operand of every product, straight from registers
    cells = (sequence * H + head) * K * V + channels[None, :] * V + columns[:, None]
    inside = (channels < K)[None, :] & wide[:, None]
    state = tl.zeros([BV, BK], tl.float32)
    if HAS_STATE and not SUMMARY:
        if CUT and not SAVE:
            kind, whole = part_of(scans, chain // H)
            carried = (kind == 2) | ((kind == 0) & (length > 0))
            state = tl.load(state_in + cells, mask=inside & carried, other=0.0).to(tl.float32)
            if begins is not None:
                own = cells + (whole - sequence) * H * K * V
                opens = (kind == 1) | (kind == 3)
                state += tl.load(begins + own, mask=inside & opens, other=0.0).to(tl.float32)
        else:
            state = tl.load(state_in + cells, mask=inside, other=0.0).to(tl.float32)
    if SUMMARY:
        state = tl.where((channels[None, :] == columns[:, None]) & (block >= VALUES), 1.0, 0.0)
    values = v + (start + rows)[:, None] * SV + (head // (H // HV)) * V + columns[None, :]
    zero = first * 0
    at_out = out + (start + rows)[:, None] * (H * V) + head * V + columns[None, :]
    if write is not None:
        gates = write + (start + rows)[:, None] * (H * V) + head * V + columns[None, :]
    # channels with values: what finds M has none
    full = wide
    if SUMMARY:
        full = wide & writes
    # Values are loaded a step ahead by hand: the compiler does so in registers, too, but asks for them last and
    # transposes them at once, with nothing to do while they come.
    coming = tl.load(values, mask=(rows < length)[:, None] & full[None, :], other=0.0)
    for step in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        tile = (first + step) * H + head
        row = (tile * C).to(tl.int32)
        live = (step * C + rows < length)[:, None] & full[None, :]
        offset = (step + zero) * C
        value = coming
        later = ((step + 1) * C + rows < length)[:, None] & full[None, :]
        coming = tl.load(values + (offset + C) * SV, mask=later, other=0.0)
        if ERASE != "none":
            keys = kd.load([row, 0])
            solve = inverse.load([row, 0])
        if write is None:
            strength = tl.load(betas + tile * C + rows)
        else:
            gate = tl.load(gates + offset * (H * V), mask=live, other=0.0).to(tl.float32)
            if SIGMOID:
                gate = sigmoid(gate)
        tail = kt.load([row, 0])
        gain = exp2(tl.load(totals + tile * BK + channels))
        left = state.to(dtype)
        if SAVE and not SUMMARY:
            wide_cells = tile * BK * V + columns[:, None] * BK + channels[None, :]
            tl.store(h + wide_cells, left, mask=wide[:, None])
        if ERASE == "tied":
            residual = tl.trans(value).to(tl.float32) - tl.dot(
                left, tl.trans(keys), input_precision=PRECISION
            )
            new = tl.dot((residual * strength[None, :]).to(dtype), tl.trans(solve), input_precision=PRECISION)
        else:
            if write is None:
                new = tl.trans(value).to(tl.float32) * strength[None, :]
            else:
                new = tl.trans((value.to(tl.float32) * gate).to(dtype)).to(tl.float32)
            if ERASE != "none":
                new -= tl.dot(left, tl.trans(keys), input_precision=PRECISION)
                new = tl.dot(new.to(dtype), tl.trans(solve), input_precision=PRECISION)
        new = new.to(dtype)
        if SAVE and not SUMMARY:
            flat = tile * C * V + rows[:, None] * V + columns[None, :]
            tl.store(v_new + flat, tl.trans(new), mask=wide[None, :])
        if not SUMMARY:
            queries = qd.load([row, 0])
            scores = A_qk.load([row, 0])
            result = tl.dot(left, tl.trans(queries), input_precision=PRECISION)
            result += tl.dot(new, tl.trans(scores), input_precision=PRECISION)
            tl.store(at_out + offset * (H * V), tl.trans(result).to(out.dtype.element_ty), mask=live)
        state = state * gain[None, :] + tl.dot(new, tail, input_precision=PRECISION)
    if SUMMARY:
        if not SAVE:
            inside = inside & carried
        if writes:
            tl.store(state_out + cells, state, mask=inside)
        else:
            cells = (sequence * H + head) * K * K + channels[None, :] * K + columns[:, None]
            tl.store(matrices + cells, state, mask=inside)
    else:
        if CUT:
            kind, whole = part_of(scans, chain // H)
            cells += (whole - sequence) * H * K * V
            inside = inside & ((kind == 1) | (kind == 2))
        tl.store(state_out + cells, state, mask=inside)


@triton.jit
def carry_kernel(
    matrices, ends, state_in, starts, first_spans,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_STATE: tl.constexpr, BACK: tl.constexpr, BEGINS: tl.constexpr,
):  # fmt: skip
    """Carry a state, or with ``BACK`` its gradient, over the spans of a sequence: ``S <- M S + c``.

    Every span is given what it starts from, the first one only if ``BEGINS``.
    """
    block, chain = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    sequence, head = (chain // H).to(tl.int64), chain % H
    first = tl.load(first_spans + sequence).to(tl.int64)
    count = tl.load(first_spans + sequence + 1) - first
    i, j = tl.arange(0, BK), tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    inside = (i < K)[:, None] & (columns < V)[None, :]
    square = (i < K)[:, None] & (j < K)[None, :]
    cells = i[:, None] * V + columns[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_STATE:
        given = inside & (count > (0 if BEGINS else 1))
        state = tl.load(state_in + (sequence * H + head) * K * V + cells, mask=given, other=0.0).to(
            tl.float32
        )
    if BEGINS:
        tile = (first + (count - 1 if BACK else 0)) * H + head
        tl.store(starts + tile * K * V + cells, state, mask=inside)
    for step in range(0, count - 1):
        span = first + (count - 1 - step if BACK else step)
        tile = span * H + head
        if BACK:
            at_matrix = j[None, :] * K + i[:, None]
        else:
            at_matrix = i[:, None] * K + j[None, :]
        matrix = tl.load(matrices + tile * K * K + at_matrix, mask=square, other=0.0)
        end = tl.load(ends + tile * K * V + cells, mask=inside, other=0.0)
        state = tl.dot(matrix, state, end, input_precision="tf32x3")
        tile = (span + (-1 if BACK else 1)) * H + head
        tl.store(starts + tile * K * V + cells, state, mask=inside)

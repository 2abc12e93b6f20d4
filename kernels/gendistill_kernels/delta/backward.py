"""Chunked gated delta rule, backward: a scan from the last chunk to the first, then one kernel per chunk.

``reverse_scan`` carries the gradient of the state and stores it after every chunk (``dh``), and the gradients of what
was left to write (``d_residuals``). ``values`` and ``keys`` then need nothing but their chunk; ``keys`` runs once more,
level by level, for chunks that are out of range. The sums add up heads that share keys or values, and the gate's
parameters over chunks.

The formulas and the words are in README.md, beside this file in the repository. Source: derived by hand, and checked
against float64 autograd of the reference.
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
    narrow,
    part_of,
    scan_of,
    sigmoid,
)

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def reverse_scan_kernel(
    qd, kd, kt, A_qk, inverse, totals, strength, grad_out, grad_state_out,
    dh, d_residuals, grad_state_in,
    scans, tokens,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr, HAS_GRAD: tl.constexpr, WANT_GRAD: tl.constexpr, STAGES: tl.constexpr,
    SUMMARY: tl.constexpr, CUT: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """Scan one sequence backwards, or if ``CUT`` a span; as ``SUMMARY`` only to find the gradient at its start."""
    block, chain = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    head = chain % H
    sequence, start, length, first = scan_of(scans, chain // H, tokens, C, PACKED)
    channels = tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    rows = tl.arange(0, C)
    wide = columns < V
    dtype = kt.dtype
    cells = (sequence * H + head) * K * V + channels[None, :] * V + columns[:, None]
    inside = (channels < K)[None, :] & wide[:, None]
    state = tl.zeros([BV, BK], tl.float32)
    if HAS_GRAD:
        state = tl.load(grad_state_out + cells, mask=inside, other=0.0).to(tl.float32)
    at_out = grad_out + (start + rows)[:, None] * (H * V) + head * V + columns[None, :]
    if SUMMARY:
        # no gradient is carried past the first span
        kind, _ = part_of(scans, chain // H)
        length = tl.where((kind == 1) | (kind == 3), 0, length)
    steps = tl.cdiv(length, C)
    for back in tl.range(0, steps, num_stages=STAGES):
        step = steps - 1 - back
        tile = (first + step) * H + head
        row = (tile * C).to(tl.int32)
        live = (step * C + rows < length)[:, None] & wide[None, :]
        incoming = tl.load(at_out + (step + first * 0) * C * (H * V), mask=live, other=0.0)
        scores = A_qk.load([row, 0])
        tail = kt.load([row, 0])
        if ERASE != "none":
            solve = inverse.load([row, 0])
        queries = qd.load([row, 0])
        if ERASE != "none":
            keys = kd.load([row, 0])
        gain = exp2(tl.load(totals + tile * BK + channels))
        if ERASE == "tied":
            beta = tl.load(strength + tile * C + rows)
        left = state.to(dtype)
        if not SUMMARY:
            wide_cells = tile * BK * V + columns[:, None] * BK + channels[None, :]
            tl.store(dh + wide_cells, left, mask=wide[:, None])
        upstream = tl.trans(incoming)
        new = tl.dot(upstream, scores) + tl.dot(left, tl.trans(tail))
        if ERASE != "none":
            d_residual = tl.dot(new.to(dtype), solve)
        else:
            d_residual = new
        if not SUMMARY:
            flat = tile * C * V + rows[:, None] * V + columns[None, :]
            tl.store(d_residuals + flat, tl.trans(d_residual).to(dtype), mask=wide[None, :])
        state = state * gain[None, :] + tl.dot(upstream, queries)
        if ERASE == "tied":
            state -= tl.dot((d_residual * beta[None, :]).to(dtype), keys)
        elif ERASE != "none":
            state -= tl.dot(d_residual.to(dtype), keys)
    if WANT_GRAD:
        if CUT and not SUMMARY:
            kind, whole = part_of(scans, chain // H)
            cells += (whole - sequence) * H * K * V
            inside = inside & ((kind == 1) | (kind == 3))
        tl.store(grad_state_in + cells, state, mask=inside)


@triton.jit
def _inverse_power_of_2(x):
    """Return the inverse of the power of two that a positive number is one to two times of; one for 0, inf and NaN."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where((exponent == 0) | (exponent == 255), 127, exponent)
    return (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def values_kernel(
    v, strength, out, grad_out, v_new, d_residuals,
    dv, db, d_scores, d_lower, units, rows_out,
    chunk_starts, chunk_lengths, tokens, write, d_write,
    H: tl.constexpr, HV: tl.constexpr, SV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, SIGMOID: tl.constexpr, PACKED: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """Do what only depends on values: dv, the gradient of the strength, and those of the chunk's two score matrices."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = chunk_bounds(chunk, tokens, chunk_starts, chunk_lengths, C, PACKED)
    rows, columns = tl.arange(0, C), tl.arange(0, BV)
    i, j = rows[:, None], rows[None, :]
    live = rows < length
    token = start + rows
    tile = chunk * H + head
    full = (columns < V)[None, :]
    wide = live[:, None] & full
    dtype = grad_out.dtype.element_ty

    flat = tile * C * V + i * V + columns[None, :]
    at_out = (token * H + head)[:, None] * V + columns[None, :]
    new = tl.load(v_new + flat, mask=full, other=0.0)
    d_residual = tl.load(d_residuals + flat, mask=full, other=0.0)
    if ERASE == "tied":
        amount = tl.load(strength + tile * C + rows)
        own = tl.sum(d_residual.to(tl.float32) * new.to(tl.float32), 1)
        if SIGMOID:
            d_amount = own * (1.0 - amount)
        else:
            d_amount = tl.where(live, own / tl.where(live, amount, 1.0), 0.0)
        tl.store(db + token * H + head, d_amount, mask=live)
        pull = (d_residual.to(tl.float32) * amount[:, None]).to(dtype)
        tl.store(dv + at_out, pull.to(dv.dtype.element_ty), mask=wide)
    else:
        own = tl.sum(d_residual.to(tl.float32) * new.to(tl.float32), 1)
        value = tl.load(
            v + token[:, None] * SV + (head // (H // HV)) * V + columns[None, :], mask=wide, other=0.0
        )
        d_gate = d_residual.to(tl.float32) * value.to(tl.float32)
        if write is None:
            amount = tl.load(strength + tile * C + rows)
            gate = amount[:, None]
            d_amount = tl.sum(d_gate, 1)
            if SIGMOID:
                d_amount *= amount * (1.0 - amount)
            tl.store(db + token * H + head, d_amount.to(db.dtype.element_ty), mask=live)
        else:
            gate = tl.load(write + at_out, mask=wide, other=0.0).to(tl.float32)
            if SIGMOID:
                gate = sigmoid(gate)
                d_gate *= gate * (1.0 - gate)
            tl.store(d_write + at_out, d_gate.to(d_write.dtype.element_ty), mask=wide)
        pull = d_residual
        tl.store(dv + at_out, (d_residual.to(tl.float32) * gate).to(dv.dtype.element_ty), mask=wide)
    upstream = tl.load(grad_out + at_out, mask=wide, other=0.0)
    if NORM:
        result = tl.load(out + at_out, mask=wide, other=0.0)
        along_q = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
        if ERASE == "tied":
            value = tl.load(
                v + token[:, None] * SV + (head // (H // HV)) * V + columns[None, :], mask=wide, other=0.0
            )
            along_k = 2.0 * own - amount * tl.sum(d_residual.to(tl.float32) * value.to(tl.float32), 1)
        else:
            along_k = 2.0 * own - tl.sum(d_residual.to(tl.float32) * value.to(tl.float32) * gate, 1)
        tl.store(rows_out + tile * 3 * C + C + rows, along_q)
        tl.store(rows_out + tile * 3 * C + 2 * C + rows, along_k)

    other = tl.trans(new)
    scores = tl.dot(upstream, other)
    tl.store(rows_out + tile * 3 * C + rows, tl.sum(tl.where(i == j, scores, 0.0), 1))
    squares = tile * C * C + i * C + j
    # The unit of what the kernel of the keys makes: pairs of tokens, and the states before and after the chunk. Of
    # these, ``own`` tells: a token alone in its chunk has no pairs.
    largest = tl.max(tl.maximum(tl.max(tl.where(i >= j, tl.abs(scores), 0.0), 1), tl.abs(own)), 0)
    scores = tl.where(i > j, scores, 0.0)
    if ERASE != "none":
        lower = tl.where(i > j, -tl.dot(pull, other), 0.0)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(lower), 1), 0))
    inverse_unit = _inverse_power_of_2(largest)
    tl.store(units + tile, inverse_unit)
    tl.store(d_scores + squares, (scores * inverse_unit).to(d_scores.dtype.element_ty))
    if ERASE != "none":
        tl.store(d_lower + squares, (lower * inverse_unit).to(d_scores.dtype.element_ty))


# The next three return the gradients of q, of the key that erases and of the key that writes, as they come from pairs
# of tokens and from the states before and after the chunk; what they add to that of G, and to that of the whole chunk's
# decay. If the keys are tied, the third has the second in it. All of it is times ``inverse_unit``, as the gradients of
# the score matrices are: what goes up and down by 2^s must be near one.


@triton.jit
def _pairs_of_tokens(
    scores, lower, upstream, d_residual, new, state, grad, x_q, x_k, x_a, amount, gain, upto, inverse_unit,
    C: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """With one decay per head: differences of sums of log-decays scale the pairs themselves."""
    rows = tl.arange(0, C)
    wide_type = scores.dtype
    both = tl.sum(state.to(tl.float32) * grad.to(tl.float32), 0) * inverse_unit * exp2(gain)
    ratio = exp2(tl.where(rows[:, None] > rows[None, :], upto[:, None] - upto[None, :], 0.0))
    near_q, near_k, near_a = x_q.to(wide_type), x_k.to(wide_type), x_a.to(wide_type)
    pairs = (scores.to(tl.float32) * ratio).to(wide_type)
    d_query = tl.dot(pairs, near_k)
    inner = tl.dot(tl.trans(pairs), near_q)
    d_read = d_query
    if ERASE != "none":
        below = (lower.to(tl.float32) * ratio).to(wide_type)
        d_read = tl.dot(below, near_k)
        inner = tl.dot(tl.trans(below), near_a, inner)
    since = exp2(upto)[:, None]
    d_query += tl.dot(upstream, state) * inverse_unit * since
    d_write = tl.dot(new, grad) * inverse_unit * exp2(gain[None, :] - upto[:, None])
    both += tl.sum(near_k.to(tl.float32) * d_write, 0)
    d_write += inner
    d_sum = near_q.to(tl.float32) * d_query - near_k.to(tl.float32) * d_write
    if ERASE == "tied":
        since *= amount[:, None]
    if ERASE != "none":
        d_read -= tl.dot(d_residual, state) * inverse_unit * since
        d_sum += near_a.to(tl.float32) * d_read
    if ERASE == "tied":
        d_write += d_read
    return d_query, d_read, d_write, d_sum, both


@triton.jit
def _pairs_in_range(
    scores, lower, upstream, d_residual, new, state, grad, x_q, x_k, x_a, amount, gain, upto, inverse_unit,
    ERASE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """In one product for all pairs of a chunk: ``2^s e^G`` and ``2^-s e^-G`` stay in the range of the operands.

    Gradients go up and down by 2^s on the way. Those of a chunk are divided by a power of two near the largest of them,
    so that with bfloat16 operands all above a 200,000th of it keep their bits.
    """
    SHIFT: tl.constexpr = -RANGE / 2
    UNSHIFT: tl.constexpr = 2.0 ** (RANGE / 2)
    wide_type = scores.dtype
    both = tl.sum(state.to(tl.float32) * grad.to(tl.float32), 0) * inverse_unit * exp2(gain)
    factor = exp2(upto + SHIFT)
    back = exp2(-SHIFT - upto)
    read_q = narrow(x_q.to(tl.float32) * factor, wide_type)
    read_k = narrow(x_a.to(tl.float32) * factor, wide_type)
    write = narrow(x_k.to(tl.float32) * back, wide_type)
    d_query = tl.dot(scores, write)
    d_read = d_query
    if ERASE != "none":
        d_read = tl.dot(lower, write)
    inner = tl.dot(tl.trans(scores), read_q)
    if ERASE != "none":
        inner = tl.dot(tl.trans(lower), read_k, inner)
    # two factors after another: their product may be out of range
    d_query += tl.dot(upstream, state) * inverse_unit * UNSHIFT
    if ERASE == "tied":
        d_read -= tl.dot(d_residual, state) * inverse_unit * (amount * UNSHIFT)[:, None]
    elif ERASE != "none":
        d_read -= tl.dot(d_residual, state) * inverse_unit * UNSHIFT
    d_write = tl.dot(new, grad) * inverse_unit * exp2(gain + SHIFT)[None, :]
    both += tl.sum(write.to(tl.float32) * d_write, 0)
    d_write += inner
    d_sum = read_q.to(tl.float32) * d_query - write.to(tl.float32) * d_write
    if ERASE != "none":
        d_sum += read_k.to(tl.float32) * d_read
    d_query, d_read, d_write = d_query * factor, d_read * factor, d_write * back
    if ERASE == "tied":
        d_write += d_read
    return d_query, d_read, d_write, d_sum, both


@triton.jit
def _pairs_by_level(
    scores, lower, at_upstream, wide, at_d_residual, at_new, full, at_state, at_grad, high,
    x_q, x_k, x_a, log_decay, amount, gain, upto, inverse_unit, sums, all_levels,
    C: tl.constexpr, LEVELS: tl.constexpr, WHOLE: tl.constexpr, ERASE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Level by level down to blocks of 16 tokens, which take one product as above; if ``all_levels``, to single tokens.

    Tiles are loaded one after another: together they would not fit in the registers, and what is saved in memory costs
    more, for shared memory leaves it no cache.
    """
    SHIFT: tl.constexpr = -RANGE / 2
    rows = tl.arange(0, C)
    i, j = rows[:, None], rows[None, :]
    wide_type = scores.dtype
    inner = tl.dot(sums.load([(LEVELS + 2) * C, 0]), log_decay) * tl.where(all_levels, 0.0, 1.0)
    factor, back = exp2(inner + SHIFT), exp2(-SHIFT - inner)
    near = (j - (i & -(1 << WHOLE))).to(tl.uint32) < (tl.where(all_levels, 0, 1 << WHOLE) + 0 * i).to(
        tl.uint32
    )
    near_scores = tl.where(near, scores, 0.0)
    read_q = narrow(x_q.to(tl.float32) * factor, wide_type)
    write = narrow(x_k.to(tl.float32) * back, wide_type)
    reads = tl.dot(near_scores, write)
    d_read = reads
    if ERASE != "none":
        near_lower = tl.where(near, lower, 0.0)
        read_k = narrow(x_a.to(tl.float32) * factor, wide_type)
        d_read = tl.dot(near_lower, write)
    inner = tl.dot(tl.trans(near_scores), read_q)
    if ERASE != "none":
        inner = tl.dot(tl.trans(near_lower), read_k, inner)
    d_sum = read_q.to(tl.float32) * reads - write.to(tl.float32) * inner
    if ERASE != "none":
        d_sum += read_k.to(tl.float32) * d_read
    d_query, d_read, d_write = factor * reads, factor * d_read, back * inner
    if ERASE == "tied":
        d_write += d_read

    state = tl.load(at_state, mask=high, other=0.0)
    factor = exp2(upto)
    reads = tl.dot(tl.load(at_upstream, mask=wide, other=0.0), state) * inverse_unit * factor
    d_sum += x_q.to(tl.float32) * reads
    d_query += reads
    if ERASE != "none":
        reads = tl.dot(tl.load(at_d_residual, mask=full, other=0.0), state) * inverse_unit * -factor
        if ERASE == "tied":
            reads *= amount[:, None]
        d_sum += x_a.to(tl.float32) * reads
        if ERASE == "tied":
            d_write += reads
        else:
            d_read += reads
    grad = tl.load(at_grad, mask=high, other=0.0)
    both = tl.sum(state.to(tl.float32) * grad.to(tl.float32), 0) * inverse_unit * exp2(gain)
    inner = tl.dot(tl.load(at_new, mask=full, other=0.0), grad) * inverse_unit
    inner *= exp2(tl.dot(sums.load([LEVELS * C, 0]), log_decay))
    both += tl.sum(x_k.to(tl.float32) * inner, 0)
    d_sum -= x_k.to(tl.float32) * inner
    d_write += inner

    # row i of a right half meets the left half of its block, and the other way round, so one product serves both
    # directions, each row taking part in one of them
    pairs = (scores + tl.trans(scores)).to(wide_type)
    if ERASE != "none":
        below = (lower + tl.trans(lower)).to(wide_type)
    for level in tl.range(tl.where(all_levels, 0, WHOLE), LEVELS, num_stages=2):
        half = (1 << level) + 0 * i
        decayed = exp2(tl.dot(sums.load([level * C, 0]), log_decay))
        # columns of the other half of the row's block
        other = (j - ((i & -half) ^ half)).to(tl.uint32) < half.to(tl.uint32)
        right = (i & half) != 0
        own_k = (x_k.to(tl.float32) * decayed).to(wide_type)
        if ERASE != "none":
            own = own_k
            if ERASE != "tied":
                own = tl.where(right, (x_a.to(tl.float32) * decayed).to(wide_type), own_k)
            inner = tl.dot(tl.where(other, below, 0.0), own)
            if ERASE == "tied":
                d_write += decayed * inner
            else:
                d_read += tl.where(right, decayed * inner, 0.0)
                d_write += tl.where(right, 0.0, decayed * inner)
            d_sum += tl.where(right, own.to(tl.float32), -own.to(tl.float32)) * inner
        own = tl.where(right, (x_q.to(tl.float32) * decayed).to(wide_type), own_k)
        inner = tl.dot(tl.where(other, pairs, 0.0), own)
        d_query += tl.where(right, decayed * inner, 0.0)
        d_write += tl.where(right, 0.0, decayed * inner)
        d_sum += tl.where(right, own.to(tl.float32), -own.to(tl.float32)) * inner
    return d_query, d_read, d_write, d_sum, both


@triton.jit
def _load_gate(
    decay, A_log, dt_bias, token, at, head, channels, live, inside,
    H: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """Return what the decays of a chunk are made of: raw values, the gate's bias and its rate."""
    bias = 0.0
    rate = 0.0
    if SCALAR:
        raw = tl.load(decay + token * H + head, mask=live, other=0.0).to(tl.float32)
        if GATE != "none":
            bias = tl.load(dt_bias + head).to(tl.float32)
            rate = tl.load(A_log + head).to(tl.float32)
    else:
        raw = tl.load(decay + at, mask=inside, other=0.0).to(tl.float32)
        if GATE != "none":
            bias = tl.load(dt_bias + head * K + channels, mask=channels < K, other=0.0).to(tl.float32)
            bias = bias[None, :]
            rate = tl.load(A_log + head).to(tl.float32)
    return raw, bias, rate


@triton.jit
def _log_decay(raw, rate, bias, inside, lower_bound, GATE: tl.constexpr):
    """Return base-2 log-decays of some channels; as ``forward`` computes them."""
    return tl.maximum(tl.where(inside, log2_decay(raw, rate, bias, lower_bound, GATE), 0.0), -30000.0)


@triton.jit
def _sum_of_later(d_sum, both, later, C: tl.constexpr, SCALAR: tl.constexpr, BY_LEVEL: tl.constexpr):
    """Return the gradients of log-decays, on which every later token of the chunk depends, and the state after it.

    The sum over tokens is a product with a 0/1 matrix, in two halves that together hold 16 bits; a scan where ptxas
    would lose that matrix.
    """
    if SCALAR:
        # of this part's channels alone: they are added up outside
        rows = tl.arange(0, C)
        of_token = tl.sum(d_sum, 1)
        d_decay = tl.sum(tl.where(rows[:, None] >= rows[None, :], of_token[:, None], 0.0), 0) + tl.sum(
            both, 0
        )
    elif BY_LEVEL:
        d_decay = tl.cumsum(d_sum, 0, reverse=True) + both[None, :]
    else:
        table = later.load([0, 0])
        first = narrow(d_sum, later.dtype)
        d_decay = tl.dot(table, first)
        d_decay = tl.dot(table, narrow(d_sum - first.to(tl.float32), later.dtype), d_decay) + both[None, :]
    return d_decay


@triton.jit
def _through_gate(d_decay, raw, bias, rate, g, lower_bound, GATE: tl.constexpr):
    """Return the gradients of a gate's raw values, and of the logarithm of its rate token by token."""
    if GATE == "bounded":
        s = sigmoid(tl.exp(rate) * (raw + bias))
        d_raw = d_decay * lower_bound * s * (1.0 - s) * tl.exp(rate)
        d_log = d_raw * (raw + bias)
    elif GATE == "softplus":
        d_raw = -d_decay * tl.exp(rate) * sigmoid(raw + bias)
        d_log = d_decay * g * LN2
    else:
        d_raw = d_decay
        d_log = d_decay
    return d_raw, d_log


def _name_of_keys(specialization):
    return "keys_levels_kernel" if specialization.constants["BY_LEVEL"] else "keys_kernel"


@triton.jit(repr=_name_of_keys)
def keys_kernel(
    q, k, decay, A_log, dt_bias, sums, later, total, norms, rows_in, d_scores, d_lower, units, strength, d_residuals,
    grad_out, h, dh, v_new, marks,
    dq, dk, dg, d_bias, d_rate,
    chunk_starts, chunk_lengths, tokens, scale, lower_bound, erase, d_erase,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, SQ: tl.constexpr, SK: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, LEVELS: tl.constexpr, WHOLE: tl.constexpr, W: tl.constexpr, SIGMOID: tl.constexpr,
    ERASE: tl.constexpr, SCALAR: tl.constexpr, RANGE: tl.constexpr, BY_LEVEL: tl.constexpr,
):  # fmt: skip
    """Do what belongs to ``W`` key channels of a chunk: dq, dk, and the gradients of their decays.

    Of chunks in range; with ``BY_LEVEL`` of the others, in blocks of 16 tokens or, where marked so, less.
    """
    # the parts of one chunk are neighbours: they read the same tiles
    PARTS: tl.constexpr = BK // W
    part, chunk, head = tl.program_id(0) % PARTS, (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(1)
    if not SCALAR:
        mark = tl.load(marks + chunk * H + head)
        mine = mark != 0 if BY_LEVEL else mark == 0
    # one decay per head has no chunk out of range; the compiler looks at nothing after a constant that decides
    if SCALAR or mine:
        if BY_LEVEL:
            all_levels = mark == 2
        start, length = chunk_bounds(chunk, tokens, chunk_starts, chunk_lengths, C, PACKED)
        rows = tl.arange(0, C)
        channels = part * W + tl.arange(0, W)
        i = rows[:, None]
        live = rows < length
        token = start + rows
        tile = chunk * H + head
        inside = live[:, None] & (channels < K)[None, :]
        at = (token * H + head)[:, None] * K + channels[None, :]

        # everything is asked for before anything is waited for
        at_q = token[:, None] * SQ + (head // (H // HQ)) * K + channels[None, :]
        at_k = token[:, None] * SK + (head // (H // HK)) * K + channels[None, :]
        squares = tile * C * C + i * C + rows[None, :]
        scores = tl.load(d_scores + squares)
        lower = scores
        if ERASE != "none":
            lower = tl.load(d_lower + squares)
        raw, bias, rate = _load_gate(
            decay, A_log, dt_bias, token, at, head, channels, live, inside, H, K, GATE, SCALAR
        )
        x_q = tl.load(q + at_q, mask=inside, other=0.0)
        x_k = tl.load(k + at_k, mask=inside, other=0.0)
        norm_q = tl.load(norms + tile * 2 * C + rows)
        norm_k = tl.load(norms + tile * 2 * C + C + rows)
        amount = norm_k
        if ERASE == "tied" or ERASE == "scalar":
            amount = tl.load(strength + tile * C + rows)
        if ERASE == "channel":
            gate = tl.load(erase + at, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(total + tile * BK + channels)
        inverse_unit = tl.load(units + tile)
        unit = _inverse_power_of_2(inverse_unit)
        columns = tl.arange(0, BV)
        full = (columns < V)[None, :]
        wide = live[:, None] & full
        at_out = (token * H + head)[:, None] * V + columns[None, :]
        flat = tile * C * V + i * V + columns[None, :]
        cells = tile * BK * V + columns[:, None] * BK + channels[None, :]
        high = (columns < V)[:, None]
        if not BY_LEVEL:
            upstream = tl.load(grad_out + at_out, mask=wide, other=0.0)
            d_residual = tl.load(d_residuals + flat, mask=full, other=0.0)
            new = tl.load(v_new + flat, mask=full, other=0.0)
            state = tl.load(h + cells, mask=high, other=0.0)
            grad = tl.load(dh + cells, mask=high, other=0.0)

        # what the forward pass multiplied
        if SCALAR:
            g = decay_of_tokens(raw, live, A_log, dt_bias, head, lower_bound, GATE)
        else:
            g = _log_decay(raw, rate, bias, inside, lower_bound, GATE)
            log_decay = narrow(g, DOT)
            if q.dtype.element_ty == tl.float32:
                # only then is the saved total not that of rounded log-decays, which have to cancel against it
                gain = tl.sum(log_decay.to(tl.float32), 0)
        x_q = narrow(x_q.to(tl.float32) * norm_q[:, None], DOT)
        x_k = narrow(x_k.to(tl.float32) * norm_k[:, None], DOT)
        x_a = x_k
        if ERASE == "scalar":
            gate = amount[:, None]
            x_a = (x_k.to(tl.float32) * gate).to(DOT)
        elif ERASE == "channel":
            if SIGMOID:
                gate = sigmoid(gate)
            x_a = (x_k.to(tl.float32) * gate).to(DOT)
        if SCALAR:
            upto = tl.sum(tl.where(rows[:, None] >= rows[None, :], g[None, :], 0.0), 1)
        else:
            upto = tl.dot(tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0).to(DOT), log_decay)

        # The order of what follows keeps apart in shared memory what is multiplied with different halves of the
        # chunk: ptxas 12.8 loses the address of a right factor that takes the place of an earlier left one.
        # A pair of tokens adds to d_sum of the later one what it takes from that of the earlier one, and a write what
        # it adds to the decay after it: the same rounded factors on both sides keep that exact.
        if SCALAR:
            d_query, d_read, d_key, d_sum, both = _pairs_of_tokens(
                scores, lower, upstream, d_residual, new, state, grad, x_q, x_k, x_a, amount, gain, upto,
                inverse_unit, C, ERASE,
            )  # fmt: skip
        elif BY_LEVEL:
            d_query, d_read, d_key, d_sum, both = _pairs_by_level(
                scores, lower, grad_out + at_out, wide, d_residuals + flat, v_new + flat, full,
                h + cells, dh + cells, high, x_q, x_k, x_a, log_decay, amount, gain, upto, inverse_unit, sums,
                all_levels, C, LEVELS, WHOLE, ERASE, RANGE,
            )  # fmt: skip
        else:
            d_query, d_read, d_key, d_sum, both = _pairs_in_range(
                scores, lower, upstream, d_residual, new, state, grad, x_q, x_k, x_a, amount, gain, upto,
                inverse_unit, ERASE, RANGE,
            )  # fmt: skip

        # the strength that erases
        if ERASE == "scalar" or ERASE == "channel":
            d_key += gate * d_read
            d_gate = x_k.to(tl.float32) * d_read * unit
            if ERASE == "channel":
                if SIGMOID:
                    d_gate *= gate * (1.0 - gate)
                tl.store(d_erase + at, d_gate.to(d_erase.dtype.element_ty), mask=inside)
            else:
                d_amount = tl.sum(d_gate, 1)
                if SIGMOID:
                    d_amount *= amount * (1.0 - amount)
                # one number per part of the channels, which are added up outside
                tl.store(d_erase + (token * H + head) * PARTS + part, d_amount, mask=live)

        # q and k; a token's own score is not decayed: it is added only now
        diagonal = tl.load(rows_in + tile * 3 * C + rows) * inverse_unit
        d_query += diagonal[:, None] * x_k.to(tl.float32)
        d_key += diagonal[:, None] * x_q.to(tl.float32)
        if NORM:
            # x_q is s times a unit vector, s the scale; its product with its gradient is <dO, O>
            along_q = tl.load(rows_in + tile * 3 * C + C + rows) * inverse_unit
            along_k = tl.load(rows_in + tile * 3 * C + 2 * C + rows) * inverse_unit
            d_query -= (along_q / (scale * scale))[:, None] * x_q.to(tl.float32)
            d_key -= along_k[:, None] * x_k.to(tl.float32)
        tl.store(dq + at, ((norm_q * unit)[:, None] * d_query).to(dq.dtype.element_ty), mask=inside)
        tl.store(dk + at, ((norm_k * unit)[:, None] * d_key).to(dk.dtype.element_ty), mask=inside)

        # the decay, and through its gate
        d_decay = _sum_of_later(d_sum, both, later, C, SCALAR, BY_LEVEL) * unit
        if BY_LEVEL:
            # not kept: there are too few registers
            raw = tl.load(decay + at, mask=inside, other=0.0).to(tl.float32)
            g = _log_decay(raw, rate, bias, inside, lower_bound, GATE)
        d_raw, d_log = _through_gate(d_decay, raw, bias, rate, g, lower_bound, GATE)
        if SCALAR:
            d_raw = tl.where(live, d_raw, 0.0)
            tl.store(dg + (token * H + head) * PARTS + part, d_raw, mask=live)
            if GATE != "none":
                tl.store(d_bias + tile * PARTS + part, tl.sum(d_raw, 0))
                tl.store(d_rate + tile * PARTS + part, tl.sum(tl.where(live, d_log, 0.0), 0))
        else:
            d_raw = tl.where(inside, d_raw, 0.0)
            tl.store(dg + at, d_raw.to(dg.dtype.element_ty), mask=inside)
            if GATE != "none":
                tl.store(d_bias + tile * K + channels, tl.sum(d_raw, 0), mask=channels < K)
                tl.store(d_rate + tile * PARTS + part, tl.sum(tl.sum(tl.where(inside, d_log, 0.0), 1), 0))


@triton.jit
def sum_heads_kernel(x, out, number, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add up float32 gradients of the ``GROUP`` heads that share one, in the order of the heads."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < number
    first = x + (at // WIDTH) * (GROUP * WIDTH) + at % WIDTH
    total = tl.load(first, mask=live, other=0.0)
    for head in tl.range(1, GROUP):
        total += tl.load(first + head * WIDTH, mask=live, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def _sum_chunks(
    x, out, block, chunks, N: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    columns, rows = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, chunks, ROWS):
        row = (first + rows).to(tl.int64)
        live = (row < chunks)[:, None] & (columns < N)[None, :]
        for part in tl.static_range(PARTS):
            total += tl.load(x + (row[:, None] * N + columns[None, :]) * PARTS + part, mask=live, other=0.0)
    tl.store(out + columns, tl.sum(total, 0), mask=columns < N)


@triton.jit
def sum_chunks_kernel(
    biases, rates, bias, rate, chunks,
    BIASES: tl.constexpr, BIAS_PARTS: tl.constexpr, RATES: tl.constexpr, RATE_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of the gate's parameters, ``[chunks, BIASES or RATES, parts]``, always in the same order."""
    block = tl.program_id(0)
    if block < tl.cdiv(BIASES, COLUMNS):
        _sum_chunks(biases, bias, block, chunks, BIASES, BIAS_PARTS, COLUMNS, ROWS)
    else:
        _sum_chunks(rates, rate, block - tl.cdiv(BIASES, COLUMNS), chunks, RATES, RATE_PARTS, COLUMNS, ROWS)

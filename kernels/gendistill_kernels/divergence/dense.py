"""Compare the logits of student and teacher over the whole vocabulary: every row's values, and the gradient in place.

A row is cut into slices, a program for each. A program reads its slice of both models once and keeps it in registers;
what the programs of a row must know of one another, maxima and sums, goes through memory. With s and t the logits of
student and teacher divided by the temperature T, less the largest of their row, Z_s and Z_t the sums of their
exponentials, and q, p the probabilities e^s / Z_s and e^t / Z_t::

    KL(P || Q) = sum p (t - s) - log Z_t + log Z_s        gradient for s:  q - p
    KL(Q || P) = sum q (s - t) - log Z_s + log Z_t                         q (s - t - log Z_s + log Z_t - KL(Q || P))
    JSD        = b sum p (x - y) - (1 - b) sum q y                         (1 - b) q (sum q y - y)
                 with x = log p - log q and y = log(1 + b (e^x - 1))
    CE         = log Z_s - s[label]                                        q - [j = label]

Values are multiplied by T^2, gradients for the undivided logits by T. A program sums with logits less the largest of
its slice; joining slices adds what that leaves out, and never subtracts large numbers that are nearly equal. KL(Q || P)
and the Jensen-Shannon divergence sum up when Z_s and Z_t are known, and so the row's programs meet a second time: what
their gradients subtract from a token's part is then rounded as that is, and a certain student's gradient is zero.

Programs of a row wait for each other. They take numbers in the order in which they start, row by row: those that one
waits for have started before it or are the next to start, and no row has more slices than a GPU runs programs.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false, reportOperatorIssue=false, reportArgumentType=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.divergence.layout import CE, FLOOR, JSD, KL, REVERSE_KL, Mix, gradient_in
from gendistill_kernels.divergence.rows import TABLE
from gendistill_kernels.runtime.hardware import INTERPRETED
from gendistill_kernels.runtime.launch import Launcher, on_its_device

_BITS = tl.constexpr(1.4426950408889634)
_NATS = tl.constexpr(0.6931471805599453)
_FLOOR = tl.constexpr(FLOOR)
_KL, _REVERSE_KL, _JSD, _CE = (tl.constexpr(kind) for kind in (KL, REVERSE_KL, JSD, CE))
# beyond exp(80) the true ratio of probabilities no longer matters, because the smaller of them is zero
_MOST = tl.constexpr(80.0)
# What the programs of a row tell each other. Of the row: both maxima. For every temperature: both sums of exponentials,
# and that of exp(t) (t - s). For every term: what is summed up after the first meeting.
_ROW, _TEMPERATURE, _TERM = tl.constexpr(2), tl.constexpr(3), tl.constexpr(2)


@triton.jit
def _floored(logits):
    """Make a number of minus infinity; NaN stays NaN."""
    return tl.where(logits < _FLOOR, _FLOOR, logits)


@triton.jit
def _expm1(x):
    """Compute e^x - 1, with full precision near zero."""
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7))
    series = 1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series))
    series = x * (1.0 + x * (1 / 2) * series)
    return tl.where(tl.abs(x) < 0.35, series, tl.exp2(x * _BITS) - 1.0)


@triton.jit
def _log1p(x):
    """Compute log(1 + x), with full precision near zero."""
    z = x / (2.0 + x)
    zz = z * z
    series = 2.0 * z * (1.0 + zz * (1 / 3 + zz * (1 / 5 + zz * (1 / 7 + zz * (1 / 9)))))
    return tl.where((x > -0.25) & (x < 0.4), series, tl.log2(1.0 + x) * _NATS)


@triton.jit
def _publish(partials, field, part, value, SLICES: tl.constexpr):
    tl.store(partials + field * SLICES + part, value)


@triton.jit
def _gather(partials, field, other, SLICES: tl.constexpr, WIDE: tl.constexpr):
    """Read a field of all programs of the row, past the first-level cache."""
    part = tl.arange(0, WIDE)
    return tl.load(partials + field * SLICES + part, mask=part < SLICES, other=other, cache_modifier=".cg")


@triton.jit
def _meet(arrivals, SLICES: tl.constexpr):
    """Wait until all programs of the row are here, and see what they have written."""
    tl.debug_barrier()
    tl.atomic_add(arrivals, 1, sem="acq_rel")
    while tl.atomic_add(arrivals, 0, sem="acquire") < SLICES:
        pass
    tl.debug_barrier()


@triton.jit
def _larger(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _join(tops_s, top_s, tops_t, top_t, z_s, z_t, forward, rate, PAIR: tl.constexpr):
    """Join the sums of all programs of a row, of logits less ``tops``, as if they were less ``top``.

    Returns Z_s and Z_t and the sum of exp(t) (t - s), undivided by T.
    """
    below_s = tops_s - top_s
    share_s = tl.exp2(below_s * rate) * z_s
    if PAIR:
        below_t = tops_t - top_t
        factor_t = tl.exp2(below_t * rate)
        forward = factor_t * (forward + z_t * (below_t - below_s))
        z_s, z_t, forward = tl.reduce((share_s, factor_t * z_t, forward), 0, _add_triples)
    else:
        z_s = tl.sum(share_s, 0)
        z_t, forward = z_s, z_s
    return z_s, z_t, forward


@triton.jit
def _log_ratio(s, t, top_s, z_s, top_t, z_t, inverse):
    """Compute log p - log q."""
    return ((t - top_t) - (s - top_s)) * inverse - (tl.log(z_t) - tl.log(z_s))


@triton.jit
def _mixture(x, beta):
    """Compute log(m / q) of a mixture m = beta p + (1 - beta) q, from x = log p - log q."""
    return _log1p(_expm1(x) * beta)


@triton.jit
def compare_kernel(
    student, teacher, targets, grad, values, partials, arrivals, num_rows, V, grad_stride,
    SLICES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
    INVERSES: tl.constexpr, RATES: tl.constexpr, PAIRS: tl.constexpr, FORWARD: tl.constexpr,
    KINDS: tl.constexpr, PLACES: tl.constexpr, FACTORS: tl.constexpr, SQUARES: tl.constexpr, BETAS: tl.constexpr,
    REUSE: tl.constexpr, SUMS: tl.constexpr, SECOND: tl.constexpr, RESULT: tl.constexpr, MEET: tl.constexpr,
):  # fmt: skip
    if MEET:
        number = tl.atomic_add(arrivals, 1, sem="relaxed")
    else:
        number = tl.program_id(0)
    row, part = (number // SLICES).to(tl.int64), number % SLICES
    partials += row * (FIELDS * SLICES)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    # all is on its way before anything is waited for
    if targets is not None:
        target = tl.load(targets + row)
    s = tl.load(student + row * V + column, mask=inside, other=_FLOOR)
    if teacher is not None:
        t = _floored(tl.load(teacher + row * V + column, mask=inside, other=_FLOOR))
    s = _floored(s)
    if targets is not None:
        # before anybody writes a gradient there; the first program alone writes values
        label = _floored(tl.load(student + row * V + target, mask=part == 0, other=0.0))

    if SUMS or REUSE:
        if teacher is not None:
            own_s, own_t = tl.reduce((s, t), 0, _larger)
        else:
            own_s = tl.max(s, 0)
    if SUMS:
        _publish(partials, 0, part, own_s, SLICES)
        if teacher is not None:
            _publish(partials, 1, part, own_t, SLICES)
        for i in tl.static_range(len(RATES)):
            first = _ROW + _TEMPERATURE * i
            e_s = tl.exp2((s - own_s) * RATES[i])
            if PAIRS[i]:
                e_t = tl.exp2((t - own_t) * RATES[i])
                if FORWARD[i]:
                    further = e_t * ((t - own_t) - (s - own_s))
                    z_s, z_t, forward = tl.reduce((e_s, e_t, further), 0, _add_triples)
                    _publish(partials, first + 2, part, forward, SLICES)
                else:
                    z_s, z_t = tl.reduce((e_s, e_t), 0, _add_pairs)
                _publish(partials, first + 1, part, z_t, SLICES)
            else:
                z_s = tl.sum(e_s, 0)
            _publish(partials, first, part, z_s, SLICES)
    if MEET:
        _meet(arrivals + 1 + 2 * row, SLICES)

    if SECOND or RESULT:
        # likewise, all that the first temperature needs
        tops_s = _gather(partials, 0, _FLOOR, SLICES, WIDE)
        z_s0 = _gather(partials, _ROW, 0.0, SLICES, WIDE)
        tops_t, z_t0, forward0 = tops_s, z_s0, z_s0
        if teacher is not None:
            tops_t = _gather(partials, 1, _FLOOR, SLICES, WIDE)
            if PAIRS[0]:
                z_t0 = _gather(partials, _ROW + 1, 0.0, SLICES, WIDE)
            if FORWARD[0]:
                forward0 = _gather(partials, _ROW + 2, 0.0, SLICES, WIDE)
            top_s, top_t = tl.reduce((tops_s, tops_t), 0, _larger)
        else:
            top_s = tl.max(tops_s, 0)
            top_t = top_s

    if SECOND:
        for k in tl.static_range(len(KINDS)):
            if KINDS[k] == _REVERSE_KL or KINDS[k] == _JSD:
                rate, first = RATES[PLACES[k]], _ROW + _TEMPERATURE * PLACES[k]
                z_s, z_t = z_s0, z_t0
                if PLACES[k] > 0:
                    z_s = _gather(partials, first, 0.0, SLICES, WIDE)
                    z_t = _gather(partials, first + 1, 0.0, SLICES, WIDE)
                z_s, z_t, _ = _join(tops_s, top_s, tops_t, top_t, z_s, z_t, z_t, rate, True)
                q = tl.exp2((s - top_s) * rate) * (1.0 / z_s)
                x = _log_ratio(s, t, top_s, z_s, top_t, z_t, INVERSES[PLACES[k]])
                field = _ROW + _TEMPERATURE * len(RATES) + _TERM * k
                if KINDS[k] == _REVERSE_KL:
                    _publish(partials, field, part, -tl.sum(q * x, 0), SLICES)
                else:
                    x = tl.where(x > _MOST, _MOST, x)
                    y = _mixture(x, BETAS[k])
                    p = tl.exp2((t - top_t) * rate) * (1.0 / z_t)
                    of_teacher, of_student = tl.reduce((p * (x - y), q * y), 0, _add_pairs)
                    _publish(partials, field, part, of_teacher, SLICES)
                    _publish(partials, field + 1, part, -of_student, SLICES)
        if MEET:
            _meet(arrivals + 2 + 2 * row, SLICES)

    if RESULT:
        g = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(len(RATES)):
            rate, first = RATES[i], _ROW + _TEMPERATURE * i
            z_s, z_t, forward = z_s0, z_t0, forward0
            if i > 0:
                z_s = _gather(partials, first, 0.0, SLICES, WIDE)
                if PAIRS[i]:
                    z_t = _gather(partials, first + 1, 0.0, SLICES, WIDE)
                if FORWARD[i]:
                    forward = _gather(partials, first + 2, 0.0, SLICES, WIDE)
            z_s, z_t, forward = _join(tops_s, top_s, tops_t, top_t, z_s, z_t, forward, rate, PAIRS[i])
            log_z = tl.log(z_s) - tl.log(z_t)
            if REUSE:
                # the exponentials that were summed, of logits less the largest of the slice
                q = tl.exp2((s - own_s) * rate) * (tl.exp2((own_s - top_s) * rate) / z_s)
                if PAIRS[i]:
                    p = tl.exp2((t - own_t) * rate) * (tl.exp2((own_t - top_t) * rate) / z_t)
            else:
                q = tl.exp2((s - top_s) * rate) * (1.0 / z_s)
                if PAIRS[i]:
                    p = tl.exp2((t - top_t) * rate) * (1.0 / z_t)
            for k in tl.static_range(len(KINDS)):
                if PLACES[k] == i:
                    if KINDS[k] == _KL:
                        value = log_z + INVERSES[i] * (forward / z_t)
                        g += FACTORS[k] * (q - p)
                    if KINDS[k] == _REVERSE_KL:
                        field = _ROW + _TEMPERATURE * len(RATES) + _TERM * k
                        value = tl.sum(_gather(partials, field, 0.0, SLICES, WIDE), 0)
                        g -= FACTORS[k] * q * (_log_ratio(s, t, top_s, z_s, top_t, z_t, INVERSES[i]) + value)
                    if KINDS[k] == _JSD:
                        field = _ROW + _TEMPERATURE * len(RATES) + _TERM * k
                        of_teacher = tl.sum(_gather(partials, field, 0.0, SLICES, WIDE), 0)
                        of_student = tl.sum(_gather(partials, field + 1, 0.0, SLICES, WIDE), 0)
                        value = of_teacher * BETAS[k] + of_student * (1.0 - BETAS[k])
                        x = _log_ratio(s, t, top_s, z_s, top_t, z_t, INVERSES[i])
                        x = tl.where(x > _MOST, _MOST, x)
                        g -= FACTORS[k] * (1.0 - BETAS[k]) * q * (_mixture(x, BETAS[k]) + of_student)
                    if KINDS[k] == _CE:
                        value = tl.log(z_s) - (label - top_s)
                        g += FACTORS[k] * (q - tl.where(column == target, 1.0, 0.0))
                    tl.store(values + k * num_rows + row, value * SQUARES[k], mask=part == 0)
        if grad is not None:
            tl.store(grad + row * grad_stride + column, g.to(grad.dtype.element_ty), mask=inside)


_compare = Launcher(compare_kernel)
# logits that a program can hold in registers, more or less
_MOST_BLOCK = 16384


def _constants(mix: Mix) -> dict[str, Any]:
    """Say what the kernel is compiled for: of every temperature, then of every term."""
    distinct = list(dict.fromkeys(mix.temperatures))
    places = tuple(distinct.index(one) for one in mix.temperatures)
    kinds = [
        {kind for kind, at in zip(mix.kinds, places, strict=True) if at == i} for i in range(len(distinct))
    ]
    return {
        "INVERSES": tuple(1 / one for one in distinct),
        "RATES": tuple(_BITS.value / one for one in distinct),
        "PAIRS": tuple(found != {CE} for found in kinds),
        "FORWARD": tuple(KL in found for found in kinds),
        "KINDS": mix.kinds,
        "PLACES": places,
        "FACTORS": tuple(weight * one for weight, one in zip(mix.weights, mix.temperatures, strict=True)),
        "SQUARES": tuple(one * one for one in mix.temperatures),
        "BETAS": mix.betas,
        # where the logits themselves are not needed again
        "REUSE": len(distinct) == 1 and not {REVERSE_KL, JSD} & {*mix.kinds},
    }


def _block(block: int, V: int, device: torch.device) -> int:
    """Choose how much of a row a program takes, so that all programs of a row surely run at the same time."""
    if device.type != "cuda":
        return block
    together = torch.cuda.get_device_properties(device).multi_processor_count
    while math.ceil(V / block) > together:
        block *= 2
        if block > _MOST_BLOCK:
            raise ValueError(
                f"{V:,} logits are too many for {together} processors of {device}, which hold {_MOST_BLOCK:,} each; "
                "use the reference"
            )
    return block


@on_its_device
def compare(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    mix: Mix,
    *,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum up every row's divergences; differentiate their weighted sum in the memory of the student's logits.

    Args:
        student: ``[N, V]`` float32 logits, contiguous; stay as they are without a gradient.
        teacher: ``[N, V]`` float32, contiguous; None for nothing but cross-entropies.
        targets: ``[N]`` int64, a column of each row.
        mix: What to sum.
        grad_dtype: Of the gradient, no wider than float32: ``layout.gradient_in`` says where it is. None for none.
    Returns:
        ``[terms, N]`` float32, unweighted.
    Raises:
        ValueError: Logits are not float32 and contiguous, or too many for this GPU.
    """
    for logits in (student, teacher):
        if logits is not None and (logits.dtype != torch.float32 or not logits.is_contiguous()):
            raise ValueError(
                f"logits must be float32 and contiguous, got {logits.dtype} of {logits.stride()}"
            )
    N, V = student.shape
    config = TABLE.lookup(student.device, "divergence_mixture" if JSD in mix.kinds else "divergence", 4)
    block = _block(config.block, V, student.device)
    slices, constants = math.ceil(V / block), _constants(mix)
    fields = _ROW.value + _TEMPERATURE.value * len(constants["RATES"]) + _TERM.value * len(mix.kinds)
    values = torch.empty(len(mix.kinds), N, dtype=torch.float32, device=student.device)
    partials = torch.empty(N, fields, slices, dtype=torch.float32, device=student.device)
    # programs that have started; for every row, those that have come to its first and second meeting
    arrivals = torch.zeros(1 + 2 * N, dtype=torch.int32, device=student.device)
    grad = None if grad_dtype is None else gradient_in(student, grad_dtype)
    second = bool({REVERSE_KL, JSD} & {*mix.kinds})
    stages = [(True, second, True)]
    if INTERPRETED:
        # programs run one after the other, and none can wait
        stages = [(True, False, False), *([(False, True, False)] if second else []), (False, False, True)]
    for sums, second, result in stages if N else []:
        _compare[(N * slices,)](
            student, teacher if mix.uses_teacher else None, targets if CE in mix.kinds else None,
            grad, values, partials, arrivals, N, V, 0 if grad is None else grad.stride(0),
            SLICES=slices, WIDE=triton.next_power_of_2(slices), BLOCK=block, FIELDS=fields, **constants,
            SUMS=sums, SECOND=second, RESULT=result, MEET=not INTERPRETED, num_warps=config.warps,
        )  # fmt: skip
    return values

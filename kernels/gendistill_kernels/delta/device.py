"""Small functions of the delta rule's kernels: numbers, gates, and where a program's share of the work lies."""

# pyright: reportGeneralTypeIssues=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
import os

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


# the interpreter knows no assembly; the compiler's own logarithm and reciprocal handle denormal numbers and take
# several times as many instructions
_ASSEMBLY: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def log2(x):
    """Compute the base-2 logarithm of a normal number to 2e-7."""
    if _ASSEMBLY:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.log2(x)


@triton.jit
def reciprocal(x):
    """Compute ``1 / x`` of a normal number to 1e-7 of its value; zero of infinity."""
    if _ASSEMBLY:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return 1.0 / x


@triton.jit
def exp2(x):
    """Compute ``2 ** x`` to 2e-7 of its value; zero below the normal numbers."""
    if _ASSEMBLY:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.exp2(x)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Convert float32 to the type of a product's operands, two at once: what is used again is not, by the compiler."""
    if _ASSEMBLY and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, True, 2)
    if _ASSEMBLY and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
    return x.to(DTYPE)


@triton.jit
def softplus_log2(x):
    """Compute ``log2(1 + exp(x))`` to 2e-5 of its value, small values too."""
    e = exp2(-LOG2E * tl.abs(x))
    series = e * (LOG2E - e * (LOG2E / 2 - e * (LOG2E / 3)))
    return LOG2E * tl.maximum(x, 0.0) + tl.where(e < 0.0078125, series, log2(1.0 + e))


@triton.jit
def sigmoid(x):
    """Compute ``1 / (1 + exp(-x))``."""
    return reciprocal(1.0 + exp2(-LOG2E * x))


@triton.jit
def log2_decay(raw, A_log, dt_bias, lower_bound, GATE: tl.constexpr):
    """Turn raw gate values into base-2 logarithms of the decay, float32, <= 0."""
    if GATE == "bounded":
        return (lower_bound * LOG2E) * sigmoid(tl.exp(A_log) * (raw + dt_bias))
    if GATE == "softplus":
        return -tl.exp(A_log) * softplus_log2(raw + dt_bias)
    return raw * LOG2E


@triton.jit
def chunk_bounds(chunk, tokens, chunk_starts, chunk_lengths, C: tl.constexpr, PACKED: tl.constexpr):
    """Return the first token of a chunk and how many it has."""
    if PACKED:
        return tl.load(chunk_starts + chunk).to(tl.int64), tl.load(chunk_lengths + chunk)
    per_row = tl.cdiv(tokens, C)
    first = (chunk % per_row) * C
    return (chunk // per_row) * tokens + first, tl.minimum(tokens - first, C).to(tl.int32)


@triton.jit
def scan_of(scans, number, tokens, C: tl.constexpr, PACKED: tl.constexpr):
    """Return a sequence or span to scan, its first token, how many it has, and its first chunk."""
    if PACKED:
        row = scans + number * 6
        sequence, start, first = tl.load(row), tl.load(row + 1), tl.load(row + 3)
        return sequence.to(tl.int64), start.to(tl.int64), tl.load(row + 2), first.to(tl.int64)
    sequence = number.to(tl.int64)
    return sequence, sequence * tokens, tokens, sequence * tl.cdiv(tokens, C)


@triton.jit
def part_of(scans, number):
    """Return which part of a sequence a span is, as ``Chunks.spans`` says, and the number of the sequence."""
    row = scans + number * 6
    return tl.load(row + 4), tl.load(row + 5)


@triton.jit
def meet(rows, level):
    """Say which columns meet row i of a right half at a level: those of the left half of its block."""
    half = 1 << level
    corner = rows & ~(2 * half - 1)
    width = tl.where((rows & half) != 0, half, 0)
    return (rows[None, :] - corner[:, None]).to(tl.uint32) < width[:, None].to(tl.uint32)


@triton.jit
def decay_of_tokens(raw, live, A_log, dt_bias, head, lower_bound, GATE: tl.constexpr):
    """Return base-2 log-decays of a head's tokens, ``[C]`` float32, zero where there is no token.

    Held above -256, where the decay is zero in float32, so that differences of their sums keep three digits.
    """
    bias = 0.0
    rate = 0.0
    if GATE != "none":
        bias = tl.load(dt_bias + head).to(tl.float32)
        rate = tl.load(A_log + head).to(tl.float32)
    return tl.maximum(tl.where(live, log2_decay(raw, rate, bias, lower_bound, GATE), 0.0), -256.0)

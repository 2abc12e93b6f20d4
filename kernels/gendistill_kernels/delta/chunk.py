"""Launch the chunked delta-rule kernels.

One family, each case of which is compiled by itself: the decay is one number per key channel or one per head; what a
write erases is nothing, or has one strength per head or one per key channel; what it writes has one per head or one per
value channel. One strength that both erases and writes, with a decay per channel, is Kimi Delta Attention, and with one
decay per head the gated delta rule; channels everywhere are GDN-2; without erase it is gated linear attention.

Tensors are ``[B, T, heads, channels]``, contiguous; q, k and v may be parts of wider tokens. The output, the gates and
the state have H heads; q, k and v may have fewer, and head h then reads their head ``h // (H / heads)``. Workspaces
hold one tile of 64 tokens per chunk and head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gendistill_kernels.delta.backward import (
    keys_kernel,
    reverse_scan_kernel,
    sum_chunks_kernel,
    sum_heads_kernel,
    values_kernel,
)
from gendistill_kernels.delta.forward import (
    carry_kernel,
    prepare_kernel,
    prepare_levels_kernel,
    scan_kernel,
)
from gendistill_kernels.delta.layout import CHUNK, Chunks, InferenceChunks
from gendistill_kernels.delta.plan import LEVELS, WHOLE, LaunchPlan, plan_launches
from gendistill_kernels.delta.rule import Gradients, Inputs, Rule, Saved
from gendistill_kernels.runtime import hardware
from gendistill_kernels.runtime.launch import Blocks, Fixed, Launcher, kinds_of, on_its_device
from gendistill_kernels.runtime.memory import Part

_prepare = Launcher(prepare_kernel)
_prepare_levels = Launcher(prepare_levels_kernel)
_scan = Launcher(scan_kernel)
_carry = Launcher(carry_kernel)
_reverse_scan = Launcher(reverse_scan_kernel)
_values = Launcher(values_kernel)
_keys = Launcher(keys_kernel)
_keys_levels = Launcher(keys_kernel)
_sum_heads = Launcher(sum_heads_kernel)
_sum_chunks = Launcher(sum_chunks_kernel)

# the interpreter multiplies bfloat16 wrongly
_WIDE = torch.float32 if hardware.INTERPRETED else torch.bfloat16


@functools.lru_cache(64)
def _rows(kind: type[Chunks], rows: int, tokens: int, span: int, device: torch.device) -> Chunks:
    return kind.of_rows(rows, tokens, device)


_UNPACKED = Chunks(None, None, None)


def _kind(save: bool) -> type[Chunks]:
    """Say what cuts up rows: those without gradients are cut into more spans."""
    return Chunks if save else InferenceChunks


def _plan(x: Inputs, rule: Rule, chunks: Chunks | None, *, save: bool = True) -> tuple[Inputs, LaunchPlan]:
    """Look up the plan of a call, and copy what of q, k and v the kernels cannot step through."""
    packed = None
    if chunks is not None:
        assert chunks.starts is not None
        assert chunks.sequences is not None
        spans = 0 if chunks.spans is None else chunks.spans.shape[0]
        packed = chunks.starts.shape[0], chunks.sequences.shape[0], spans, chunks.starts.get_device()
    found = plan_launches(
        tuple([None if part is None else (part.dtype, part.get_device(), part.shape) for part in x]),
        (x.q.stride(), x.k.stride(), x.v.stride()),
        x.q.device,
        rule,
        packed,
        # of packed sequences the table says it
        0 if chunks is not None else _kind(save).span(-(-x.q.shape[1] // CHUNK)),
        _WIDE,
        not hardware.INTERPRETED,
    )
    if None not in found.token_strides:
        return x, found
    even = [
        part if stride is not None else part.contiguous()
        for part, stride in zip((x.q, x.k, x.v), found.token_strides, strict=True)
    ]
    return _plan(x._replace(q=even[0], k=even[1], v=even[2]), rule, chunks, save=save)


@functools.cache
def _later(device: torch.device, dtype: torch.dtype) -> Blocks:
    """Make the 0/1 matrix that sums over a token and those after it."""
    # on the host first: a graph that is being captured would record this, not do it; a copy from the host it refuses
    return _tiles(torch.ones(CHUNK, CHUNK, dtype=dtype).triu().to(device))


@functools.cache
def _tables(device: torch.device, dtype: torch.dtype = torch.float16) -> Blocks:
    """Make 0/1 matrices, one under the other.

    Per level, what sums log-decays from the middle of a block to a token; the same from a token to the end of the
    chunk, from its start to the token, and from the start of the token's block of 2^WHOLE.
    """
    i, t = torch.arange(CHUNK)[:, None], torch.arange(CHUNK)[None, :]
    sums = []
    for level in range(LEVELS + 1):
        half = 1 << level
        # in the same half, on the inner side of the token: up to it in a right half, after it in a left one
        sums.append(((i ^ t) < half) & (((i & half) != 0) != (t > i)))
    sums += [t <= i, (t <= i) & ((i ^ t) < (1 << WHOLE))]
    return _tiles(torch.cat(sums).to(device=device, dtype=dtype))


def _tiles(whole: Tensor | Part, columns: int | None = None) -> Blocks:
    return Blocks(whole, (CHUNK, columns or whole.shape[-1]))


def _layout(plan: LaunchPlan, x: Inputs, chunks: Chunks | None, *, save: bool = True) -> Chunks:
    """Say where chunks and spans are."""
    if chunks is not None:
        return chunks if plan.spans else Chunks(*chunks[:3])
    if not plan.spans:
        return _UNPACKED
    return _rows(_kind(save), plan.n.B, plan.n.T, plan.span, x.q.device)


def _blocks(parts: Sequence[Part | None], columns: int | None = None) -> list[Blocks | None]:
    return [None if part is None else _tiles(part, columns) for part in parts]


@on_its_device
def chunk_forward(
    x: Inputs, rule: Rule, *, state: Tensor | None = None, chunks: Chunks | None = None, save: bool = False
) -> tuple[Tensor, Tensor, Saved | None]:
    """Run the delta rule over whole sequences.

    Args:
        x: Inputs.
        rule: What they mean.
        state: ``[N, H, K, V]`` float32, or None for zeros.
        chunks: Packed sequences (then ``B == 1``).
        save: Keep what the backward pass needs. Rows that are not packed are cut into more spans without.
    Raises:
        ValueError: There is no token, or the inputs do not fit the rule.
    Returns:
        ``[B, T, H, V]`` in ``v.dtype``, the final state ``[N, H, K, V]`` float32, and what was saved.
    """
    x, plan = _plan(x, rule, chunks, save=save)
    n = plan.n
    if not n.chunks:
        raise ValueError("chunk_forward needs at least one token")
    launches = plan.forward(save=save, state=kinds_of([state])[0])
    where = _layout(plan, x, chunks, save=save)
    out, state_out = launches.results.allocate()
    saved = Saved(launches.early.allocate(), launches.late.allocate())
    early = launches.early.parts(saved.early)
    total, strength, norms, h, v_new, matrices, marks = launches.late.parts(saved.late)
    *_, kt, scores, inverse = early
    tiles = _blocks(early)
    sums = _tables(plan.device, launches.operands)
    wide = tiles if launches.width == n.BK else [*_blocks(early[:3], launches.width), *tiles[3:]]
    _prepare[launches.prepare](
        x.q, x.k, x.decay, x.beta, x.A_log, x.dt_bias, sums, *wide, total, strength, norms, marks,
        where.starts, where.lengths, n.T, plan.scale, plan.lower_bound, x.erase,
    )  # fmt: skip
    if launches.prepare_levels is not None:
        _prepare_levels[launches.prepare_levels](
            x.q, x.k, x.decay, x.beta, x.A_log, x.dt_bias, sums,
            tiles[2] if launches.width_levels == n.BK else _tiles(kt, launches.width_levels), scores, inverse, marks,
            where.starts, where.lengths, n.T, plan.scale, plan.lower_bound, x.erase,
        )  # fmt: skip
    scans, begins = where.sequences, None
    if launches.span_states is not None:
        ends, starts = launches.span_states.parts(launches.span_states.allocate())
        scans = where.spans
        _scan[launches.summary](
            *tiles, total, strength, x.v, None,
            out, ends, None, None, matrices, scans, n.T, x.write, None,
        )  # fmt: skip
        _carry[launches.carry](matrices, ends, state, starts, where.first_spans)
        begins, state = None if save else state, starts
    _scan[launches.scan](
        *tiles, total, strength, x.v, state,
        out, state_out, h, v_new, None, scans, n.T, x.write, begins,
    )  # fmt: skip
    return out, state_out, saved if save else None


@on_its_device
def chunk_backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Inputs,
    rule: Rule,
    out: Tensor,
    saved: Saved | list[Tensor],
    *,
    chunks: Chunks | None = None,
    want_state: bool = False,
) -> Gradients:
    """Differentiate ``chunk_forward``.

    Args:
        grad_out: ``[B, T, H, V]``, contiguous.
        grad_state: ``[N, H, K, V]`` float32 gradient of the final state, or None.
        x, rule, chunks: As in the forward pass.
        out, saved: What it returned. A list of the latter's two is emptied, and so memory freed on the way.
        want_state: Whether the initial state needs a gradient.
    """
    x, plan = _plan(x, rule, chunks)
    early, late = saved
    scanned, grad_in = _backward_scan(
        grad_out, grad_state, x, plan, early, late, chunks, want_state=want_state
    )
    del early
    if isinstance(saved, list):
        saved.clear()
    return _backward_local(grad_out, x, plan, out, late, scanned, chunks)._replace(state=grad_in)


@on_its_device
def chunk_backward_scan(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Inputs,
    rule: Rule,
    saved: Saved,
    *,
    chunks: Chunks | None = None,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the first half of the backward pass, the last to need ``saved.early``.

    Returns:
        As bytes, gradients of the states after every chunk and of what was left to write, as
        ``layout.gradient_spaces`` lists them; and the gradient of the initial state, if wanted.
    """
    x, plan = _plan(x, rule, chunks)
    return _backward_scan(grad_out, grad_state, x, plan, *saved, chunks, want_state=want_state)


def _backward_scan(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Inputs,
    plan: LaunchPlan,
    early: Tensor,
    late: Tensor,
    chunks: Chunks | None,
    *,
    want_state: bool,
) -> tuple[Tensor, Tensor | None]:
    n, where = plan.n, _layout(plan, x, chunks)
    launches = plan.reverse_scan(*kinds_of([grad_out, grad_state]), want_state=want_state)
    (grad_in,), scanned = launches.results.allocate(), plan.gradients.allocate()
    dh, d_residuals = plan.gradients.parts(scanned)
    tiles = _blocks(plan.saved[0].parts(early))
    total, strength, *_, matrices, _ = plan.saved[1].parts(late)
    scans = where.sequences
    if launches.span_states is not None:
        heads, tails = launches.span_states.parts(launches.span_states.allocate())
        scans = where.spans
        _reverse_scan[launches.summary](
            *tiles, total, strength, grad_out, None,
            None, None, heads, scans, n.T,
        )  # fmt: skip
        _carry[launches.carry](matrices, heads, grad_state, tails, where.first_spans)
        grad_state = tails
    _reverse_scan[launches.scan](
        *tiles, total, strength, grad_out, grad_state,
        dh, d_residuals, grad_in, scans, n.T,
    )  # fmt: skip
    return scanned, grad_in


@on_its_device
def chunk_backward_local(
    grad_out: Tensor,
    x: Inputs,
    rule: Rule,
    out: Tensor,
    late: Tensor,
    scanned: Tensor,
    *,
    chunks: Chunks | None = None,
) -> Gradients:
    """Run the second half of the backward pass, every chunk by itself; the initial state's gradient stays None.

    ``late`` is ``Saved.late``, and ``scanned`` what the first half returned.
    """
    x, plan = _plan(x, rule, chunks)
    return _backward_local(grad_out, x, plan, out, late, scanned, chunks)


def _backward_local(
    grad_out: Tensor,
    x: Inputs,
    plan: LaunchPlan,
    out: Tensor,
    late: Tensor,
    scanned: Tensor,
    chunks: Chunks | None,
) -> Gradients:
    n, launches, where = plan.n, plan.local(*kinds_of([grad_out])), chunks or _UNPACKED
    total, strength, norms, h, v_new, _, marks = plan.saved[1].parts(late)
    dh, d_residuals = plan.gradients.parts(scanned)
    dq, dk, dv, d_decay, d_write, d_beta, d_erase = launches.results.allocate()
    d_bias, d_rate, scores, lower, units, rows = launches.work.parts(launches.work.allocate())
    _values[launches.values](
        x.v, strength, out, grad_out, v_new, d_residuals, dv, d_beta, scores, lower, units, rows,
        where.starts, where.lengths, n.T, x.write, d_write,
    )  # fmt: skip
    arguments = (
        x.q, x.k, x.decay, x.A_log, x.dt_bias, _tables(plan.device), _later(plan.device, plan.wide_any), total,
        norms, rows, scores, lower, units, strength, d_residuals, grad_out, h, dh, v_new, marks,
        dq, dk, d_decay, d_bias, d_rate, where.starts, where.lengths, n.T, plan.scale, plan.lower_bound,
        x.erase, d_erase,
    )  # fmt: skip
    _keys[launches.keys](*arguments)
    if launches.keys_levels is not None:
        _keys_levels[launches.keys_levels](*arguments)

    def summed(grad: Tensor, like: Tensor, launch: Fixed | None) -> Tensor:
        if launch is None:
            return grad
        total = torch.empty_like(like, memory_format=torch.contiguous_format)
        _sum_heads[launch](grad, total, total.numel())
        return total

    d_gate = None, None
    if launches.sum_gate is not None:
        # bias and rate, whose shapes and dtype these are
        d_gate = [torch.empty_like(part) for part in (x.dt_bias, x.A_log) if part is not None]
        _sum_chunks[launches.sum_gate](d_bias, d_rate, *d_gate, n.chunks)
    if plan.erase == "scalar" and x.beta is not None:
        d_beta, d_erase = d_erase.sum(3).to(x.beta.dtype), None
    return Gradients(
        summed(dq, x.q, launches.sum_q),
        summed(dk, x.k, launches.sum_k),
        summed(dv, x.v, launches.sum_v),
        d_decay.sum(3).to(x.decay.dtype) if plan.scalar else d_decay,
        d_beta,
        d_gate[1],
        d_gate[0],
        d_erase,
        d_write,
        None,
    )

"""The delta rule's kernels as torch ops: schema, fake, launch and derivative of each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.library import custom_op

from gendistill.ops.eager import differentiable, is_eager, quick
from gendistill.ops.types import OpOutput, Segments
from gendistill_kernels.delta.layout import Chunks, InferenceChunks, empty_gradients, empty_outputs
from gendistill_kernels.delta.rule import Convolution, Finish, Gradients, Heads, Inputs, Rule, Saved
from gendistill_kernels.runtime import hardware


class ChunkKernels(Protocol):
    """The chunked kernels, as ``gendistill_kernels.delta.chunk`` has them."""

    def chunk_forward(
        self, x: Inputs, rule: Rule, *, state: Tensor | None, chunks: Chunks | None, save: bool
    ) -> tuple[Tensor, Tensor, Saved | None]:
        """Return output, final state, and what the backward pass needs if it is to be saved."""
        ...

    def chunk_backward(
        self,
        grad_out: Tensor,
        grad_state: Tensor | None,
        x: Inputs,
        rule: Rule,
        out: Tensor,
        saved: list[Tensor],
        *,
        chunks: Chunks | None,
        want_state: bool,
    ) -> Gradients:
        """Return all gradients, and empty ``saved`` on the way."""
        ...

    def chunk_backward_scan(
        self,
        grad_out: Tensor,
        grad_state: Tensor | None,
        x: Inputs,
        rule: Rule,
        saved: Saved,
        *,
        chunks: Chunks | None,
        want_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the second half needs, as bytes, and the gradient of the initial state if wanted."""
        ...

    def chunk_backward_local(
        self,
        grad_out: Tensor,
        x: Inputs,
        rule: Rule,
        out: Tensor,
        late: Tensor,
        scanned: Tensor,
        *,
        chunks: Chunks | None,
    ) -> Gradients:
        """Return all gradients but the initial state's."""
        ...


class DecodeKernels(Protocol):
    """The decode kernel, as ``gendistill_kernels.delta.decode`` has it."""

    def decode_step(
        self,
        qkv: Sequence[Tensor],
        decay: Tensor,
        beta: Tensor,
        state: Tensor,
        *,
        rule: Rule,
        heads: Heads,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        convolution: Convolution | None,
        finish: Finish | None,
        lives: Tensor | None,
    ) -> Tensor:
        """Take every sequence a few tokens further; states change in place."""
        ...


@functools.cache
def chunk_kernels() -> ChunkKernels:
    """Import the chunked kernels, which need triton."""
    from gendistill_kernels.delta import chunk

    return chunk


@functools.cache
def decode_kernels() -> DecodeKernels:
    """Import the decode kernel, which needs triton."""
    from gendistill_kernels.delta import decode

    return decode


def _contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


def _check_device(q: Tensor) -> None:
    if not q.is_cuda and not hardware.INTERPRETED:
        raise ValueError(
            f'impl "triton" needs tensors on an NVIDIA GPU, q is on {q.device}; or use "reference"'
        )


# ----- chunks -----


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    *,
    erase: Tensor | None,
    write: Tensor | None,
    erases: bool,
    gate: str,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float,
    scale: float | None,
    state: Tensor | None,
    segments: Segments | None,
) -> OpOutput:
    """Run the chunked kernels; arguments as :func:`gendistill.ops.chunk_delta_rule`.

    Args:
        erase, write: Strengths per channel, where ``beta`` is not what erases or writes.
        erases: Whether anything erases.
    """
    _check_device(q)
    if q.shape[0] * q.shape[1] == 0:
        number = q.shape[0] if segments is None else len(segments.lengths)
        if state is None:
            state = q.new_zeros(number, decay.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
        return OpOutput(v.new_empty(*decay.shape[:3], v.shape[3]), state)
    # q, k and v may be parts of one tensor, which the kernels step through
    decay, state = decay.contiguous(), _contiguous(state)
    beta, erase, write, a_log, dt_bias = map(_contiguous, (beta, erase, write, a_log, dt_bias))
    x = Inputs(q, k, v, decay, beta, a_log, dt_bias, erase, write)
    raw = gate != "none"
    erase_by = "none" if not erases else "scalar" if erase is None else "channel"
    write_by = "scalar" if write is None else "channel"
    rule = Rule(gate, lower_bound, raw, raw, scale, erase_by, write_by)  # pyright: ignore[reportArgumentType]
    needs_grad = torch.is_grad_enabled() and any(
        [part is not None and part.requires_grad for part in (*x, state)]
    )
    chunks = _WHOLE
    if segments is not None:
        chunks = segments.table(Chunks.of if needs_grad else InferenceChunks.of)
    arguments = (*x, state, *chunks, *rule, needs_grad)
    if needs_grad or not is_eager(arguments):
        out, last, _ = _chunk(*arguments)
    else:
        out, last, _ = chunk_kernels().chunk_forward(x, rule, state=state, chunks=_given(chunks), save=False)
    return OpOutput(out, last)


# rows that are one sequence each have no tables
_WHOLE = Chunks(None, None, None)


def _given(chunks: Chunks) -> Chunks | None:
    return None if chunks.starts is None else chunks


# The schema, written once: the fields of Inputs, the state, the fields of Chunks and of Rule, and whether to save. What
# calls it spreads these, and what gets its arguments reads them back with _Call.


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    state: Tensor | None,
    sequences: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    spans: Tensor | None,
    first_spans: Tensor | None,
    gate: str,
    lower_bound: float,
    norm: bool,
    sigmoid: bool,
    scale: float | None,
    erase_by: str,
    write_by: str,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return output, final state, and what the backward pass needs (empty unless ``save``)."""
    rule = _rule(gate, lower_bound, norm, sigmoid, scale, erase_by, write_by)
    out, last, saved = chunk_kernels().chunk_forward(
        Inputs(q, k, v, decay, beta, a_log, dt_bias, erase, write),
        rule,
        state=state,
        chunks=_given(Chunks(sequences, starts, lengths, spans, first_spans)),
        save=save,
    )
    return out, last, [] if saved is None else list(saved)


def _rule(*settings: Any) -> Rule:
    return Rule(*settings)


# where the state is among the arguments, and how many of them are tensors, which come first
_STATE = len(Inputs._fields)
_TENSORS = _STATE + 1 + len(Chunks._fields)


class _Call(NamedTuple):
    """The arguments of the forward op."""

    x: Inputs
    state: Tensor | None
    chunks: Chunks
    rule: Rule
    save: bool

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> _Call:
        """Read them in the order of the schema."""
        x, chunks = Inputs(*arguments[:_STATE]), Chunks(*arguments[_STATE + 1 : _TENSORS])
        return cls(x, arguments[_STATE], chunks, Rule(*arguments[_TENSORS:-1]), arguments[-1])


delta_rule_forward = custom_op("gendistill::delta_rule_forward", _launch_forward, mutates_args=())


@delta_rule_forward.register_fake
def _(*arguments):
    call = _Call.of(arguments)
    return empty_outputs(call.x, _given(call.chunks), save=call.save, rule=call.rule)


def _launch_backward_scan(
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: list[Tensor | None],
    tables: list[Tensor | None],
    saved: list[Tensor],
    want_state: bool,
    gate: str,
    lower_bound: float,
    norm: bool,
    sigmoid: bool,
    scale: float | None,
    erase_by: str,
    write_by: str,
) -> list[Tensor]:
    """Return gradients of states and of what was written, as bytes, and that of the initial state if wanted."""
    scanned, first = chunk_kernels().chunk_backward_scan(
        grad_out,
        grad_state,
        _inputs(inputs),
        _rule(gate, lower_bound, norm, sigmoid, scale, erase_by, write_by),
        Saved(*saved),
        chunks=_given(Chunks(*tables)),
        want_state=want_state,
    )
    return [scanned] if first is None else [scanned, first]


def _inputs(parts: Sequence[Any]) -> Inputs:
    return Inputs(*parts)


delta_rule_backward_scan = custom_op(
    "gendistill::delta_rule_backward_scan", _launch_backward_scan, mutates_args=()
)


@delta_rule_backward_scan.register_fake
def _(grad_out, grad_state, inputs, tables, saved, want_state, *_):
    x, chunks = Inputs(*inputs), Chunks(*tables)
    found = [empty_gradients(x, _given(chunks))]
    if want_state:
        number = x.q.shape[0] if chunks.sequences is None else chunks.sequences.shape[0]
        shape = (number, x.decay.shape[2], x.k.shape[3], x.v.shape[3])
        found.append(x.q.new_empty(shape, dtype=torch.float32))
    return found


def _launch_backward_local(
    grad_out: Tensor,
    inputs: list[Tensor | None],
    tables: list[Tensor | None],
    out: Tensor,
    late: Tensor,
    scanned: Tensor,
    gate: str,
    lower_bound: float,
    norm: bool,
    sigmoid: bool,
    scale: float | None,
    erase_by: str,
    write_by: str,
) -> list[Tensor]:
    """Return the gradients of those inputs that are there, in their order."""
    found = chunk_kernels().chunk_backward_local(
        grad_out,
        _inputs(inputs),
        _rule(gate, lower_bound, norm, sigmoid, scale, erase_by, write_by),
        out,
        late,
        scanned,
        chunks=_given(Chunks(*tables)),
    )
    return [part for part in found if part is not None]


delta_rule_backward_local = custom_op(
    "gendistill::delta_rule_backward_local", _launch_backward_local, mutates_args=()
)


@delta_rule_backward_local.register_fake
def _(grad_out, inputs, *_):
    # the kernels' are contiguous, however the inputs lie
    contiguous = torch.contiguous_format
    return [torch.empty_like(part, memory_format=contiguous) for part in inputs if part is not None]


_forward = quick(delta_rule_forward, _launch_forward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    ctx.rule = Rule(*inputs[_TENSORS:-1])
    ctx.save_for_backward(*inputs[:_TENSORS], output[0])
    # Not through save_for_backward, so that the backward pass can free half of it on the way. Bytes are not part of the
    # graph, which must not hold itself.
    ctx.saved = output[2]


def _differentiate(ctx: Any, grad_out: Tensor, grad_state: Tensor | None, _saved: Any) -> tuple[Any, ...]:
    *tensors, out = ctx.saved_tensors
    x, state, chunks, rule = (
        Inputs(*tensors[:_STATE]),
        tensors[_STATE],
        Chunks(*tensors[_STATE + 1 :]),
        ctx.rule,
    )
    saved, ctx.saved = ctx.saved, None
    if not saved:
        # a second backward pass through the same graph
        saved = _forward(*tensors, *rule, True)[2]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    if grad_state is not None:
        grad_state = grad_state.contiguous()
    want_state = state is not None and ctx.needs_input_grad[_STATE]
    # with gradients of gradients asked for, the ops have to see it: they refuse it
    if not torch.is_grad_enabled() and is_eager((grad_out, grad_state, list(x), saved)):
        # it empties ``saved``, and so frees half of it on the way
        *grads, first = chunk_kernels().chunk_backward(
            grad_out, grad_state, x, rule, out, saved, chunks=_given(chunks), want_state=want_state
        )
    else:
        inputs, tables = list(x), list(chunks)
        scanned, *rest = delta_rule_backward_scan(
            grad_out, grad_state, inputs, tables, saved, want_state, *rule
        )
        late = saved[1]
        del saved
        found = iter(delta_rule_backward_local(grad_out, inputs, tables, out, late, scanned, *rule))
        grads = [None if part is None else next(found) for part in x]
        first = rest[0] if rest else None
    return (*grads, first, *_NOT_DIFFERENTIATED)


# tables, settings, and whether to save
_NOT_DIFFERENTIATED = (None,) * (_TENSORS - _STATE + len(Rule._fields))
_chunk = differentiable(delta_rule_forward, _launch_forward, _keep, _differentiate)


# ----- a decode step -----


def _launch_decode(
    qkv: list[Tensor],
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    conv_weights: list[Tensor],
    conv_biases: list[Tensor],
    conv_state: Tensor | None,
    norm_weight: Tensor | None,
    output_gate: Tensor | None,
    lives: Tensor | None,
    gate: str,
    lower_bound: float,
    scale: float | None,
    conv_activation: str,
    output_activation: str,
    norm_eps: float,
) -> Tensor:
    """Run a few tokens through convolution, gates, delta rule, norm and output gate; both states change in place."""
    changed = [part for part in (state, conv_state) if part is not None]
    torch.autograd.graph.increment_version(changed)
    raw, K, V = gate != "none", state.shape[2], state.shape[3]
    convolution = None
    if conv_weights:
        convolution = Convolution(conv_weights, conv_state, conv_biases or None, conv_activation)  # pyright: ignore
    return decode_kernels().decode_step(
        qkv,
        decay,
        beta,
        state,
        rule=_rule(gate, lower_bound, raw, raw, scale, "scalar", "scalar"),
        heads=Heads(qkv[0].shape[2] // K, qkv[1].shape[2] // K, qkv[2].shape[2] // V),
        A_log=a_log,
        dt_bias=dt_bias,
        convolution=convolution,
        finish=Finish(norm_weight, norm_eps, output_gate, output_activation),  # pyright: ignore[reportArgumentType]
        lives=lives,
    )


delta_rule_decode = custom_op(
    "gendistill::delta_rule_decode", _launch_decode, mutates_args=("state", "conv_state")
)


@delta_rule_decode.register_fake
def _(qkv, decay, beta, state, *_):
    return qkv[0].new_empty(*beta.shape, state.shape[3])


_decode = quick(delta_rule_decode, _launch_decode)


def decode_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    gate: str,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float,
    scale: float | None,
    conv_weight: Sequence[Tensor] | None,
    conv_bias: Sequence[Tensor] | None,
    conv_state: Tensor | None,
    conv_activation: str,
    norm_weight: Tensor | None,
    norm_eps: float,
    output_gate: Tensor | None,
    output_activation: str,
    lives: Tensor | None,
) -> Tensor:
    """Run the decode kernel; arguments as :func:`gendistill.ops.decode_delta_rule`."""
    _check_device(q)
    weights, biases = list(conv_weight or ()), list(conv_bias or ())
    # in the order of the schema
    tensors = (
        [q, k, v],
        decay,
        beta,
        state,
        a_log,
        dt_bias,
        weights,
        biases,
        conv_state,
        norm_weight,
        output_gate,
        lives,
    )
    return _decode(*tensors, gate, lower_bound, scale, conv_activation, output_activation, norm_eps)

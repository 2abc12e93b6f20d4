"""Our Triton kernels as torch ops: with fake tensors, autograd and ``torch.compile`` without graph breaks.

Imported only where the kernels can run. The kernels' package is looked up by name, so that a student's exported code,
which carries no kernels, still imports.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from gendistill.ops.eager import differentiable, is_eager, quick
from gendistill.ops.types import OpOutput, Segments

_delta: Any = importlib.import_module("gendistill_kernels.delta_chunk")
_conv: Any = importlib.import_module("gendistill_kernels.short_conv")
_norm: Any = importlib.import_module("gendistill_kernels.gated_norm")
_decode: Any = importlib.import_module("gendistill_kernels.decode")


def _contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


def triton_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    *,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    erases: bool = True,
    gate: str = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    raw: bool = False,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> OpOutput:
    """Run the chunked kernels; arguments as :func:`gendistill.ops.kda` and :func:`gendistill.ops.gated_delta_rule`.

    Args:
        erase, write: Strengths per channel, where ``beta`` is not what erases or writes.
        erases: Whether anything erases.
        gate: ``none``: ``decay`` holds log-decays; otherwise raw values of a ``softplus`` or ``bounded`` gate.
        raw: q and k are not normalised yet, and ``beta``, ``erase`` and ``write`` hold logits.
    """
    if q.device.type != "cuda" and not _delta._INTERPRETED:
        raise ValueError(
            f'impl "triton" needs tensors on an NVIDIA GPU, q is on {q.device}; or use "reference"'
        )
    if q.shape[0] * q.shape[1] == 0:
        number = q.shape[0] if segments is None else len(segments.lengths)
        if state is None:
            state = q.new_zeros(number, decay.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
        return OpOutput(v.new_empty(*decay.shape[:3], v.shape[3]), state)
    chunks = None if segments is None else segments.table(_delta.Chunks.of)
    tables = [None] * 5 if chunks is None else list(chunks)
    # q, k and v may be parts of one tensor, which the kernels step through
    decay, state = decay.contiguous(), _contiguous(state)
    beta, erase, write, a_log, dt_bias = map(_contiguous, (beta, erase, write, a_log, dt_bias))
    inputs = (q, k, v, decay, beta, a_log, dt_bias, erase, write)
    needs_grad = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (*inputs, state)
    )
    out, last, _ = _kda(*inputs, state, *tables, gate, lower_bound, raw, erases, needs_grad)
    return OpOutput(out, last)


def _rule(x: Any, gate: str, lower_bound: float, raw: bool, erases: bool) -> Any:
    """Say what ``Inputs`` mean."""
    erase = "none" if not erases else "scalar" if x.erase is None else "channel"
    write = "scalar" if x.write is None else "channel"
    return _delta.Rule(gate, lower_bound, raw, raw, None, erase, write)


def _chunks(*tables: Tensor | None) -> Any:
    return None if tables[0] is None else _delta.Chunks(*tables)


def _launch_kda_forward(
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
    segments: Tensor | None,
    first_segments: Tensor | None,
    gate: str,
    lower_bound: float,
    raw: bool,
    erases: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return output, final state, and what the backward pass needs (empty unless ``save``)."""
    x = _delta.Inputs(q, k, v, decay, beta, a_log, dt_bias, erase, write)
    out, last, saved = _delta.chunk_forward(
        x,
        _rule(x, gate, lower_bound, raw, erases),
        state=state,
        chunks=_chunks(sequences, starts, lengths, segments, first_segments),
        save=save,
    )
    return out, last, [] if saved is None else list(saved)


kda_forward = custom_op("gendistill::kda_forward", _launch_kda_forward, mutates_args=())


@kda_forward.register_fake
def _(q, k, v, decay, beta, a_log, dt_bias, erase, write, state, *settings):
    *tables, gate, lower_bound, raw, erases, save = settings
    x = _delta.Inputs(q, k, v, decay, beta, a_log, dt_bias, erase, write)
    rule = _rule(x, gate, lower_bound, raw, erases)
    return _delta.empty_outputs(x, _chunks(*tables), save=save, rule=rule)


def _launch_kda_backward_scan(
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: list[Tensor | None],
    tables: list[Tensor],
    saved: list[Tensor],
    erases: bool,
    want_state: bool,
) -> list[Tensor]:
    """Return gradients of states and of written values, as bytes, and that of the initial state if wanted."""
    x = _delta.Inputs(*inputs)
    scanned, first = _delta.chunk_backward_scan(
        grad_out,
        grad_state,
        x,
        # of the rule, the scan looks at nothing but what erases and writes
        _rule(x, "none", 0.0, False, erases),
        _delta.Saved(*saved),
        chunks=_delta.Chunks(*tables) if tables else None,
        want_state=want_state,
    )
    return [scanned] if first is None else [scanned, first]


kda_backward_scan = custom_op("gendistill::kda_backward_scan", _launch_kda_backward_scan, mutates_args=())


@kda_backward_scan.register_fake
def _(grad_out, grad_state, inputs, tables, saved, erases, want_state):
    x = _delta.Inputs(*inputs)
    found = [_delta.empty_gradients(x, _delta.Chunks(*tables) if tables else None)]
    if want_state:
        number = x.q.shape[0] if not tables else tables[0].shape[0]
        shape = (number, x.decay.shape[2], x.k.shape[3], x.v.shape[3])
        found.append(x.q.new_empty(shape, dtype=torch.float32))
    return found


def _launch_kda_backward_local(
    grad_out: Tensor,
    inputs: list[Tensor | None],
    tables: list[Tensor],
    out: Tensor,
    late: Tensor,
    scanned: Tensor,
    gate: str,
    lower_bound: float,
    raw: bool,
    erases: bool,
) -> list[Tensor]:
    """Return the gradients of those inputs that are there, in their order."""
    x = _delta.Inputs(*inputs)
    found = _delta.chunk_backward_local(
        grad_out,
        x,
        _rule(x, gate, lower_bound, raw, erases),
        out,
        late,
        scanned,
        chunks=_delta.Chunks(*tables) if tables else None,
    )
    return [part for part in found if part is not None]


kda_backward_local = custom_op("gendistill::kda_backward_local", _launch_kda_backward_local, mutates_args=())


@kda_backward_local.register_fake
def _(grad_out, inputs, *_):
    # the kernels' are contiguous, however the inputs lie
    contiguous = torch.contiguous_format
    return [torch.empty_like(part, memory_format=contiguous) for part in inputs if part is not None]


_forward = quick(kda_forward, _launch_kda_forward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    *tensors, ctx.gate, ctx.lower_bound, ctx.raw, ctx.erases, _ = inputs
    ctx.save_for_backward(*tensors, output[0])
    # Not through save_for_backward, so that the backward pass can free half of it on the way. Bytes are no part of the
    # graph, which must not hold itself.
    ctx.saved = output[2]


def _differentiate(ctx: Any, grad_out: Tensor, grad_state: Tensor | None, _: Any) -> tuple[Any, ...]:
    *tensors, out = ctx.saved_tensors
    number = len(_delta.Inputs._fields)
    inputs, state = tensors[:number], tensors[number]
    tables = [part for part in tensors[number + 1 :] if part is not None]
    settings = (ctx.gate, ctx.lower_bound, ctx.raw, ctx.erases)
    saved, ctx.saved = ctx.saved, None
    if not saved:
        # a second backward pass through the same graph
        saved = _forward(*tensors, *settings, True)[2]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    if grad_state is not None:
        grad_state = grad_state.contiguous()
    want_state = state is not None and ctx.needs_input_grad[number]
    # with gradients of gradients asked for, the ops have to see it: they refuse it
    if not torch.is_grad_enabled() and is_eager((grad_out, grad_state, inputs, saved)):
        x, chunks = _delta.Inputs(*inputs), _delta.Chunks(*tables) if tables else None
        # it empties ``saved``, and so frees half of it on the way
        *grads, first = _delta.chunk_backward(
            grad_out, grad_state, x, _rule(x, *settings), out, saved, chunks=chunks, want_state=want_state
        )
    else:
        scanned, *first = kda_backward_scan(
            grad_out, grad_state, inputs, tables, saved, ctx.erases, want_state
        )
        late = saved[1]
        del saved
        found = iter(kda_backward_local(grad_out, inputs, tables, out, late, scanned, *settings))
        grads = [None if part is None else next(found) for part in inputs]
        first = first[0] if first else None
    # nothing for the tables and the settings
    return (*grads, first, *[None] * 10)


_kda = differentiable(kda_forward, _launch_kda_forward, _keep, _differentiate)


def triton_causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    state: Tensor | None,
    segments: Segments | None,
) -> OpOutput:
    """Run the convolution kernel; arguments as :func:`gendistill.ops.causal_conv`."""
    tiles = None if segments is None else segments.table(_conv.Tiles.of)
    tables = [None] * 3 if tiles is None else list(tiles)
    tensors = map(_contiguous, (x, weight, bias))
    return OpOutput(*_causal_conv(*tensors, state, *tables, activation))


def _tiles(*tables: Tensor | None) -> Any:
    return None if tables[0] is None else _conv.Tiles(*tables)


def _launch_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    owners: Tensor | None,
    firsts: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return output and new state."""
    return _conv.conv_forward(
        x, weight, bias, activation=activation, state=state, tiles=_tiles(cu_seqlens, owners, firsts)
    )


conv_forward = custom_op("gendistill::conv_forward", _launch_conv_forward, mutates_args=())


@conv_forward.register_fake
def _(x, weight, bias, state, cu_seqlens, owners, firsts, activation):
    number = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x), x.new_empty(number, x.shape[2], weight.shape[1] - 1)


def _launch_conv_backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    owners: Tensor | None,
    firsts: Tensor | None,
    activation: str,
) -> list[Tensor]:
    """Return the gradients of x, weight and, where they exist, bias and state."""
    found = _conv.conv_backward(
        grad_out,
        grad_state,
        x,
        weight,
        bias,
        activation=activation,
        state=state,
        tiles=_tiles(cu_seqlens, owners, firsts),
    )
    if found.bias is not None and found.bias.dtype == found.weight.dtype:
        # weight and bias may be two views of one sum, which an op must not return
        found = found._replace(bias=found.bias.clone())
    return [part for part in found if part is not None]


conv_backward = custom_op("gendistill::conv_backward", _launch_conv_backward, mutates_args=())


@conv_backward.register_fake
def _(grad_out, grad_state, x, weight, bias, state, cu_seqlens, owners, firsts, activation):
    return [torch.empty_like(part) for part in (x, weight, bias, state) if part is not None]


_conv_backward = quick(conv_backward, _launch_conv_backward)


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx: Any, grad_out: Tensor, grad_state: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, state, *tables = ctx.saved_tensors
    grad_out = torch.zeros_like(x) if grad_out is None else grad_out.contiguous()
    found = iter(_conv_backward(grad_out, grad_state, x, weight, bias, state, *tables, ctx.activation))
    grads = [None if part is None else next(found) for part in (x, weight, bias, state)]
    return (*grads, None, None, None, None)


_causal_conv = differentiable(conv_forward, _launch_conv_forward, _keep_conv, _differentiate_conv)


def _launch_gated_norm_forward(
    out: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
) -> Tensor:
    """Return the normalised and gated ``[..., H * V]``."""
    return _norm.gated_norm_forward(out, weight, gate, activation=activation, eps=eps)


gated_norm_forward = custom_op("gendistill::gated_norm_forward", _launch_gated_norm_forward, mutates_args=())


@gated_norm_forward.register_fake
def _(out, weight, gate, activation, eps):
    return out.new_empty(*out.shape[:-2], out.shape[-2] * out.shape[-1])


def _launch_gated_norm_backward(
    grad: Tensor, out: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
) -> list[Tensor]:
    """Return the gradients of out and, where they exist, weight and gate."""
    found = _norm.gated_norm_backward(grad, out, weight, gate, activation=activation, eps=eps)
    return [part for part in found if part is not None]


gated_norm_backward = custom_op(
    "gendistill::gated_norm_backward", _launch_gated_norm_backward, mutates_args=()
)


@gated_norm_backward.register_fake
def _(grad, out, weight, gate, activation, eps):
    return [torch.empty_like(part) for part in (out, weight, gate) if part is not None]


_gated_norm_backward = quick(gated_norm_backward, _launch_gated_norm_backward)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_norm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = ctx.saved_tensors
    found = iter(_gated_norm_backward(grad.contiguous(), *parts, ctx.activation, ctx.eps))
    return (*[None if part is None else next(found) for part in parts], None, None)


triton_gated_norm = differentiable(
    gated_norm_forward, _launch_gated_norm_forward, _keep_norm, _differentiate_norm
)


def _launch_kda_decode(
    qkv: list[Tensor],
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    conv_weights: list[Tensor],
    conv_biases: list[Tensor],
    conv_state: Tensor | None,
    norm_weight: Tensor | None,
    output_gate: Tensor | None,
    num_kv_heads: int,
    gate: str,
    lower_bound: float,
    conv_activation: str,
    output_activation: str,
    norm_eps: float,
) -> Tensor:
    """Run a few tokens through convolution, gates, delta rule, norm and output gate; both states change in place.

    Args:
        qkv: q ``[N, T, H K]``, and k and v ``[N, T, num_kv_heads K]``, before the convolution.
        decay: ``[N, T, H, K]`` raw gate values.
        beta: ``[N, T, H]`` logits.
        state: ``[N, H, K, K]`` float32.
        conv_weights, conv_biases: ``[channels, W]`` and ``[channels]`` of q, k and v; none if there are none.
        conv_state: ``[N, C, W - 1]``.
        output_gate: ``[N, T, H K]`` raw.
    Returns: ``[N, T, H, K]``.
    """
    changed = [part for part in (state, conv_state) if part is not None]
    torch.autograd.graph.increment_version(changed)
    convolution = None
    if conv_weights:
        convolution = _decode.Convolution(conv_weights, conv_state, conv_biases or None, conv_activation)
    finish = _decode.Finish(norm_weight, norm_eps, output_gate, output_activation)
    return _decode.decode_step(
        qkv,
        decay,
        beta,
        state,
        rule=_delta.Rule(gate=gate, lower_bound=lower_bound),
        heads=_decode.Heads(beta.shape[2], num_kv_heads, num_kv_heads),
        A_log=a_log,
        dt_bias=dt_bias,
        convolution=convolution,
        finish=finish,
    )


kda_decode = custom_op("gendistill::kda_decode", _launch_kda_decode, mutates_args=("state", "conv_state"))


@kda_decode.register_fake
def _(qkv, decay, beta, state, *settings):
    return qkv[0].new_empty(*beta.shape, state.shape[3])


triton_kda_decode = quick(kda_decode, _launch_kda_decode)

"""The gated MLP of a decoder layer and the addition after it, as one function with a derivative of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gendistill.engine.linear import PackedLinear
from gendistill.engine.products import add_product
from gendistill.ops.block import rms_norm
from gendistill.ops.reference.block import swiglu
from gendistill.ops.select import Impl, contract
from gendistill.ops.thin import thin_mlp


def normed_mlp(
    stream: Tensor,
    mixed: Tensor,
    norm_weight: Tensor,
    gate_up: PackedLinear,
    down: PackedLinear,
    *,
    eps: float,
    dtype: torch.dtype,
    impl: Impl,
) -> Tensor:
    """Run the second half of a layer: return ``s + down(silu(gate(n)) * up(n))``, s the sum of both and n its norm.

    Args:
        stream: ``[..., D]``, the residual stream.
        mixed: ``[..., D]``, what the layer's first half adds to it.
        norm_weight: ``[D]`` of an RMSNorm.
        gate_up, down: Without biases.
        eps: Of the norm.
        dtype: Of arithmetic.
        impl: Of norm and product in between.
    """
    plain = gate_up.adapters is None and down.adapters is None
    if plain and gate_up.is_thin(stream) and down.is_thin(stream):
        rows = stream.flatten(0, -2), mixed.flatten(0, -2)
        out = thin_mlp(*rows, norm_weight, _rows(gate_up), down.matrix, eps=eps, impl=Impl.TRITON)
        return out.view(stream.shape)
    stream, x = rms_norm(stream, norm_weight, mixed, eps=eps, dtype=dtype, impl=impl)
    return gated_mlp(x, stream, gate_up, down, impl=impl)


def gated_mlp(x: Tensor, stream: Tensor, gate_up: PackedLinear, down: PackedLinear, *, impl: Impl) -> Tensor:
    """Return ``stream + down(silu(gate(x)) * up(x))``.

    Kept for the backward pass are the outputs of gate and up alone: their product is computed again.

    Args:
        x: ``[..., D]`` in the dtype of arithmetic.
        stream: ``[..., D]``, the residual stream; overwritten where no gradient is recorded.
        gate_up, down: Without biases.
        impl: Of the product in between.
    """
    if not torch.is_grad_enabled():
        flat = x.flatten(0, -2)
        hidden = _swiglu(gate_up.adapt(F.linear(flat, _rows(gate_up)), flat), impl)
        out = add_product(stream.flatten(0, -2), hidden, down.matrix.T, in_place=True)
        return down.adapt(out, hidden).view(stream.shape)
    return _GatedMLP.apply(x, stream, gate_up, down, impl, *gate_up.weights, *down.weights)  # pyright: ignore[reportReturnType]


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stream: Tensor, gate_up: PackedLinear, down: PackedLinear, impl: Impl, *_: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        both = gate_up.adapt(F.linear(flat, _rows(gate_up)), flat)
        hidden = _swiglu(both, impl)
        ctx.save_for_backward(flat, both, gate_up.saved(), down.saved())
        ctx.packed, ctx.impl, ctx.shape = (gate_up, down), impl, x.shape
        out = add_product(stream.view(flat.shape), hidden, down.matrix.T)
        # not as a view of something that nobody else has: fully_shard warns of what may be written to
        return torch.ops.aten._unsafe_view(down.adapt(out, hidden), stream.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, both, _, down_matrix = ctx.saved_tensors
        gate_up, down = ctx.packed
        if down_matrix is None:
            down_matrix = down.matrix
        out = grad.reshape(x.shape).to(x.dtype)
        outer = down.outer(out)
        grad_both, hidden = _swiglu_backward(
            down.input_grad(out, down_matrix, outer), both, down.learns, ctx.impl
        )
        down_grads = [None] * len(down.weights) if hidden is None else down.weight_grads(out, hidden, outer)
        outer, grad_x = gate_up.outer(grad_both), None
        if ctx.needs_input_grad[0]:
            grad_x = gate_up.input_grad(grad_both, _rows(gate_up), outer).view(ctx.shape)
        grads = gate_up.weight_grads(grad_both, x, outer)
        return (grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, *grads, *down_grads)


def _rows(packed: PackedLinear) -> Tensor:
    """Return the weights without the zeros below them: gates and values must lie side by side."""
    return packed.matrix[: sum(packed.widths)]


def _swiglu(both: Tensor, impl: Impl) -> Tensor:
    return contract("block").swiglu_forward(both) if impl is Impl.TRITON else swiglu(both)


def _swiglu_backward(
    grad: Tensor, both: Tensor, want_hidden: bool, impl: Impl
) -> tuple[Tensor, Tensor | None]:
    if impl is Impl.TRITON:
        return contract("block").swiglu_backward(grad, both, want_hidden=want_hidden)
    gate, up = both.chunk(2, dim=-1)
    act = F.silu(gate)
    # rounds once, as autograd does
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([grad_gate, grad * act], dim=-1), act * up if want_hidden else None

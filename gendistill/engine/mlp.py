"""The gated MLP of a decoder layer and the addition after it, as one function with a derivative of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gendistill.engine.linear import PackedLinear, add_product, weight_grads
from gendistill.ops.reference.block import swiglu
from gendistill.ops.select import Impl, contract


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
        hidden = _swiglu(F.linear(x.flatten(0, -2), _rows(gate_up)), impl)
        return add_product(stream.flatten(0, -2), hidden, down.matrix.T, in_place=True).view(stream.shape)
    parameters = (*gate_up.parameters, *down.parameters)
    return _GatedMLP.apply(x, stream, gate_up, down, impl, *parameters)  # pyright: ignore[reportReturnType]


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stream: Tensor, gate_up: PackedLinear, down: PackedLinear, impl: Impl, *_: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        both = F.linear(flat, _rows(gate_up))
        hidden = _swiglu(both, impl)
        ctx.save_for_backward(flat, both, gate_up.saved(), down.saved())
        ctx.packed, ctx.impl, ctx.shape = (gate_up, down), impl, x.shape
        return add_product(stream.view(flat.shape), hidden, down.matrix.T).view(stream.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, both, _, down_matrix = ctx.saved_tensors
        gate_up, down = ctx.packed
        if down_matrix is None:
            down_matrix = down.matrix
        out = grad.reshape(x.shape).to(x.dtype)
        grad_both, hidden = _swiglu_backward(
            out @ down_matrix, both, down.parameters[0].requires_grad, ctx.impl
        )
        grad_x = (grad_both @ _rows(gate_up)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        down_grad = [None] if hidden is None else weight_grads(out, hidden, down.places, down.parameters)
        grads = weight_grads(grad_both, x, gate_up.places, gate_up.parameters)
        return (grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, *grads, *down_grad)


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

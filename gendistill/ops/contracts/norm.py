"""The gated norm's kernels as torch ops: schema, fake, launch and derivative of each."""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.library import custom_op

from gendistill.ops.eager import differentiable, quick
from gendistill_kernels.norm.layout import Gradients

Activation = Literal["silu", "sigmoid", "none"]


class Kernels(Protocol):
    """The kernels, as ``gendistill_kernels.norm.gated`` has them."""

    def gated_norm_forward(
        self, o: Tensor, weight: Tensor | None, gate: Tensor | None, *, activation: Activation, eps: float
    ) -> Tensor:
        """Return the normalised and gated ``[..., H * V]``."""
        ...

    def gated_norm_backward(
        self,
        grad_out: Tensor,
        o: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        *,
        activation: Activation,
        eps: float,
    ) -> Gradients:
        """Return the gradients of what there is."""
        ...


@functools.cache
def kernels() -> Kernels:
    """Import the kernels, which need triton."""
    from gendistill_kernels.norm import gated

    return gated


def gated_rms_norm(
    out: Tensor, weight: Tensor | None, gate: Tensor | None, *, activation: str, eps: float
) -> Tensor:
    """Run the kernel; arguments as :func:`gendistill.ops.gated_rms_norm`."""
    return _norm(out, weight, gate, activation, eps)


def _launch_forward(
    out: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
) -> Tensor:
    """Return the normalised and gated ``[..., H * V]``."""
    return kernels().gated_norm_forward(out, weight, gate, activation=activation, eps=eps)  # pyright: ignore


gated_norm_forward = custom_op("gendistill::gated_norm_forward", _launch_forward, mutates_args=())


@gated_norm_forward.register_fake
def _(out, weight, gate, activation, eps):
    return out.new_empty(*out.shape[:-2], out.shape[-2] * out.shape[-1])


def _launch_backward(
    grad: Tensor, out: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
) -> list[Tensor]:
    """Return the gradients of out and, where they exist, weight and gate."""
    found = kernels().gated_norm_backward(grad, out, weight, gate, activation=activation, eps=eps)  # pyright: ignore
    return [part for part in found if part is not None]


gated_norm_backward = custom_op("gendistill::gated_norm_backward", _launch_backward, mutates_args=())


@gated_norm_backward.register_fake
def _(grad, out, weight, gate, activation, eps):
    return [torch.empty_like(part) for part in (out, weight, gate) if part is not None]


_backward = quick(gated_norm_backward, _launch_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = ctx.saved_tensors
    found = iter(_backward(grad.contiguous(), *parts, ctx.activation, ctx.eps))
    return (*[None if part is None else next(found) for part in parts], None, None)


_norm = differentiable(gated_norm_forward, _launch_forward, _keep, _differentiate)

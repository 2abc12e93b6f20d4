"""The convolution's kernels as torch ops: schema, fake, launch and derivative of each."""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.library import custom_op

from gendistill.ops.eager import differentiable, quick
from gendistill.ops.types import OpOutput, Segments
from gendistill_kernels.conv.layout import Gradients, Tiles

Activation = Literal["identity", "silu"]


class Kernels(Protocol):
    """The kernels, as ``gendistill_kernels.conv.causal`` has them."""

    def conv_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: Activation,
        state: Tensor | None,
        tiles: Tiles | None,
    ) -> tuple[Tensor, Tensor]:
        """Return output and new state."""
        ...

    def conv_backward(
        self,
        grad_out: Tensor,
        grad_state: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: Activation,
        state: Tensor | None,
        tiles: Tiles | None,
    ) -> Gradients:
        """Return the gradients of what there is."""
        ...


@functools.cache
def kernels() -> Kernels:
    """Import the kernels, which need triton."""
    from gendistill_kernels.conv import causal

    return causal


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    state: Tensor | None,
    segments: Segments | None,
) -> OpOutput:
    """Run the convolution kernel; arguments as :func:`gendistill.ops.causal_conv`."""
    tiles = _WHOLE if segments is None else segments.table(Tiles.of)
    bias = None if bias is None else bias.contiguous()
    # the kernel reads tokens that are apart, channels side by side
    x = x if x.stride(-1) == 1 else x.contiguous()
    return OpOutput(*_conv(x, weight.contiguous(), bias, state, *tiles, activation))


# rows that are one sequence each have no tables
_WHOLE = Tiles(None, None, None)


def _given(tiles: Tiles) -> Tiles | None:
    return None if tiles.cu_seqlens is None else tiles


def _launch_forward(
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
    return kernels().conv_forward(
        x,
        weight,
        bias,
        activation=activation,  # pyright: ignore[reportArgumentType]
        state=state,
        tiles=_given(Tiles(cu_seqlens, owners, firsts)),
    )


conv_forward = custom_op("gendistill::conv_forward", _launch_forward, mutates_args=())


@conv_forward.register_fake
def _(x, weight, bias, state, cu_seqlens, owners, firsts, activation):
    number = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x), x.new_empty(number, x.shape[2], weight.shape[1] - 1)


def _launch_backward(
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
    found = kernels().conv_backward(
        grad_out,
        grad_state,
        x,
        weight,
        bias,
        activation=activation,  # pyright: ignore[reportArgumentType]
        state=state,
        tiles=_given(Tiles(cu_seqlens, owners, firsts)),
    )
    if found.bias is not None and found.bias.dtype == found.weight.dtype:
        # weight and bias may be two views of one sum, which an op must not return
        found = found._replace(bias=found.bias.clone())
    return [part for part in found if part is not None]


conv_backward = custom_op("gendistill::conv_backward", _launch_backward, mutates_args=())


@conv_backward.register_fake
def _(grad_out, grad_state, x, weight, bias, state, cu_seqlens, owners, firsts, activation):
    return [torch.empty_like(part) for part in (x, weight, bias, state) if part is not None]


_backward = quick(conv_backward, _launch_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_out: Tensor, grad_state: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, state, *tables = ctx.saved_tensors
    grad_out = torch.zeros_like(x) if grad_out is None else grad_out.contiguous()
    found = iter(_backward(grad_out, grad_state, x, weight, bias, state, *tables, ctx.activation))
    grads = [None if part is None else next(found) for part in (x, weight, bias, state)]
    # nothing for the tables and the activation
    return (*grads, *[None] * (len(tables) + 1))


_conv = differentiable(conv_forward, _launch_forward, _keep, _differentiate)

"""SwiGLU on gates and values that lie side by side, forwards and backwards: one launch each.

With ``[g | u]`` a row and s the sigmoid::

    h = g s(g) u      dg = dh u (s(g) + g s(g) (1 - s(g)))      du = dh g s(g)

The backward pass computes h again, for the gradient of the weight that reads it, instead of keeping it.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.block.rows import TABLE, power_of_2
from gendistill_kernels.runtime.launch import Launcher, on_its_device


@triton.jit
def forward_kernel(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    g = tl.load(both + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(both + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad, both, hidden, grad_both, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HIDDEN: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    g = tl.load(both + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(both + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    act = g * s
    if HIDDEN:
        tl.store(hidden + row * WIDTH + column, (act * u).to(hidden.dtype.element_ty), mask=inside)
    d_gate = d * u * (s + act * (1.0 - s))
    tl.store(grad_both + row * 2 * WIDTH + column, d_gate.to(grad_both.dtype.element_ty), mask=inside)
    tl.store(
        grad_both + row * 2 * WIDTH + WIDTH + column, (d * act).to(grad_both.dtype.element_ty), mask=inside
    )


_forward = Launcher(forward_kernel)
_backward = Launcher(backward_kernel)


def _grid(kernel: str, both: Tensor) -> tuple[tuple[int, int], int, int, int]:
    config = TABLE.lookup(both.device, kernel, both.dtype.itemsize)
    size = both.shape[-1] // 2
    block = min(config.block, power_of_2(size))
    return (both.numel() // (2 * size), math.ceil(size / block)), size, block, config.warps


@on_its_device
def swiglu_forward(both: Tensor) -> Tensor:
    """Return ``silu(g) u`` ``[..., I]`` of contiguous ``[..., 2 I]``, the gates before the values; float32 inside."""
    grid, size, block, warps = _grid("block_glu_forward", both)
    out = torch.empty(*both.shape[:-1], size, dtype=both.dtype, device=both.device)
    _forward[grid](both, out, WIDTH=size, BLOCK=block, num_warps=warps)
    return out


@on_its_device
def swiglu_backward(grad: Tensor, both: Tensor, *, want_hidden: bool) -> tuple[Tensor, Tensor | None]:
    """Differentiate ``swiglu_forward``.

    Args:
        grad: ``[..., I]``; overwritten by what the forward pass returned, if that is wanted.
        both: Input of the forward pass.
        want_hidden: Whether its output is.
    Returns: The gradient ``[..., 2 I]``, and the output or None.
    """
    grid, size, block, warps = _grid("block_glu_backward", both)
    grad = grad.contiguous()
    grad_both = torch.empty_like(both)
    _backward[grid](grad, both, grad, grad_both, WIDTH=size, BLOCK=block, HIDDEN=want_hidden, num_warps=warps)
    return grad_both, grad if want_hidden else None

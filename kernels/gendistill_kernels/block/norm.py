"""RMSNorm over the width of the residual stream, with the addition before it: one launch each way.

With x the stream, d what a layer adds to it (or nothing), and mean over the width::

    s = x + d      r = 1 / sqrt(mean(s^2) + eps)      y = w r s
    dn = w dy      ds = r (dn - r s mean(dn r s)) + (gradient of s from where else it goes)      dw = sum dy r s
    dx = ds        dd = ds
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gendistill_kernels.block.rows import TABLE, power_of_2
from gendistill_kernels.runtime.hardware import can_overlap
from gendistill_kernels.runtime.launch import Launcher, on_its_device


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, added, weight, total, y, rstd, rows, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        # the kernel after may read its weights meanwhile
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, BD)
    inside = (first + row < rows)[:, None] & (column < D)[None, :]
    cells = first * D + row[:, None] * D + column[None, :]
    value = tl.load(x + cells, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(added + cells, mask=inside, other=0.0).to(tl.float32)
        stored = value.to(total.dtype.element_ty)
        tl.store(total + cells, stored, mask=inside)
        # what the next layer reads is what is normalised here
        value = stored.to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(rstd + first + row, scale, mask=first + row < rows)
    tl.store(y + cells, (value * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs", "rounds"])
def backward_kernel(
    grad_y, grad_total, total, weight, rstd, grad_x, grad_added, partial, rows, programs, rounds,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    REST: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, BD)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if WEIGHT:
        d_weight = tl.zeros([ROWS, BD], tl.float32)
    for lap in range(0, rounds):
        # what runs at the same time lies side by side
        first = (program + lap * programs) * ROWS
        inside = (first + row < rows)[:, None] & (column < D)[None, :]
        cells = first * D + row[:, None] * D + column[None, :]
        grad = tl.load(grad_y + cells, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + first + row, mask=first + row < rows, other=0.0)[:, None]
        value = tl.load(total + cells, mask=inside, other=0.0).to(tl.float32) * scale
        if WEIGHT:
            d_weight += grad * value
        grad *= w
        grad = scale * (grad - value * (tl.sum(grad * value, 1) / D)[:, None])
        if REST:
            grad += tl.load(grad_total + cells, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + cells, grad.to(grad_x.dtype.element_ty), mask=inside)
        if ADD:
            tl.store(grad_added + cells, grad.to(grad_added.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(partial + program * D + column, tl.sum(d_weight, 0), mask=column < D)


# rows up to which the kernel after may be one of gendistill_kernels.thin, which reads its weights early
_FEW = 4
_forward = Launcher(forward_kernel)
_backward = Launcher(backward_kernel)


def _tile(rows: int, block: int, D: int) -> tuple[int, int]:
    wide = power_of_2(D)
    return wide, min(max(1, block // wide), power_of_2(rows))


@on_its_device
def rms_norm_forward(
    x: Tensor, added: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Add, normalise and scale; float32 inside.

    Args:
        x: ``[..., D]``, the residual stream; contiguous.
        added: The same, in any dtype, or None.
        weight: ``[D]``.
        eps: Added to the mean of squares.
        dtype: Of the output.
    Returns: The sum (``x`` itself without ``added``) in ``x.dtype``; the norm; and float32 ``[rows]``, its factor.
    """
    D = x.shape[-1]
    rows = x.numel() // D
    config = TABLE.lookup(x.device, "block_norm_forward", x.dtype.itemsize)
    wide, number = _tile(rows, config.block, D)
    total = x if added is None else torch.empty_like(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    overlap = rows <= _FEW and can_overlap(x.device)
    _forward[(-(-rows // number),)](
        x, x if added is None else added.contiguous(), weight, total, y, rstd, rows, eps,
        D=D, BD=wide, ROWS=number, ADD=added is not None, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=config.warps,
    )  # fmt: skip
    return total, y, rstd


@on_its_device
def rms_norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    added: torch.dtype | None,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Differentiate ``rms_norm_forward``.

    Args:
        grad_y: ``[..., D]``.
        grad_total: What else flows back into the sum, in its dtype, or None.
        total, weight, rstd: As the forward pass had or returned them.
        added: Dtype of what was added; None if nothing was.
        want_weight: Whether the weight learns.
    Returns: The gradients of x, of what was added, and of the weight, where they exist.
    """
    D = total.shape[-1]
    rows = total.numel() // D
    config = TABLE.lookup(total.device, "block_norm_backward", total.dtype.itemsize)
    wide, number = _tile(rows, config.block, D)
    tiles = -(-rows // number)
    # the shape alone decides which rows a program sums over: the same input gives the same bits
    programs = max(1, min(tiles, config.programs))
    grad_x = torch.empty_like(total)
    # in one dtype both are the same numbers
    shared = added is None or added == total.dtype
    grad_added = grad_x if shared else torch.empty(total.shape, dtype=added, device=total.device)
    partial = torch.empty(programs, D, dtype=torch.float32, device=total.device) if want_weight else rstd
    _backward[(programs,)](
        grad_y.contiguous(), total if grad_total is None else grad_total.contiguous(), total, weight, rstd,
        grad_x, grad_added, partial, rows, programs, -(-tiles // programs),
        D=D, BD=wide, ROWS=number, REST=grad_total is not None, ADD=not shared, WEIGHT=want_weight,
        num_warps=config.warps,
    )  # fmt: skip
    d_weight = partial.sum(0).to(weight.dtype) if want_weight else None
    return grad_x, None if added is None else grad_added, d_weight

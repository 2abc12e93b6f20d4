"""What a teacher known by k tokens needs of the student's other logits: the log of their sum, and shares of a number.

Two launches, which read the logits once each; a row is cut into slices, one program for each.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.divergence.layout import FLOOR
from gendistill_kernels.divergence.rows import TABLE
from gendistill_kernels.runtime.launch import Launcher, on_its_device

_FLOOR = tl.constexpr(FLOOR)


@triton.jit
def log_sum_kernel(logits, partials, V, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    row, part = (number // SLICES).to(tl.int64), number % SLICES
    column = part * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(logits + row * V + column, mask=column < V, other=-float("inf"))
    found = tl.where(found < _FLOOR, _FLOOR, found)
    top = tl.max(found, 0)
    # what is minus infinity has no part in the sum, even where nothing is larger
    total = tl.sum(tl.where(found == _FLOOR, 0.0, tl.exp(found - top)), 0)
    tl.store(partials + number, top + tl.log(total))


@triton.jit
def spread_kernel(logits, total, factors, out, V, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    row, part = (number // SLICES).to(tl.int64), number % SLICES
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    found = tl.load(logits + row * V + column, mask=inside, other=-float("inf"))
    found = tl.exp(found - tl.load(total + row)) * tl.load(factors + row)
    tl.store(out + row * V + column, found.to(out.dtype.element_ty), mask=inside)


_log_sum = Launcher(log_sum_kernel)
_spread = Launcher(spread_kernel)


@on_its_device
def log_sum(logits: Tensor) -> Tensor:
    """Compute the log of every row's sum of exponentials, minus infinity where all logits are.

    Args:
        logits: ``[N, V]`` float32, contiguous.
    Returns:
        ``[N]`` float32.
    """
    N, V = logits.shape
    config = TABLE.lookup(logits.device, "tail_sum", 4)
    slices = math.ceil(V / config.block)
    partials = torch.empty(N, slices, dtype=torch.float32, device=logits.device)
    if N:
        _log_sum[(N * slices,)](
            logits, partials, V, SLICES=slices, BLOCK=config.block, num_warps=config.warps
        )
    return partials.logsumexp(1)


@on_its_device
def spread(logits: Tensor, total: Tensor, factors: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Compute ``factors * exp(logits - total)``.

    Args:
        logits: ``[N, V]`` float32, contiguous.
        total, factors: ``[N]`` float32, contiguous.
        dtype: Of the result, ``[N, V]``.
    """
    N, V = logits.shape
    config = TABLE.lookup(logits.device, "tail_gradient", 4)
    slices = math.ceil(V / config.block)
    out = torch.empty(N, V, dtype=dtype, device=logits.device)
    if N:
        _spread[(N * slices,)](
            logits, total, factors, out, V, SLICES=slices, BLOCK=config.block, num_warps=config.warps
        )
    return out

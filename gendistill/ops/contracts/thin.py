"""The kernels of products of few rows as functions, without derivatives; none is traced."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from gendistill.ops.types import THIN_ROWS

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STEP = 8


class ProductKernels(Protocol):
    """The kernels, as ``gendistill_kernels.thin.product`` has them."""

    def product(
        self,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor | None = None,
        *,
        added: Tensor | None = None,
        out: Tensor,
    ) -> Tensor:
        """Write ``x @ matrix.T``, and what is added to it, to ``out``."""
        ...

    def gated_of_sum(
        self, stream: Tensor, mixed: Tensor | None, gain: Tensor, matrix: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return the sum and the hidden values."""
        ...


@functools.cache
def products() -> ProductKernels:
    """Import the kernels, which need triton."""
    from gendistill_kernels.thin import product

    return product


def thin_linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Run a kernel; arguments as :func:`gendistill.ops.thin.thin_linear`, whose checks have been passed.

    Raises:
        ValueError: The kernels cannot take the dtype, or so many rows or weights.
    """
    _check("thin_linear", x, matrix)
    out = torch.empty(len(x), len(matrix), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    return products().product(x if x.stride(1) == 1 else x.contiguous(), matrix, bias, out=out)


def thin_mlp(
    stream: Tensor, mixed: Tensor | None, norm_weight: Tensor, gate_up: Tensor, down: Tensor, *, eps: float
) -> Tensor:
    """Run the kernels; arguments as :func:`gendistill.ops.thin.thin_mlp`, whose checks have been passed.

    Raises:
        ValueError: As for :func:`thin_linear`.
    """
    _check("thin_mlp", stream, gate_up, down)
    if not len(stream):
        return torch.empty_like(stream)
    stream = stream.contiguous()
    mixed = None if mixed is None else mixed.contiguous()
    total, hidden = products().gated_of_sum(stream, mixed, norm_weight, gate_up, eps=eps)
    # a sum of our own may be overwritten
    out = torch.empty_like(stream) if mixed is None else total
    return products().product(hidden, down, added=total, out=out)


def _check(op: str, x: Tensor, *matrices: Tensor) -> None:
    given = x.dtype, *(matrix.dtype for matrix in matrices)
    if other := next((dtype for dtype in given if dtype not in _DTYPES), None):
        raise ValueError(
            f"the kernels of {op} take bfloat16, float16 and float32, got {str(other).removeprefix('torch.')}; "
            'use impl="reference"'
        )
    if len(x) > THIN_ROWS:
        raise ValueError(
            f"the kernels of {op} take up to {THIN_ROWS} rows, got {len(x)}; use a general matrix product"
        )
    for matrix in matrices:
        if matrix.shape[1] % _STEP:
            raise ValueError(
                f"the kernels of {op} take rows of a multiple of {_STEP} weights, got {matrix.shape[1]}; "
                'use impl="reference"'
            )

"""Products of few rows, as in decode steps: they cost the bytes of their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gendistill.ops.reference import thin as reference
from gendistill.ops.select import Impl, contract, is_triton, obstacle
from gendistill.ops.types import THIN_ROWS

# weights of a row are read eight at a time
_STEP = 8
_HALF = (torch.bfloat16, torch.float16)


def suits(x: Tensor, matrix: Tensor) -> bool:
    """Say whether the kernels are there for a product of ``x`` with a matrix, and faster than a general one.

    They are for few rows in half precision on a GPU, without gradients.

    Args:
        x: ``[..., K']`` in any dtype; its rows count alone.
        matrix: ``[N, K]``.
    """
    return (
        not torch.is_grad_enabled()
        and matrix.is_cuda
        and 0 < x.numel() // x.shape[-1] <= THIN_ROWS
        and matrix.dtype in _HALF
        and matrix.shape[1] % _STEP == 0
        and obstacle("thin", matrix.device) is None
    )


def thin_linear(
    x: Tensor, matrix: Tensor, bias: Tensor | None = None, *, impl: Impl | str = Impl.REFERENCE
) -> Tensor:
    """Multiply few rows with the rows of a matrix: ``x @ matrix.T + bias``.

    On a GPU the weights are read ahead, while kernels launched before are still running. None of these may write them:
    between such a kernel and this op, another must be launched that does not start early, as none of torch's does.

    Args:
        x: ``[M, K]``, M at most ``THIN_ROWS`` and K a multiple of 8 for the kernels.
        matrix: ``[N, K]`` in the dtype of x, contiguous.
        bias: ``[N]`` in that dtype.
        impl: Implementation; :func:`gendistill.ops.resolve` chooses one for ``op="thin"``.
    Returns: ``[M, N]`` in the dtype of x; the kernels sum in float32 and round once.
    Raises:
        ValueError: Shapes or dtypes disagree, or a gradient is asked for, which this op does not have.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got {_shape(x)}")
    _check_matrix("matrix", matrix, None, x.shape[1], x.dtype)
    _check_matrix("bias", bias, len(matrix), None, x.dtype)
    _refuse_gradients("thin_linear", x, matrix, bias)
    if is_triton(impl):
        return _contract().thin_linear(x, matrix, bias)
    return reference.thin_linear(x, matrix, bias)


def thin_mlp(
    stream: Tensor,
    mixed: Tensor | None,
    norm_weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    eps: float,
    impl: Impl | str = Impl.REFERENCE,
) -> Tensor:
    """Run the second half of a decoder layer on few rows: ``s + down(silu(gate(n)) * up(n))``.

    Here s is ``stream + mixed``, rounded to the dtype of the stream, and n its RMSNorm. Weights, that of the norm too,
    are read ahead, as :func:`thin_linear` says. The kernels round nothing between a sum and the next product but the
    hidden values.

    Args:
        stream: ``[M, K]``, the residual stream; M, K and I as M and K of :func:`thin_linear`. It is not written.
        mixed: ``[M, K]`` in any dtype, what a mixer adds to it; None for nothing.
        norm_weight: ``[K]``.
        gate_up: ``[2 I, K]``, the rows of gates before those of values; contiguous, in the dtype of arithmetic.
        down: ``[K, I]``, likewise.
        eps: Added to the mean of squares.
        impl: Implementation.
    Returns: ``[M, K]`` in the dtype of the stream.
    Raises:
        ValueError: As for :func:`thin_linear`.
    """
    if stream.dim() != 2:
        raise ValueError(f"stream must be [M, K], got {_shape(stream)}")
    K = stream.shape[1]
    if mixed is not None and mixed.shape != stream.shape:
        raise ValueError(f"mixed must be {_shape(stream)} as the stream, got {_shape(mixed)}")
    _check_matrix("gate_up", gate_up, None, K, None)
    if len(gate_up) % 2:
        raise ValueError(f"gate_up must have a gate for every value, got {len(gate_up)} rows")
    _check_matrix("down", down, K, len(gate_up) // 2, gate_up.dtype)
    _check_matrix("norm_weight", norm_weight, K, None, None)
    _refuse_gradients("thin_mlp", stream, mixed, norm_weight, gate_up, down)
    if is_triton(impl):
        return _contract().thin_mlp(stream, mixed, norm_weight, gate_up, down, eps=eps)
    return reference.thin_mlp(stream, mixed, norm_weight, gate_up, down, eps=eps)


def _contract():
    if TYPE_CHECKING:
        import gendistill.ops.contracts.thin as found

        return found
    return contract("thin")


def _check_matrix(
    name: str, part: Tensor | None, rows: int | None, columns: int | None, dtype: torch.dtype | None
) -> None:
    """Hold a matrix of so many rows and columns, or a vector of so many rows, against what it must be."""
    if part is None:
        return
    expected = [rows] if name in ("bias", "norm_weight") else [rows, columns]
    fits = part.dim() == len(expected) and all(
        size in (None, found) for size, found in zip(expected, part.shape, strict=True)
    )
    if not fits:
        words = ", ".join("N" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must be [{words}], got {_shape(part)}")
    if dtype is not None and part.dtype != dtype:
        raise ValueError(f"{name} must be {_dtype(dtype)}, got {_dtype(part.dtype)}")
    if not part.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {part.stride()} of {_shape(part)}")


def _refuse_gradients(op: str, *parts: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        raise ValueError(f"{op} has no gradients, but an input wants one; call it under torch.no_grad()")


def _shape(part: Tensor) -> str:
    return str([*part.shape])


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

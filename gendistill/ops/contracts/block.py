"""The kernels of a decoder layer as functions with derivatives. Training calls them eagerly; none is traced."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gendistill.ops.types import Segments
from gendistill_kernels.block.layout import Tiles


class NormKernels(Protocol):
    """The kernels, as ``gendistill_kernels.block.norm`` has them."""

    def rms_norm_forward(
        self, x: Tensor, added: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sum, norm and its factor."""
        ...

    def rms_norm_backward(
        self,
        grad_y: Tensor,
        grad_total: Tensor | None,
        total: Tensor,
        weight: Tensor,
        rstd: Tensor,
        *,
        added: torch.dtype | None,
        want_weight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of x, of what was added, and of the weight."""
        ...


class RopeKernels(Protocol):
    """The kernels, as ``gendistill_kernels.block.rope`` has them."""

    def rotate_forward(
        self,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys."""
        ...

    def rotate_backward(
        self,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        eps: float,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of qkv and of the norms' weights."""
        ...


class AttentionKernels(Protocol):
    """The kernels, as ``gendistill_kernels.block.attention`` has them."""

    def attend_forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, *, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output ``[N, H, D]`` and ``[H, N]``, the logarithm of every query's sum."""
        ...

    def attend_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tiles: Tiles,
        *,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        ...


class GLUKernels(Protocol):
    """The kernels, as ``gendistill_kernels.block.glu`` has them."""

    def swiglu_forward(self, both: Tensor) -> Tensor:
        """Return ``silu(gate) * up``."""
        ...

    def swiglu_backward(
        self, grad: Tensor, both: Tensor, *, want_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of ``both``, and the forward pass's output or None."""
        ...


@functools.cache
def norms() -> NormKernels:
    """Import the kernels, which need triton."""
    from gendistill_kernels.block import norm

    return norm


@functools.cache
def ropes() -> RopeKernels:
    """Import the kernels, which need triton."""
    from gendistill_kernels.block import rope

    return rope


@functools.cache
def attentions() -> AttentionKernels:
    """Import the kernels, which need triton."""
    from gendistill_kernels.block import attention

    return attention


@functools.cache
def glus() -> GLUKernels:
    """Import the kernels, which need triton."""
    from gendistill_kernels.block import glu

    return glu


def rms_norm(
    x: Tensor, weight: Tensor, added: Tensor | None, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as :func:`gendistill.ops.block.rms_norm`."""
    return _Norm.apply(x.contiguous(), weight, added, eps, dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, added: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, y, rstd = norms().rms_norm_forward(x, added, weight, eps=eps, dtype=dtype)
        ctx.save_for_backward(total, weight, rstd)
        ctx.added = None if added is None else added.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        if grad_y is None:
            grad_added = None if ctx.added is None or grad_total is None else grad_total.to(ctx.added)
            return grad_total, None, grad_added, None, None
        grad_x, grad_added, grad_weight = norms().rms_norm_backward(
            grad_y, grad_total, total, weight, rstd, added=ctx.added, want_weight=ctx.needs_input_grad[1]
        )
        return grad_x if ctx.needs_input_grad[0] else None, grad_weight, grad_added, None, None


def attend(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: tuple[int, int],
    eps: float,
    window: int | None,
    segments: Segments,
) -> Tensor:
    """Run the kernels; arguments as :func:`gendistill.ops.block.attend`."""
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    return _Attend.apply(qkv, q_weight, k_weight, cos, sin, heads, eps, window, segments)  # pyright: ignore[reportReturnType]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: tuple[int, int],
        eps: float,
        window: int | None,
        segments: Segments,
    ) -> Tensor:
        num_heads, num_kv_heads = heads
        q, k = ropes().rotate_forward(
            qkv, q_weight, k_weight, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps
        )
        tiles = segments.table(Tiles.of)
        out, lse = attentions().attend_forward(q, k, _values(qkv, heads), tiles, window=window)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, q, k, out, lse)
        ctx.heads, ctx.eps, ctx.window, ctx.segments = heads, eps, window, segments
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, cos, sin, q, k, out, lse = ctx.saved_tensors
        grads = attentions().attend_backward(
            grad.reshape(out.shape).contiguous(),
            q,
            k,
            _values(qkv, ctx.heads),
            out,
            lse,
            ctx.segments.table(Tiles.of),
            window=ctx.window,
        )
        want = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grads = ropes().rotate_backward(
            *grads, qkv, q_weight, k_weight, cos, sin, eps=ctx.eps, want_weights=want
        )
        return (*grads, None, None, None, None, None, None)


def _values(qkv: Tensor, heads: tuple[int, int]) -> Tensor:
    num_heads, num_kv_heads = heads
    return qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))[:, num_heads + num_kv_heads :]


def swiglu_forward(both: Tensor) -> Tensor:
    """Run the kernel: ``silu(gate) * up`` of ``[..., gate | up]``."""
    return glus().swiglu_forward(both)


def swiglu_backward(grad: Tensor, both: Tensor, *, want_hidden: bool) -> tuple[Tensor, Tensor | None]:
    """Run the kernel; returns the gradient of ``both``, and the forward pass's output or None."""
    return glus().swiglu_backward(grad, both, want_hidden=want_hidden)

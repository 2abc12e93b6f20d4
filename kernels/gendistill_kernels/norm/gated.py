"""RMSNorm over the channels of every head, times an activated gate, forward and backward: one launch each.

With V channels per head, and mean over them::

    r = 1 / sqrt(mean(o^2) + eps)      n = r o      y = w n act(gate)
    dn = dy w act(gate)      do = r (dn - n mean(dn n))      dw = sum dy act(gate) n      dgate = dy w n act'(gate)

Every head of every token is one row of V, of o and of the gate alike. Without a norm, n is o and w is one.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import math
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.norm.layout import Gradients
from gendistill_kernels.norm.rows import TABLE
from gendistill_kernels.runtime.launch import Launcher, on_its_device
from gendistill_kernels.runtime.lookup import Config


@triton.jit
def _activate(raw, GATE: tl.constexpr):
    """Return the activation of a raw gate and its derivative."""
    s = tl.sigmoid(raw)
    if GATE == "silu":
        return raw * s, s + raw * s * (1.0 - s)
    return s, s * (1.0 - s)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    o, weight, gate, out, rows, eps,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, BV)
    inside = (first + row < rows)[:, None] & (column < V)[None, :]
    cells = row[:, None] * V + column[None, :]
    value = tl.load(o + first * V + cells, mask=inside, other=0.0).to(tl.float32)
    if GATE != "none":
        raw = tl.load(gate + first * V + cells, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(value * value, 1) / V + eps)
        value = value * rstd[:, None] * w[None, :]
    if GATE != "none":
        value *= _activate(raw, GATE)[0]
    tl.store(out + first * V + cells, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs", "rounds"])
def backward_kernel(
    grad_out, o, weight, gate, grad_o, grad_gate, partial, rows, programs, rounds, eps,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, BV)
    cells = row[:, None] * V + column[None, :]
    if NORM:
        w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
        d_weight = tl.zeros([ROWS, BV], tl.float32)
    for lap in range(0, rounds):
        # what runs at the same time lies side by side
        first = (program + lap * programs) * ROWS
        inside = (first + row < rows)[:, None] & (column < V)[None, :]
        value = tl.load(o + first * V + cells, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + first * V + cells, mask=inside, other=0.0).to(tl.float32)
        if GATE != "none":
            raw = tl.load(gate + first * V + cells, mask=inside, other=0.0).to(tl.float32)
            act, slope = _activate(raw, GATE)
            d_gate = grad * slope
            grad *= act
        if NORM:
            rstd = tl.rsqrt(tl.sum(value * value, 1) / V + eps)[:, None]
            value *= rstd
            d_weight += grad * value
            grad *= w
            grad = rstd * (grad - value * (tl.sum(grad * value, 1) / V)[:, None])
        if GATE != "none":
            d_gate *= value * w if NORM else value
            tl.store(grad_gate + first * V + cells, d_gate.to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_o + first * V + cells, grad.to(grad_o.dtype.element_ty), mask=inside)
    if NORM:
        tl.store(partial + program * V + column, tl.sum(d_weight, 0), mask=column < V)


_forward = Launcher(forward_kernel)
_backward = Launcher(backward_kernel)


def _layout(o: Tensor, gate: Tensor | None, activation: str, config: Config) -> tuple[int, dict[str, Any]]:
    """Count rows and choose the constants of a kernel: a tile is rows times channels, rounded up to a power of two."""
    if (gate is None) != (activation == "none"):
        raise ValueError(
            f'a gate belongs to every activation but none, got "{activation}" and gate {gate is None}'
        )
    if gate is not None and gate.numel() != o.numel():
        raise ValueError(f"gate and o must be of one size, got {tuple(gate.shape)} and {tuple(o.shape)}")
    V = o.shape[-1]
    wide = triton.next_power_of_2(V)
    return o.numel() // V, {"V": V, "BV": wide, "ROWS": max(1, config.block // wide), "GATE": activation}


def _contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


@on_its_device
def gated_norm_forward(
    o: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    *,
    activation: Literal["silu", "sigmoid", "none"] = "silu",
    eps: float = 1e-6,
) -> Tensor:
    """Normalise every head and gate it; float32 inside.

    Args:
        o: ``[..., H, V]``, V up to 256.
        weight: ``[V]``, or None for no norm.
        gate: ``[..., H * V]`` before its activation; None if that is ``none``.
        activation: Of the gate.
        eps: Added to the mean of squares.
    Raises:
        ValueError: The gate disagrees with o or with the activation.
    Returns:
        ``[..., H * V]`` in ``o.dtype``, contiguous.
    """
    config = TABLE.lookup(o.device, "norm_forward", o.dtype.itemsize)
    rows, constants = _layout(o, gate, activation, config)
    out = torch.empty(*o.shape[:-2], o.shape[-2] * o.shape[-1], dtype=o.dtype, device=o.device)
    _forward[(triton.cdiv(rows, constants["ROWS"]),)](
        o.contiguous(),
        weight,
        _contiguous(gate),
        out,
        rows,
        eps,
        **constants,
        NORM=weight is not None,
        num_warps=config.warps,
    )
    return out


@on_its_device
def gated_norm_backward(
    grad_out: Tensor,
    o: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    *,
    activation: Literal["silu", "sigmoid", "none"] = "silu",
    eps: float = 1e-6,
) -> Gradients:
    """Differentiate ``gated_norm_forward`` from its inputs alone.

    Args:
        grad_out: ``[..., H * V]``.
        o, weight, gate, activation, eps: As in the forward pass.
    Raises:
        ValueError: As in the forward pass.
    """
    config = TABLE.lookup(o.device, "norm_backward", o.dtype.itemsize)
    rows, constants = _layout(o, gate, activation, config)
    tiles = math.ceil(rows / constants["ROWS"])
    # the shape alone decides which rows a program sums over: the same input gives the same bits
    programs = max(1, min(tiles, config.programs))
    grad_o = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    grad_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=o.device)
    partial = None
    if weight is not None:
        partial = torch.empty(programs, o.shape[-1], dtype=torch.float32, device=o.device)
    _backward[(programs,)](
        grad_out.contiguous(), o.contiguous(), weight, _contiguous(gate), grad_o, grad_gate, partial,
        rows, programs, triton.cdiv(tiles, programs), eps, **constants, NORM=weight is not None, num_warps=config.warps,
    )  # fmt: skip
    d_weight = None if weight is None or partial is None else partial.sum(0).to(weight.dtype)
    return Gradients(grad_o, d_weight, grad_gate)

"""From projected queries, keys and values to what attention reads, and back: head norms and rotary positions.

For every head of q and k, with w its norm's weight and c, s the cosines and sines of a token's positions::

    n = w r x      y1 = n1 c1 - n2 s1      y2 = n2 c2 + n1 s2          (first and second half of the channels)

Backwards, the turn is undone, then the norm as usual; the values' gradient is put beside the others, so that one
product takes all of them through the projection.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.block.rows import TABLE, power_of_2
from gendistill_kernels.runtime.launch import Launcher, on_its_device


@triton.jit
def turn(
    source, weight, cos, sin, eps, column, inside, HALF: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Normalise and turn a head of some tokens; returns both halves in float32."""
    one = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / (2 * HALF) + eps)[:, None]
        one *= scale * tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        two *= scale * tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    c1 = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + HALF, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + HALF, mask=inside, other=0.0).to(tl.float32)
    return one * c1 - two * s1, two * c2 + one * s2


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    qkv, q_weight, k_weight, cos, sin, q, k, rows, eps,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    head = tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, BH)
    inside = (first + row < rows)[:, None] & (column < HALF)[None, :]
    D: tl.constexpr = 2 * HALF
    source = qkv + (first + row[:, None]) * ((H + 2 * KV) * D) + head * D + column[None, :]
    weight = q_weight if head < H else k_weight
    place = (first + row[:, None]) * D + column[None, :]
    one, two = turn(source, weight, cos + place, sin + place, eps, column, inside, HALF, NORM)
    if head < H:
        target = q + (first + row[:, None]) * (H * D) + head * D + column[None, :]
    else:
        target = k + (first + row[:, None]) * (KV * D) + (head - H) * D + column[None, :]
    tl.store(target, one.to(q.dtype.element_ty), mask=inside)
    tl.store(target + HALF, two.to(q.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs", "rounds"])
def backward_kernel(
    grad_q, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, grad_qkv, partial, rows, programs, rounds, eps,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, BH)
    D: tl.constexpr = 2 * HALF
    if WEIGHT:
        d_one = tl.zeros([ROWS, BH], tl.float32)
        d_two = tl.zeros([ROWS, BH], tl.float32)
    if NORM:
        weight = q_weight if head < H else k_weight
        w1 = tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    for lap in range(0, rounds):
        first = (program + lap * programs) * ROWS
        inside = (first + row < rows)[:, None] & (column < HALF)[None, :]
        target = grad_qkv + (first + row[:, None]) * ((H + 2 * KV) * D) + head * D + column[None, :]
        if head < H:
            source = grad_q + (first + row[:, None]) * (H * D) + head * D + column[None, :]
        elif head < H + KV:
            source = grad_k + (first + row[:, None]) * (KV * D) + (head - H) * D + column[None, :]
        else:
            source = grad_v + (first + row[:, None]) * (KV * D) + (head - H - KV) * D + column[None, :]
        y1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        y2 = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        if head < H + KV:
            place = (first + row[:, None]) * D + column[None, :]
            c1 = tl.load(cos + place, mask=inside, other=0.0).to(tl.float32)
            s1 = tl.load(sin + place, mask=inside, other=0.0).to(tl.float32)
            c2 = tl.load(cos + place + HALF, mask=inside, other=0.0).to(tl.float32)
            s2 = tl.load(sin + place + HALF, mask=inside, other=0.0).to(tl.float32)
            one = y1 * c1 + y2 * s2
            two = y2 * c2 - y1 * s1
            if NORM:
                raw = qkv + (first + row[:, None]) * ((H + 2 * KV) * D) + head * D + column[None, :]
                x1 = tl.load(raw, mask=inside, other=0.0).to(tl.float32)
                x2 = tl.load(raw + HALF, mask=inside, other=0.0).to(tl.float32)
                scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
                x1 *= scale
                x2 *= scale
                if WEIGHT:
                    d_one += one * x1
                    d_two += two * x2
                one *= w1
                two *= w2
                mean = ((tl.sum(one * x1, 1) + tl.sum(two * x2, 1)) / D)[:, None]
                one = scale * (one - x1 * mean)
                two = scale * (two - x2 * mean)
            y1 = one
            y2 = two
        tl.store(target, y1.to(grad_qkv.dtype.element_ty), mask=inside)
        tl.store(target + HALF, y2.to(grad_qkv.dtype.element_ty), mask=inside)
    if WEIGHT:
        mine = partial + (program * (H + KV) + head) * D + column
        sums = (column < HALF) & (head < H + KV)
        tl.store(mine, tl.sum(d_one, 0), mask=sums)
        tl.store(mine + HALF, tl.sum(d_two, 0), mask=sums)


_forward = Launcher(forward_kernel)
_backward = Launcher(backward_kernel)


def _tile(kernel: str, qkv: Tensor, rows: int, head_dim: int) -> tuple[int, int, int, int]:
    config = TABLE.lookup(qkv.device, kernel, qkv.dtype.itemsize)
    wide = power_of_2(head_dim // 2)
    number = min(max(1, config.block // (2 * wide)), power_of_2(rows))
    return wide, number, config.warps, config.programs


@on_its_device
def rotate_forward(
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
    """Normalise and turn the heads of queries and keys; float32 inside.

    Args:
        qkv: ``[N, (H + 2 KV) * D]`` contiguous: queries, keys, values.
        q_weight, k_weight: ``[D]`` of the head norms, or None for no norm.
        cos, sin: ``[N, D]``, each angle twice; contiguous.
        num_heads, num_kv_heads: H and KV.
        eps: Of the norms.
    Returns: ``[N, H, D]`` queries and ``[N, KV, D]`` keys.
    """
    rows = qkv.shape[0]
    D = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    wide, number, warps, _ = _tile("block_rope_forward", qkv, rows, D)
    q = torch.empty(rows, num_heads, D, dtype=qkv.dtype, device=qkv.device)
    k = torch.empty(rows, num_kv_heads, D, dtype=qkv.dtype, device=qkv.device)
    norm = q_weight is not None
    _forward[(-(-rows // number), num_heads + num_kv_heads)](
        qkv, q_weight if norm else cos, k_weight if norm else cos, cos, sin, q, k, rows, eps,
        H=num_heads, KV=num_kv_heads, HALF=D // 2, BH=wide, ROWS=number, NORM=norm, num_warps=warps,
    )  # fmt: skip
    return q, k


@on_its_device
def rotate_backward(
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
    """Differentiate ``rotate_forward``, and put the gradient of the values beside the others.

    Args:
        grad_q, grad_k, grad_v: ``[N, H, D]``, ``[N, KV, D]`` and ``[N, KV, D]``.
        qkv, q_weight, k_weight, cos, sin, eps: As in the forward pass.
        want_weights: Whether the norms learn.
    Returns: The gradients of ``qkv`` and, where they learn, of the norms.
    """
    rows, H, D = grad_q.shape
    KV = grad_k.shape[1]
    wide, number, warps, most = _tile("block_rope_backward", qkv, rows, D)
    tiles = -(-rows // number)
    heads = H + 2 * KV
    # the shape alone decides which rows a program sums over: the same input gives the same bits
    programs = max(1, min(tiles, most // heads if want_weights else tiles))
    grad_qkv = torch.empty_like(qkv)
    norm = q_weight is not None
    partial = (
        torch.empty(programs, H + KV, D, dtype=torch.float32, device=qkv.device) if want_weights else cos
    )
    _backward[(programs, heads)](
        grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous(), qkv, q_weight if norm else cos,
        k_weight if norm else cos, cos, sin, grad_qkv, partial, rows, programs, -(-tiles // programs), eps,
        H=H, KV=KV, HALF=D // 2, BH=wide, ROWS=number, NORM=norm, WEIGHT=want_weights, num_warps=warps,
    )  # fmt: skip
    if q_weight is None or k_weight is None or not want_weights:
        return grad_qkv, None, None
    sums = partial.sum(0)
    return grad_qkv, sums[:H].sum(0).to(q_weight.dtype), sums[H:].sum(0).to(k_weight.dtype)

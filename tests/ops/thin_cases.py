"""Inputs of products of few rows, and what they are, written out in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MLP(NamedTuple):
    """What the second half of a decoder layer reads."""

    stream: Tensor
    mixed: Tensor | None
    norm_weight: Tensor
    gate_up: Tensor
    down: Tensor


def normal(*shape: int, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    """Draw a tensor, the same values for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def linear(M, N, K, *, bias=True, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw rows, weights and a bias."""
    kind = {"dtype": dtype, "device": device}
    return (
        normal(M, K, **kind),
        normal(N, K, seed=1, **kind) / K**0.5,
        normal(N, seed=2, **kind) if bias else None,
    )


def mlp(M, K, inner, *, mixed=True, stream=None, dtype=torch.float32, device="cpu") -> MLP:
    """Draw an MLP; the residual stream may be of another dtype, and rows differ in size."""
    kind = {"dtype": dtype, "device": device}
    sizes = torch.logspace(-1, 1, M, dtype=torch.float64)[:, None]
    return MLP(
        (normal(M, K, dtype=torch.float64) * sizes).to(dtype=stream or dtype, device=device),
        (normal(M, K, seed=1, dtype=torch.float64) * sizes).to(**kind) if mixed else None,
        normal(K, seed=2, **kind) / 2 + 1,
        normal(2 * inner, K, seed=3, **kind) / K**0.5,
        normal(K, inner, seed=4, **kind) / inner**0.5,
    )


def whole(x: MLP, *, eps: float) -> Tensor:
    """Compute it in float64, but for the rounding of the sum."""
    total = x.stream if x.mixed is None else (x.stream.double() + x.mixed.double()).to(x.stream.dtype)
    total = total.double()
    length = (total * total).sum(1, keepdim=True) / total.shape[1]
    normed = total / (length + eps).sqrt() * x.norm_weight.double()
    gate, up = (normed @ x.gate_up.double().T).chunk(2, dim=1)
    return total + (gate / (1 + (-gate).exp()) * up) @ x.down.double().T


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a row."""
    off = (found.double() - expected.double()).norm(dim=-1) / (expected.double().norm(dim=-1) + 1e-12)
    return off.max().item()

"""Fill new tensors by the schemes that a mixer's table names, and read half-lives back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gendistill.anatomy.spec import Init


def initial_value(init: Init, shape: tuple[int, ...], *, generator: torch.Generator | None = None) -> Tensor:
    """Make the starting value of one parameter.

    Args:
        init: Scheme and its numbers.
        shape: Sizes of the parameter.
        generator: CPU generator for the random schemes.
    Returns:
        Float32 CPU tensor of that shape.
    Raises:
        ValueError: Unknown scheme.
    """
    if init.scheme == "zeros":
        return torch.zeros(shape)
    if init.scheme == "ones":
        return torch.ones(shape)
    if init.scheme == "constant":
        return torch.full(shape, init.values[0])
    if init.scheme == "normal":
        return torch.randn(shape, generator=generator) * init.values[0]
    if init.scheme == "last_tap":
        weight = torch.zeros(shape)
        weight[..., -1] = 1.0
        return weight
    if init.scheme == "log_uniform_a":  # A_log = log A with A uniform
        low, high = init.values
        return torch.log(low + (high - low) * torch.rand(shape, generator=generator))
    if init.scheme == "softplus_inverse_log_uniform":
        low, high = (math.log(value) for value in init.values)
        return _softplus_inverse(torch.exp(low + (high - low) * torch.rand(shape, generator=generator)))
    if init.scheme == "half_life_bounded":
        low, high, bound = init.values
        rate = math.log(2) / _spread_half_lives(shape, low, high, generator)
        return torch.logit((rate / -bound).clamp(1e-6, 1 - 1e-6))
    if init.scheme == "half_life_softplus":
        low, high = init.values
        return _softplus_inverse(math.log(2) / _spread_half_lives(shape, low, high, generator))
    raise ValueError(f'unknown initialisation scheme "{init.scheme}"')


def _softplus_inverse(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def _spread_half_lives(
    shape: tuple[int, ...], low: float, high: float, generator: torch.Generator | None
) -> Tensor:
    """Deal an even log grid to the channels in random order, so that every head spans the range."""
    count = math.prod(shape)
    grid = torch.tensor(half_life_grid(count, low, high), dtype=torch.float64)
    return grid[torch.randperm(count, generator=generator)].reshape(shape).float()


def half_life_grid(count: int, low: float, high: float) -> list[float]:
    """Space ``count`` half-lives evenly in log over [low, high] tokens."""
    if count == 1:
        return [math.sqrt(low * high)]
    step = math.log(high / low) / (count - 1)
    return [low * math.exp(step * index) for index in range(count)]


def half_lives(log_decay: Tensor) -> Tensor:
    """Convert natural-log decay per token (<= 0) to half-lives in tokens."""
    return math.log(2) / (-log_decay.float()).clamp_min(1e-12)

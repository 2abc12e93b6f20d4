"""The short convolutions of a mixer, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class PackedTaps:
    """Taps of depthwise convolutions over channels that lie side by side, copied one below the other.

    Where gradients are recorded, the convolutions' own parameters are what is read.

    Args:
        convolutions: With ``weight`` ``[C, 1, W]`` and ``bias`` ``[C]`` or None, the same for all.

    Attributes:
        weight: ``[C, W]``, C the channels of all, in the dtype of the parameters.
        bias: ``[C]``, or None.
        sources, targets: Parameters, and where each is in ``weight`` or ``bias``.
    """

    def __init__(self, convolutions: Sequence[Any]) -> None:
        weights = [each.weight for each in convolutions]
        biases = [each.bias for each in convolutions if each.bias is not None]
        self.weight, targets = _beside(weights)
        self.bias, more = _beside(biases) if biases else (None, [])
        self.sources: list[Tensor] = [*weights, *biases]
        self.targets: list[Tensor] = [*targets, *more]
        self.weight = self.weight.squeeze(1)

    def release(self) -> None:
        """Let go of the parameters, which are where they were."""
        self.sources, self.targets = [], []


def can_pack(convolutions: Sequence[Any]) -> bool:
    """Say whether there are convolutions, and this process has their parameters whole."""
    return bool(convolutions) and not any(isinstance(each.weight, DTensor) for each in convolutions)


def _beside(parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Make room for tensors one below the other; returns it whole, and in parts."""
    sizes = [len(part) for part in parts]
    whole = torch.zeros(sum(sizes), *parts[0].shape[1:], dtype=parts[0].dtype, device=parts[0].device)
    return whole, list(whole.split(sizes))

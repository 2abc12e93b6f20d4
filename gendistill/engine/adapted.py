"""Low-rank adapters beside packed linear layers, in the dtype of arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gendistill.engine.products import add_product, grad_dtype, product


def plain(layer: Any) -> nn.Linear:
    """Return the linear layer that an adapter stands beside, or the layer itself."""
    return getattr(layer, "base_layer", layer)


def why_not_packed(layer: nn.Module) -> str | None:
    """Say what keeps a linear layer, plain or adapted by peft, from being packed; None if nothing does."""
    if type(layer) is nn.Linear:
        return None
    adapted: Any = layer
    if type(plain(layer)) is not nn.Linear or len(getattr(adapted, "lora_A", ())) != 1:
        return f"one of its linear layers is a {type(layer).__name__}"
    if adapted.disable_adapters:
        return "its adapters are switched off"
    if adapted.merged or any(adapted.use_dora.values()) or any(adapted.lora_bias.values()):
        return "its adapters are of another kind than a stage's own"
    if any(isinstance(each, nn.Dropout) for each in adapted.lora_dropout.values()):
        return "its adapters have dropout"
    if any(isinstance(each, DTensor) for each in layer.parameters()):
        return "its adapters are split among processes"
    return None


class Adapters:
    """The adapters of some of several packed layers: ``scale * up(down(x))`` is added to a layer's output.

    Args:
        layers: As they stand in the model, plain or adapted.
        places: First and one past the last column of each layer in the packed output.
        dtype: Of arithmetic.

    Attributes:
        parameters: ``down`` ``[rank, in_features]`` and ``up`` ``[out_features, rank]`` of every adapter.
        targets: Where these are kept in the dtype of arithmetic.
    """

    def __init__(self, layers: Sequence[Any], places: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
        adapted = [
            (layer, place) for layer, place in zip(layers, places, strict=True) if plain(layer) is not layer
        ]
        self.places = [place for _, place in adapted]
        self.parameters: list[Tensor] = []
        self.scales: list[float] = []
        for layer, _ in adapted:
            ((name, down),) = layer.lora_A.items()
            self.parameters += [down.weight, layer.lora_B[name].weight]
            self.scales.append(layer.scaling[name])
        self.ranks = list(pairwise(accumulate((len(down) for down in self.parameters[::2]), initial=0)))
        first = self.parameters[0]
        # the first factors as one matrix, which reads the input once
        self.down = torch.empty(self.ranks[-1][1], first.shape[1], dtype=dtype, device=first.device)
        self.ups = [torch.empty_like(up, dtype=dtype) for up in self.parameters[1::2]]
        self.targets: list[Tensor] = []
        for (start, end), up in zip(self.ranks, self.ups, strict=True):
            self.targets += [self.down[start:end], up]

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add what the adapters say about ``x`` ``[N, in_features]`` to ``out`` ``[N, rows]``, in place."""
        inner = x @ self.down.T
        for (start, end), (low, high), up, scale in self._parts():
            target = out[:, start:end]
            found = add_product(target, scale * inner[:, low:high], up.T, in_place=True)
            if found is not target:
                target.copy_(found)

    def outer(self, grad: Tensor) -> Tensor:
        """Return the gradient between the factors ``[N, ranks]`` from that of the output ``[N, rows]``."""
        return torch.cat(
            [scale * (grad[:, start:end] @ up) for (start, end), _, up, scale in self._parts()], dim=-1
        )

    def grads(self, grad: Tensor, x: Tensor, outer: Tensor) -> list[Tensor]:
        """Return the gradients of ``parameters``; what is between the factors is computed again."""
        inner = x @ self.down.T
        whole = product(outer.T, x)
        found: list[Tensor] = []
        for (start, end), (low, high), _, scale in self._parts():
            found += [whole[low:high], scale * product(grad[:, start:end].T, inner[:, low:high])]
        return [
            each.to(grad_dtype(parameter)) for each, parameter in zip(found, self.parameters, strict=True)
        ]

    def _parts(self) -> zip[tuple[tuple[int, int], tuple[int, int], Tensor, float]]:
        return zip(self.places, self.ranks, self.ups, self.scales, strict=True)

"""One process: nothing to share."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Single:
    """This process alone.

    Args:
        device: Where.
    """

    rank = 0
    world = 1
    is_main = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def shard(self, module: nn.Module) -> nn.Module:
        """Move the module."""
        return module.to(self.device)

    def accumulating(self, module: nn.Module, *, last: bool) -> contextlib.nullcontext[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale all gradients; return their norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def sum(self, value: Tensor) -> Tensor:
        """Return the tensor."""
        return value

    def largest(self, value: float) -> float:
        """Return the number."""
        return value

    def gather(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors."""
        yield from tensors.items()

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return the tensor, on the device of ``like``."""
        return whole.to(like.device)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()

    def barrier(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Free device memory that nothing uses."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

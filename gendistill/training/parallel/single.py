"""One process: nothing to share."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from gendistill.training.parallel.peers import Situation

T = TypeVar("T")


class Single:
    """This process alone.

    Args:
        device: Where.
    """

    rank = 0
    world = 1
    is_main = True
    machines = 1
    leads_machine = True
    averages = True
    captures = True
    description = "one process"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loads_on = device

    def together(self, situation: Callable[[], Situation]) -> contextlib.nullcontext[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def shard(self, module: nn.Module, *, compute_dtype: torch.dtype) -> nn.Module:
        """Move the module."""
        return module.to(self.device)

    def unshard(self, module: nn.Module) -> None:
        """Do nothing."""

    def place_teacher(self, model: nn.Module) -> None:
        """Move the model."""
        model.to(self.device)

    def whole(self, module: nn.Module) -> contextlib.nullcontext[bool]:
        """Do nothing."""
        return contextlib.nullcontext(False)

    def settle(self, module: nn.Module) -> None:
        """Do nothing."""

    def accumulating(self, module: nn.Module, *, last: bool) -> contextlib.nullcontext[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def holders(self, trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return them."""
        return list(trained)

    def ready(self) -> None:
        """Do nothing."""

    def average(self, gradients: Tensor) -> None:
        """Do nothing."""

    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return the norm of all gradients together, which are whole here."""
        return torch.nn.utils.get_total_norm(gradients)

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

    def scatter(
        self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what is read, on the devices of ``like``."""
        for name, tensor in like.items():
            yield name, read(name).to(tensor.device)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()

    def on_each(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()

    def in_turns(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()

    def folder(self, path: Path) -> Path:
        """Return the folder."""
        return path

    def barrier(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Free device memory that nothing uses."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

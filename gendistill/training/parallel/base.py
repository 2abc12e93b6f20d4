"""What training asks of a way to share it among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Parallel(Protocol):
    """One process among those that train a stage together.

    What is marked *collective* is called on every process, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        ...

    def shard(self, module: nn.Module) -> nn.Module:
        """Return the module to call in training; its parameters may be split, or their gradients be shared.

        Collective. Comes after freezing, which decides whose gradients there are, and before the optimizer, which must
        see the parameters as they stay.
        """
        ...

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Return a context for one micro-batch's passes; gradients are shared in the ``last`` one of a step."""
        ...

    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``limit``; return the norm before. Collective."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Add up the processes' tensors. Collective."""
        ...

    def largest(self, value: float) -> float:
        """Return the largest of the processes' numbers, as float32. Collective."""
        ...

    def gather(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, whole, one after the other; what the main process gets counts.

        Collective: every process goes to the end. The others need not keep what they get.
        """
        ...

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return this process's part of a whole tensor, on the device and with the layout of ``like``."""
        ...

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on the main process; return its result, or raise its error, on every process. Collective."""
        ...

    def barrier(self) -> None:
        """Wait until every process has come here. Collective."""
        ...

    def close(self) -> None:
        """Let go of what was sharded, and of unused device memory."""
        ...


def gather_on_main(parallel: Parallel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors for the main process to keep; the others get nothing. Collective."""
    return {name: whole for name, whole in parallel.gather(tensors) if parallel.is_main}

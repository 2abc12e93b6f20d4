"""What training asks of a way to share it among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from gendistill.training.parallel.peers import Situation

T = TypeVar("T")


class Parallel(Protocol):
    """One process among those that train a stage together.

    What is marked *collective* is called on every process, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        device: Where this process computes.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def machines(self) -> int:
        """Number of machines. Collective."""
        ...

    @property
    def leads_machine(self) -> bool:
        """Whether this process is the first of its machine."""
        ...

    @property
    def loads_on(self) -> torch.device:
        """Where models are loaded, before ``shard`` and ``place_teacher`` bring them where they are used."""
        ...

    @property
    def description(self) -> str:
        """How many processes there are and what they share, for people."""
        ...

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        ...

    def together(self, situation: Callable[[], Situation]) -> AbstractContextManager[None]:
        """Return a context in which the loss of another process is noticed in bounded time. Collective.

        Args:
            situation: What is said beside the lost process's rank, at that moment.
        Raises:
            TrainingError: A process is lost.
        """
        ...

    def shard(self, module: nn.Module, *, compute_dtype: torch.dtype) -> nn.Module:
        """Return the module to call in training; its parameters may be split, or their gradients be shared.

        Collective. Comes after freezing, which decides whose gradients there are, and before the optimizer, which must
        see the parameters as they stay.

        Args:
            module: A ``DistillStep`` on ``loads_on``.
            compute_dtype: Of the arithmetic, to which autocast takes float32 weights.
        Raises:
            TrainingError: The student cannot be split.
        """
        ...

    def unshard(self, module: nn.Module) -> None:
        """Undo ``shard`` in place, after training: on the main process the parameters are whole. Collective."""
        ...

    def place_teacher(self, model: nn.Module) -> None:
        """Bring a teacher that is run to the device, in place; its blocks may be split. Collective.

        Done once for several stages; a second time changes nothing.
        """
        ...

    def whole(self, module: nn.Module) -> AbstractContextManager[bool]:
        """Return a context in which a sharded module has the parameters that stand in it while it runs. Collective.

        It says whether they are copies that no optimizer changes.
        """
        ...

    def settle(self, module: nn.Module) -> None:
        """Let go of what passes without gradients have left in memory."""
        ...

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Return a context for one micro-batch's passes; gradients are shared in the ``last`` one of a step."""
        ...

    @property
    def averages(self) -> bool:
        """Whether gradients are shared by ``average``, once they are all there, and not while they are computed."""
        ...

    @property
    def captures(self) -> bool:
        """Whether passes may be captured as CUDA graphs, now that models are placed: nothing is shared inside them."""
        ...

    def holders(self, trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """List what gets gradients in passes that may be captured, in the place of what an optimizer updates."""
        ...

    def ready(self) -> None:
        """Have weights be where passes that were captured read them. Collective."""
        ...

    def average(self, gradients: Tensor) -> None:
        """Average gradients over the processes, after passes in which nothing was shared. Collective.

        Args:
            gradients: Of all ``holders``, as one tensor.
        """
        ...

    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return the norm of all gradients together, with the parts on other processes. Collective."""
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

    def scatter(
        self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield this process's parts of tensors, one after the other, with the layout and device of ``like``.

        Collective: every process goes to the end.

        Args:
            like: What the parts are for, by name, in the same order everywhere.
            read: Returns a whole tensor; asked on the main process only.
        """
        ...

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on the main process; return its result, or raise its error, on every process. Collective."""
        ...

    def on_each(self, work: Callable[[], T]) -> T:
        """Do something on every process and return its own result; the error of one is raised on all. Collective."""
        ...

    def in_turns(self, work: Callable[[], T]) -> T:
        """As ``on_each``, but the first process of every machine is done before its others begin. Collective."""
        ...

    def folder(self, path: Path) -> Path:
        """Return where this process finds a folder that the main process has filled. Collective.

        On machines that do not share the main process's file system it is a copy, until the next call or ``close``.
        """
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

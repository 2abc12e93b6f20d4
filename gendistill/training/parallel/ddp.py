"""Several processes with a whole student each, and a share of every step's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from gendistill.training.parallel.group import Group


class DataParallel(Group):
    """Several processes that share gradients.

    Args:
        accelerator: Of more than one process.
        patience_s: As for ``Group``.
        overlaps: Whether gradients are shared while others are still computed, by torch's own wrapper of a module;
            else all at once by ``average``, between CUDA graphs that no hook can look into.
    """

    def __init__(self, accelerator: Accelerator, *, patience_s: float, overlaps: bool = True) -> None:
        super().__init__(accelerator, patience_s=patience_s)
        self.averages = not overlaps

    @property
    def description(self) -> str:
        """What is shared."""
        return f"{self.world} processes, each with the whole student and teacher (ddp)"

    @property
    def loads_on(self) -> torch.device:
        """Models are loaded where they are used."""
        return self.device

    def shard(self, module: nn.Module, *, compute_dtype: torch.dtype) -> nn.Module:
        """Have all processes begin with the same module, and share its gradients."""
        if not self.averages:
            return self.accelerator.prepare_model(module)
        module.to(self.device)
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        return module

    def unshard(self, module: nn.Module) -> None:
        """Do nothing: every process has the module whole."""

    def place_teacher(self, model: nn.Module) -> None:
        """Move the model."""
        model.to(self.device)

    def whole(self, module: nn.Module) -> AbstractContextManager[bool]:
        """Do nothing."""
        return nullcontext(False)

    def settle(self, module: nn.Module) -> None:
        """Do nothing."""

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Share gradients in the last micro-batch only."""
        return nullcontext() if last or self.averages else self.accelerator.no_sync(module)

    @property
    def captures(self) -> bool:
        """Whether no hook of a wrapper would have to run inside a graph."""
        return self.averages

    def holders(self, trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return them."""
        return list(trained)

    def ready(self) -> None:
        """Do nothing."""

    def average(self, gradients: Tensor) -> None:
        """Average gradients over the processes, unless the module's wrapper has."""
        if self.averages:
            dist.all_reduce(gradients)
            gradients /= self.world

    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return the norm of all gradients together, which are whole here."""
        return torch.nn.utils.get_total_norm(gradients)

    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale all gradients, which are the same everywhere; return their norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def gather(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors: every process has them whole."""
        yield from tensors.items()

    def scatter(
        self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Send every process the tensors whole, one after the other."""
        for name, tensor in like.items():
            whole = read(name).to(tensor.device) if self.is_main else torch.empty_like(tensor)
            dist.broadcast(whole, src=0)
            yield name, whole

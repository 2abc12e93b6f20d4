"""Several processes with a whole student each, and a share of every step's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn

from gendistill.errors import GendistillError, TrainingError
from gendistill_evals.errors import EvalError

T = TypeVar("T")

# the others shard parameters or step optimizers behind the loop's back
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class DataParallel:
    """Several processes that share gradients.

    Args:
        accelerator: Of more than one process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.accelerator.is_main_process

    def shard(self, module: nn.Module) -> nn.Module:
        """Wrap the module, so that the processes share gradients."""
        return self.accelerator.prepare_model(module)

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Share gradients in the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(module)

    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale all gradients, which are the same everywhere; return their norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def sum(self, value: Tensor) -> Tensor:
        """Add up the processes' tensors."""
        total = self.accelerator.reduce(value, "sum")
        assert isinstance(total, Tensor)
        return total

    def largest(self, value: float) -> float:
        """Return the largest of the processes' numbers, as float32."""
        gathered = self.accelerator.gather(torch.tensor([value], dtype=torch.float32, device=self.device))
        assert isinstance(gathered, Tensor)
        return gathered.max().item()

    def gather(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors: every process has them whole."""
        yield from tensors.items()

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return the tensor, on the device of ``like``."""
        return whole.to(like.device)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on the first process; return its result, or raise its error, on every process."""
        outcome: list[object] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (GendistillError, EvalError) as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if isinstance(outcome[1], GendistillError | EvalError):
            raise outcome[1]
        return outcome[0]  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Let go of the wrapped module, and of unused device memory."""
        self.accelerator.free_memory()


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse launch settings under which the loss or its gradients would silently be others.

    Raises:
        TrainingError: Gradient accumulation, mixed precision or sharding is set outside the recipe.
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise TrainingError(
            f"accelerate is set to accumulate {accelerator.gradient_accumulation_steps} steps, which would divide "
            "every gradient once more",
            where="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            hint="unset it; the recipe's batch_size and micro_batch_size say how much is accumulated",
        )
    if accelerator.mixed_precision != "no":
        raise TrainingError(
            f"accelerate is set to mixed precision {accelerator.mixed_precision}; the loop brings its own",
            where="ACCELERATE_MIXED_PRECISION",
            hint="launch with --mixed_precision no: on GPU the stage computes in bfloat16 anyway",
        )
    if accelerator.distributed_type not in _SUPPORTED:
        raise TrainingError(
            f"accelerate is set to {accelerator.distributed_type.value}; supported: one process, or data parallel",
            where="accelerate config",
            hint="launch with --multi_gpu, or on one process",
        )

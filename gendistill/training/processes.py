"""What several processes of one run must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from gendistill.errors import GendistillError, TrainingError
from gendistill_evals.errors import EvalError

T = TypeVar("T")

# the others shard parameters or step optimizers behind the loop's back
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


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


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something on the main process and return its result, or raise its error, on every process."""
    if accelerator.num_processes == 1:
        return work()
    outcome: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except (GendistillError, EvalError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[1], GendistillError | EvalError):
        raise outcome[1]
    return outcome[0]  # pyright: ignore[reportReturnType]


def largest(accelerator: Accelerator, value: float) -> float:
    """Return the largest of the processes' values."""
    if accelerator.num_processes == 1:
        return value
    gathered = accelerator.gather(torch.tensor([value], dtype=torch.float32, device=accelerator.device))
    assert isinstance(gathered, torch.Tensor)
    return gathered.max().item()

"""Find where a loss or gradient stopped being finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gendistill.data.batch import Batch


def first_non_finite(
    student: nn.Module,
    run: Callable[[Batch], Tensor],
    micro_batches: Sequence[Batch],
    *,
    largest: Callable[[float], float] = float,
) -> str:
    """Name the first place where a step goes wrong, in the order of computation.

    Looks at the parameters, then runs the forward pass again and watches every module's output, then at the
    gradients of the step. Several processes do all this alike, and name what any of them finds first.

    Args:
        student: The model, with the gradients of the failing step.
        run: Computes one micro-batch's loss, without gradients.
        micro_batches: The failing step's.
        largest: Of the processes' numbers.
    """

    def earliest(places: Iterable[int]) -> int | None:
        first = -largest(-min(places, default=math.inf))
        return None if math.isinf(first) else int(first)

    # a sharded module shows others while it runs
    parameters = list(student.named_parameters())
    bad = earliest(place for place, (_, value) in enumerate(parameters) if not _is_finite(value))
    if bad is not None:
        return f"parameter {parameters[bad][0]}"
    modules = [(name, module) for name, module in student.named_modules() if name]
    found: list[int] = []

    def watch(place: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, Tensor) and not _is_finite(tensor):
                found.append(place)

        return hook

    handles = [module.register_forward_hook(watch(place)) for place, (_, module) in enumerate(modules)]
    losses = []
    places: list[int] = []
    try:
        for number, batch in enumerate(micro_batches):
            losses.append(run(batch))
            # in the order of computation, which is not that of names, as far as one process knows it
            places += [number * len(modules) + place for place in found]
            found.clear()
    finally:
        for handle in handles:
            handle.remove()
    bad = earliest(places)
    if bad is not None:
        return f"output of {modules[bad % len(modules)][0]} (micro-batch {bad // len(modules)})"
    bad = earliest(number for number, loss in enumerate(losses) if not _is_finite(loss))
    if bad is not None:
        return f"loss of micro-batch {bad}, though every module's output is finite"
    gradients = [(name, value.grad) for name, value in reversed(parameters)]
    bad = earliest(
        place for place, (_, value) in enumerate(gradients) if value is not None and not _is_finite(value)
    )
    if bad is not None:
        return f"gradient of {gradients[bad][0]}, though the forward pass is finite"
    return "another process's share of the batch, or a sum that overflowed"


def _is_finite(value: Tensor) -> bool:
    """Look at a tensor, of a split one at this process's part."""
    if isinstance(value, DTensor):
        value = value.to_local()
    return bool(torch.isfinite(value).all())

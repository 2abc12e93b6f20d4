"""Find where a loss or gradient stopped being finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gendistill.data.batch import Batch


def first_non_finite(
    student: nn.Module, run: Callable[[Batch], Tensor], micro_batches: Sequence[Batch]
) -> str:
    """Name the first place where a step goes wrong, in the order of computation.

    Looks at the parameters, then runs the forward pass again and watches every module's output, then at the
    gradients of the step.

    Args:
        student: The model, with the gradients of the failing step.
        run: Computes one micro-batch's loss, without gradients.
        micro_batches: The failing step's.
    """
    for name, parameter in student.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in student.named_modules() if name]
    try:
        for number, batch in enumerate(micro_batches):
            loss = run(batch)
            if found:
                return f"output of {found[0]} (micro-batch {number})"
            if not torch.isfinite(loss):
                return f"loss of micro-batch {number}, though every module's output is finite"
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in reversed(list(student.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}, though the forward pass is finite"
    return "another process's share of the batch, or a sum that overflowed"

"""One optimizer step's forward and backward passes, normalised by what the whole step counts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gendistill.data.batch import Batch
from gendistill.losses.base import LossTerm, Objective, TeacherSignals


class DistillStep(nn.Module):
    """Wrap student and objective, so that data parallelism also covers loss code that reads the student's weights."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, batch: Batch, signals: TeacherSignals) -> LossTerm:
        return self.objective(self.student, signals, batch)


class StepRunner:
    """Compute gradients of a step's mean loss, whatever its split into micro-batches and processes.

    Args:
        student: On the accelerator's device, with ``requires_grad`` already set: it is wrapped here.
        teacher: On the same device, or unused by the objective.
        objective: What to minimise.
        accelerator: Decides device and number of processes.

    Attributes:
        compute_dtype: Float32, or the dtype of autocast: of matmuls and activations, never of weights.
    """

    compute_dtype: torch.dtype = torch.float32

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        objective: Objective,
        accelerator: Accelerator,
    ) -> None:
        self.plain_module = DistillStep(student, objective)
        self.module = accelerator.prepare_model(self.plain_module)
        self.teacher = teacher
        self.objective = objective
        self.accelerator = accelerator
        self.device = accelerator.device

    def accumulate(self, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Add the gradients of the step's mean loss to ``grad``.

        Args:
            micro_batches: This process's share of the step.
        Returns:
            ``[1 + parts]`` float32, the loss and its parts per counted position, over all processes; and an int64
            scalar, the step's tokens.
        """
        local = [
            sum(batch.num_labels for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
        ]
        counts: Any = torch.tensor(local, device=self.device)
        # labels alone give the denominator, so it is known before the first forward pass
        counts = self.accelerator.reduce(counts, "sum")
        num_labels = counts[0].clamp(min=1)
        # data parallelism averages gradients over processes: undo its division
        scale = self.accelerator.num_processes / num_labels
        sums: Any = torch.zeros(1 + len(self.objective.part_names), device=self.device)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                term = self._forward(self.module, batch)
                self.accelerator.backward(term.total * scale)
            sums += torch.stack([term.total.detach(), *term.parts.values()])
        return self.accelerator.reduce(sums, "sum") / num_labels, counts[1]

    def rehearse(self, batch: Batch) -> None:
        """Run forward and backward once, for timing; no process waits for another, gradients are left behind."""
        with self.accelerator.no_sync(self.module):
            self.accelerator.backward(self._forward(self.module, batch).total)

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Compute one micro-batch's summed loss on this process alone."""
        return self._forward(self.plain_module, batch).total

    def _forward(self, module: nn.Module, batch: Batch) -> LossTerm:
        batch = batch.to(self.device)
        signals = self.objective.observe(self.teacher, batch)
        autocast = self.compute_dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=autocast):
            return module(batch, signals)

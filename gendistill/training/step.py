"""One optimizer step's forward and backward passes, normalised by what the whole step counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gendistill.data.batch import Batch
from gendistill.losses.base import LossTerm, Objective
from gendistill.teachers.base import Teacher, TeacherSignals
from gendistill.training.clock import StepClock
from gendistill.training.parallel import Parallel


class DistillStep(nn.Module):
    """Student and objective as one module, so that parallelism also covers loss code that reads the student's head.

    ``module(batch, signals, measure)`` runs something else than the objective, such as held-out scores.
    """

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student: Any = student
        self.objective = objective

    def forward(
        self, batch: Batch, signals: TeacherSignals, measure: Callable[..., Any] | None = None
    ) -> Any:
        return (measure or self.objective)(self.student, signals, batch)


class StepRunner:
    """The gradients of a step's mean loss, whatever its split into micro-batches and processes.

    Args:
        student: With ``requires_grad`` already set: it is sharded here.
        objective: What to minimise.
        teacher: Asked for what the objective needs.
        parallel: Decides device and number of processes.
        compute_dtype: Float32, or the dtype of autocast: of matmuls and activations, never of weights.
        clock: Notes what the parts of a step take, while it runs.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        teacher: Teacher,
        parallel: Parallel,
        *,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.compute_dtype = compute_dtype
        self.plain_module = DistillStep(student, objective)
        self.module = parallel.shard(self.plain_module, compute_dtype=compute_dtype)
        self.teacher = teacher
        self.objective = objective
        self.parallel = parallel
        self.device = parallel.device
        self.clock = StepClock(parallel.device)

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
        # labels alone give the denominator, so it is known before the first forward pass
        counts = self.parallel.sum(torch.tensor(local).to(self.device, non_blocking=True))
        num_labels = counts[0].clamp(min=1)
        # data parallelism averages gradients over processes: undo its division
        scale = self.parallel.world / num_labels
        sums = torch.zeros(1 + len(self.objective.part_names), device=self.device)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with self.parallel.accumulating(self.module, last=last):
                term = self._forward(self.module, batch)
                with self.clock.part("student", backward=True):
                    (term.total * scale).backward()
            sums += torch.stack([term.total.detach(), *term.parts.values()])
        return self.parallel.sum(sums) / num_labels, counts[1]

    def rehearse(self, batch: Batch, *, last: bool = False) -> None:
        """Run forward and backward once, for timing; gradients are left behind.

        Where parameters are split, or gradients are shared, every process has to do it as often.

        Args:
            batch: A micro-batch.
            last: Whether to share gradients, as after the last one of a step.
        """
        with self.parallel.accumulating(self.module, last=last):
            self._forward(self.module, batch).total.backward()

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Compute one micro-batch's summed loss. Where parameters are split, every process has to do it."""
        return self._forward(self.plain_module, batch).total

    def _forward(self, module: nn.Module, batch: Batch) -> LossTerm:
        batch = batch.to(self.device)
        with self.clock.part("teacher"):
            signals = self.teacher.signals(batch, self.objective.needs)
        autocast = self.compute_dtype is not torch.float32
        with (
            self.clock.part("student"),
            torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=autocast),
        ):
            return module(batch, signals)


def seed_step(parallel: Parallel, seed: int, step: int) -> None:
    """Seed this process for one step: a pure function, so that resuming needs no random state.

    Args:
        parallel: Its processes draw different numbers.
        seed: The recipe's.
        step: Steps finished before this one.
    """
    stream = (seed * 1_000_003 + step) * parallel.world + parallel.rank
    torch.manual_seed(stream % 2**63)

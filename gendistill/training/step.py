"""One optimizer step's forward and backward passes, normalised by what the whole step counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gendistill.data.batch import Batch, without_surplus
from gendistill.engine.decoder import refreshed
from gendistill.losses.base import LossTerm, Objective
from gendistill.teachers.base import Teacher, TeacherSignals
from gendistill.training.capture import RUNS_UNTIL_LAUNCHED, CapturedPasses, HeldGradients
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
        self.captured: CapturedPasses | None = None
        self._gradients: HeldGradients | None = None
        if parallel.averages and parallel.world > 1:
            self._hold_gradients(each for each in student.parameters() if each.requires_grad)
        self._fused: list[Any] = []
        self._scale = torch.ones((), device=parallel.device)

    def capture(self, trained: Iterable[nn.Parameter], *, failed: Callable[[str], None]) -> None:
        """Launch passes as CUDA graphs from now on; :func:`why_not_captured` must have nothing against it.

        Args:
            trained: What gets gradients.
            failed: Told why, if it cannot be done after all.
        """
        if self._gradients is None:
            self._hold_gradients(trained)
        self.captured = CapturedPasses(
            self._passes,
            models=self._models,
            clock=self.clock,
            device=self.device,
            failed=failed,
            objective=self.objective,
        )

    def _hold_gradients(self, trained: Iterable[nn.Parameter]) -> None:
        """Keep gradients in one tensor, in which processes share them after the last micro-batch."""
        self._gradients = HeldGradients(self.parallel.holders(trained))

    @property
    def rehearsals(self) -> int:
        """How often a micro-batch has to be run until the next time is as fast as all that follow."""
        return 1 if self.captured is None else RUNS_UNTIL_LAUNCHED

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients of an optimizer's parameters."""
        optimizer.zero_grad()
        if self._gradients is not None:
            self._gradients.clear()

    def release(self) -> None:
        """Let go of graphs and of their memory."""
        if self.captured is not None:
            self.captured.release()
            self.captured = None

    @property
    def peak_bytes(self) -> int:
        """Most bytes of the GPU that have been in use at a time, as far as that is known."""
        highest = torch.cuda.max_memory_allocated(self.device)
        if self.captured is None:
            return highest
        # what passes take inside of graphs comes and goes unseen
        return max(highest, torch.cuda.memory_allocated(self.device) + self.captured.num_bytes)

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
        self._scale.copy_(self.parallel.world / num_labels)
        sums = torch.zeros(1 + len(self.objective.part_names), device=self.device)
        self._refresh()
        for number, batch in enumerate(micro_batches):
            sums += self._run(batch, last=number == len(micro_batches) - 1)
        return self.parallel.sum(sums) / num_labels, counts[1]

    def _run(self, batch: Batch, *, last: bool) -> Tensor:
        """Add a micro-batch's gradients; returns the sums of the loss and its parts."""
        shared = not self.parallel.averages
        if self.captured is not None and all(self._fused):
            sums, shared = self.captured(batch.to(self.device)), False
        else:
            with self.parallel.accumulating(self.module, last=last):
                sums = self._passes(without_surplus(batch), self.module)
        if last and not shared and self._gradients is not None:
            self.parallel.average(self._gradients.whole)
        return sums

    def _passes(self, batch: Batch, module: nn.Module | None = None) -> Tensor:
        term = self._forward(module or self.plain_module, batch)
        with self.clock.part("student", backward=True):
            (term.total * self._scale).backward()
        return torch.stack([term.total.detach(), *term.parts.values()])

    @property
    def _models(self) -> list[Any]:
        return [model for model in (self.plain_module.student, self.teacher.model) if model is not None]

    def _refresh(self) -> None:
        """Bring what is derived from weights up to date, which a graph takes as it is."""
        if self.captured is None:
            return
        self.parallel.ready()
        fused = [refreshed(model) for model in self._models]
        if fused != self._fused:
            # the copies that graphs read are gone
            self.captured.release()
            self._fused = fused
        self.captured.look()

    def rehearse(self, batch: Batch, *, last: bool = False) -> None:
        """Run forward and backward once, for timing; gradients are left behind.

        Where parameters are split, or gradients are shared, every process has to do it as often.

        Args:
            batch: A micro-batch.
            last: Whether to share gradients, as after the last one of a step.
        """
        self._refresh()
        self._run(batch, last=last)

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

"""What looks at a stage while it runs: small values that are asked at fixed moments, and answer with numbers or a stop.

What a monitor finds at a step, a log line or a checkpoint stands under its name in the next line of ``metrics.jsonl``;
what it finds at the end, in ``result.json``. After the checkpoint of the last step there is no next line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from gendistill.data.batch import Batch
from gendistill.engine.decoder import release
from gendistill.errors import TrainingError
from gendistill.losses.student import StudentLike
from gendistill.teachers.base import Teacher
from gendistill.training.checkpoint import Progress, find_checkpoint
from gendistill.training.console import TrainingConsole
from gendistill.training.diagnose import first_non_finite
from gendistill.training.heldout import score_heldout
from gendistill.training.job import Due, StageJob
from gendistill.training.lock import StageLock
from gendistill.training.meter import Meter
from gendistill.training.parallel import Parallel
from gendistill.training.step import StepRunner

When = Literal["step", "log", "save", "end"]
_EFFECTIVE = 0.99  # share of trained tensors that must have changed


@dataclass(frozen=True, slots=True)
class Stop:
    """The wish that a stage ends with this step, as if it had been planned so long.

    Attributes:
        reason: What people are told.
    """

    reason: str


class StageInProgress(Protocol):
    """What a monitor may look at, and must not change; ``training.stage.StageRun`` is one.

    Attributes:
        job: What the stage was asked to do.
        student, module: The model that learns, as losses see it and as a module.
        teacher: Whose signals it learns from.
        parallel: The processes that share the stage.
        console: Where to speak.
        runner, optimizer: What computes gradients and what applies them.
        micro_batches: Of the step that was taken last.
        trained: Parameters that learn, by name.
        unchanged: At the end, names of those that are as they were.
        lock: Number of steps and dtype of the arithmetic, fixed when the stage began.
        progress: Steps, tokens and losses so far.
        meter: Sums since the last log line; to read it waits for the device.
        due: What is done between these two steps.
    """

    job: StageJob
    student: StudentLike
    module: nn.Module
    teacher: Teacher
    parallel: Parallel
    console: TrainingConsole
    runner: StepRunner
    optimizer: torch.optim.AdamW
    micro_batches: list[Batch]
    trained: dict[str, nn.Parameter]
    unchanged: list[str]
    lock: StageLock
    progress: Progress
    meter: Meter
    due: Due

    @property
    def is_over(self) -> bool:
        """Whether the last step has been taken."""
        ...

    @property
    def tensors_changed(self) -> float:
        """At the end, share of the trained tensors that differ from the start."""
        ...


class Monitor(Protocol):
    """Something that looks at a stage. It is asked on every process, and its answer must be the same on each."""

    @property
    def when(self) -> When:
        """Ask after every optimizer step, in every log line, after every checkpoint, or at the end of the stage."""
        ...

    @property
    def every(self) -> int | None:
        """Ask only after so many steps; None: every time. Steps at which a ``log`` monitor is asked are logged."""
        ...

    def __call__(self, run: StageInProgress) -> Mapping[str, float] | Stop | None:
        """Look at the stage between two steps.

        At ``step``, waiting for the device slows training down; ``run.due`` says whether it is waited for anyway.

        Returns: Finite numbers by name, the wish to stop, or nothing.
        """
        ...


class NonFinite:
    """An error at the first loss or gradient that is not finite, which says where it came from."""

    when: When = "step"
    every = None

    def __init__(self, job: StageJob) -> None:
        self.job = job

    def __call__(self, run: StageInProgress) -> None:
        """Raise TrainingError if something was not finite."""
        if not run.due.waits:
            return
        bad_step = run.meter.read().bad_step
        if bad_step is None:
            return
        job, steps = self.job, run.lock.steps
        place = "it happened between two log lines; set log_every_steps: 1 to see where"
        if bad_step == run.progress.step:
            # clipping has spread the first NaN over all gradients: compute them again
            run.optimizer.zero_grad()
            # modules that run fused do not say what each of them computed
            release(run.student)
            run.runner.accumulate(run.micro_batches)
            found = first_non_finite(
                run.module, run.runner.loss, run.micro_batches, largest=run.parallel.largest
            )
            place = f"first seen in the {found}"
        kept = run.parallel.on_main(lambda: find_checkpoint(job.checkpoints, run.console.say))
        raise TrainingError(
            f"loss or gradient is not finite at step {bad_step} of {steps}; {place}. "
            + (f"The checkpoint {kept} is intact" if kept else "No checkpoint had been saved yet"),
            where=f"stages.{job.name}",
            hint=f"lower stages.{job.name}.lr or grad_clip, delete {job.folder} and run the same command again; "
            "unchanged, it would resume and stop at the same step",
        )


class HeldOut:
    """Scores on held-out text every so many steps; at the end of a stage it is scored anyway."""

    when: When = "log"

    def __init__(self, every: int) -> None:
        self.every = every

    def __call__(self, run: StageInProgress) -> dict[str, float] | None:
        """Return what ``score_heldout`` does."""
        return None if run.is_over else heldout_scores(run)


class Effect:
    """A warning when training has left trained tensors as they were."""

    when: When = "end"
    every = None

    def __init__(self, job: StageJob) -> None:
        self.name = job.name

    def __call__(self, run: StageInProgress) -> None:
        """Count the tensors that did not change."""
        if run.tensors_changed < _EFFECTIVE:
            run.console.warn(
                f"{self.name}: {len(run.unchanged)} of {len(run.trained)} trained tensors did not change at all, "
                f"such as {', '.join(run.unchanged[:3])}: the rate may be too small, or the objective does not reach "
                "them"
            )


def watch_heldout(job: StageJob) -> HeldOut | None:
    """Score held-out text where the recipe asks for it."""
    return None if job.heldout_every is None else HeldOut(job.heldout_every)


# name -> builder, asked in this order; None: not wanted for this stage
MONITORS: dict[str, Callable[[StageJob], Monitor | None]] = {
    "non_finite": NonFinite,
    "heldout": watch_heldout,
    "effect": Effect,
}


def heldout_scores(run: StageInProgress) -> dict[str, float]:
    """Score the stage's student as it is.

    Raises:
        TrainingError: A score is not finite.
    """
    job = run.job
    scores = score_heldout(
        run.student,
        run.teacher,
        job.heldout,
        compute_dtype=run.lock.dtype,
        parallel=run.parallel,
        module=run.runner.plain_module,
    )
    if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise TrainingError(
            f"held-out {', '.join(bad)} is not finite at step {run.progress.step} of {run.lock.steps}",
            where=f"stages.{job.name}",
            hint=f"lower stages.{job.name}.lr or grad_clip, delete {job.folder} and run the same command again",
        )
    return scores

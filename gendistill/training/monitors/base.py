"""What a monitor is: asked at fixed moments, it answers with numbers, or with the wish to stop or to go back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gendistill.data.batch import Batch
from gendistill.losses.base import Objective
from gendistill.losses.student import StudentLike
from gendistill.teachers.base import Teacher
from gendistill.training.checkpoint import Progress
from gendistill.training.console import TrainingConsole
from gendistill.training.job import Due, StageJob
from gendistill.training.lock import StageLock
from gendistill.training.meter import Meter, Stopwatch
from gendistill.training.parallel import Parallel
from gendistill.training.step import StepRunner

When = Literal["step", "log", "save", "end"]


@dataclass(frozen=True, slots=True)
class Stop:
    """The wish that a stage ends with this step, as if it had been planned so long.

    Attributes:
        reason: What people are told.
        found: Numbers for the log line, as in an answer without a wish.
    """

    reason: str
    found: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rewind:
    """The wish to go back to the newest intact checkpoint, and on from there with other rows.

    Weights, moments and the number of the step are the checkpoint's; the rows that were read since then are not read
    again. A stage goes back at most ``non_finite.rewinds`` times.

    Attributes:
        reason: What people are told.
        skip_to: The last step whose rows are left out; None: the latest one.
    """

    reason: str
    skip_to: int | None = None


class StageInProgress(Protocol):
    """What a monitor may look at, and must not change; ``training.stage.StageRun`` is one.

    Attributes:
        job: What the stage was asked to do.
        student, module: The model that learns, as losses see it and as a module.
        objective: What is minimised.
        teacher: Whose signals it learns from.
        parallel: The processes that share the stage.
        console: Where to speak.
        runner, optimizer: What computes gradients and what applies them.
        micro_batches: Of the step that was taken last.
        trained: Parameters that learn, by name.
        start: A sample of the trained weights as they were when the stage began, by group; empty if nobody asks.
        unchanged: At the end, names of those that are as they were.
        lock: Number of steps and dtype of the arithmetic, fixed when the stage began.
        progress: Steps, tokens and losses so far. What a monitor keeps under its name in ``progress.memory`` is saved
            with every checkpoint, and is as it was then after a resume.
        meter: Sums since the last log line; to read it waits for the device.
        watch: Seconds in steps since the last log line.
        due: What is done between these two steps.
    """

    job: StageJob
    student: StudentLike
    module: nn.Module
    objective: Objective
    teacher: Teacher
    parallel: Parallel
    console: TrainingConsole
    runner: StepRunner
    optimizer: torch.optim.Optimizer
    micro_batches: list[Batch]
    trained: dict[str, nn.Parameter]
    start: Mapping[str, Tensor]
    unchanged: list[str]
    lock: StageLock
    progress: Progress
    meter: Meter
    watch: Stopwatch
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

    def __call__(self, run: StageInProgress) -> Mapping[str, float] | Stop | Rewind | None:
        """Look at the stage between two steps.

        At ``step``, waiting for the device slows training down; ``run.due`` says whether it is waited for anyway.

        Returns: Finite numbers by name, the wish to stop or to go back, or nothing.
        """
        ...

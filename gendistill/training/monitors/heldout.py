"""Scores on held-out text."""

from __future__ import annotations

import math

from gendistill.errors import TrainingError
from gendistill.training.heldout import HeldoutMeasure, measure_heldout
from gendistill.training.job import StageJob
from gendistill.training.monitors.base import StageInProgress, When


class HeldOut:
    """Scores on held-out text every so many steps; at the end of a stage it is scored anyway."""

    when: When = "log"

    def __init__(self, every: int) -> None:
        self.every = every

    def __call__(self, run: StageInProgress) -> dict[str, float] | None:
        """Return the means over all positions."""
        return None if run.is_over else heldout_measure(run).scores


def watch_heldout(job: StageJob) -> HeldOut | None:
    """Score held-out text where the recipe asks for it."""
    return None if job.heldout_every is None else HeldOut(job.heldout_every)


def heldout_measure(run: StageInProgress) -> HeldoutMeasure:
    """Score the stage's student as it is.

    Raises:
        TrainingError: A score is not finite.
    """
    job = run.job
    measured = measure_heldout(
        run.student,
        run.teacher,
        job.heldout,
        compute_dtype=run.lock.dtype,
        parallel=run.parallel,
        module=run.runner.plain_module,
    )
    if bad := [name for name, value in measured.scores.items() if not math.isfinite(value)]:
        raise TrainingError(
            f"held-out {', '.join(bad)} is not finite at step {run.progress.step} of {run.lock.steps}",
            where=f"stages.{job.name}",
            hint=f"lower stages.{job.name}.lr or grad_clip, delete {job.folder} and run the same command again",
        )
    return measured

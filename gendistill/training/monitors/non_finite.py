"""Steps whose loss or gradient is not finite: one is skipped, several in a row take the stage back."""

from __future__ import annotations

from gendistill.engine.decoder import unfused
from gendistill.errors import TrainingError
from gendistill.training.checkpoint import find_checkpoint
from gendistill.training.diagnose import first_non_finite
from gendistill.training.job import StageJob
from gendistill.training.monitors.base import Rewind, StageInProgress, When


class NonFinite:
    """Rewinds after several steps in a row that were not finite, and an error after too many of them.

    That such steps change nothing is the meter's and the optimizer's doing; this tells people, and decides.
    """

    when: When = "step"
    every = None

    def __init__(self, job: StageJob) -> None:
        self.job, self.rules = job, job.config.non_finite
        self.said = 0

    def __call__(self, run: StageInProgress) -> Rewind | None:
        """Answer with a rewind if it is time for one.

        Raises:
            TrainingError: There is nothing to go back to, the stage has gone back often enough, or none of its steps
                was finite.
        """
        if not run.due.waits:
            return None
        reading = run.meter.read()
        if reading.stuck_at is None and not (run.is_over and reading.skipped == run.progress.step):
            if run.due.log:
                if reading.skipped > self.said:
                    run.console.warn(
                        f"{self.job.name}: {reading.skipped:,} of {run.progress.step:,} steps were not finite and "
                        "changed nothing"
                    )
                # fewer after a return to a checkpoint
                self.said = reading.skipped
            return None
        bad_step = reading.stuck_at or run.progress.step
        many = self.rules.in_a_row
        what = f"loss or gradient is not finite at step {bad_step:,} of {run.lock.steps:,}"
        if many > 1:
            what += f", for {many} steps in a row"
        what += f"; {self._place(run, bad_step)}"
        kept = run.parallel.on_main(lambda: find_checkpoint(self.job.checkpoints, run.console.say))
        gone_back = len(run.progress.rewinds)
        if kept is not None and gone_back < self.rules.rewinds:
            return Rewind(what, skip_to=bad_step)
        raise TrainingError(
            f"{what}. "
            + (f"The checkpoint {kept} is intact" if kept else "No checkpoint had been saved yet")
            + (f", and the stage has gone back {gone_back} times already" if gone_back else ""),
            where=f"stages.{self.job.name}",
            hint=f"lower stages.{self.job.name}.lr or grad_clip, delete {self.job.folder} and run the same command "
            "again; unchanged, it would resume and stop at the same step",
        )

    def _place(self, run: StageInProgress, bad_step: int) -> str:
        """Say where the numbers of a step went wrong, if it is the latest one."""
        if bad_step != run.progress.step:
            return "it happened between two log lines; set log_every_steps: 1 to see where"
        # clipping has spread the first NaN over all gradients: compute them again
        run.runner.clear(run.optimizer)
        with unfused(run.student):
            run.runner.accumulate(run.micro_batches)
            found = first_non_finite(
                run.module, run.runner.loss, run.micro_batches, largest=run.parallel.largest
            )
            return f"first seen in the {found}"

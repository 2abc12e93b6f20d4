"""How fast a stage is beside what its device could do, and what the time of a step goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch

from gendistill.anatomy.cost import peak_flops, step_flops
from gendistill.data.batch import PADDING, Batch
from gendistill.training.job import StageJob
from gendistill.training.monitors.base import StageInProgress, When

# operations of steps, from the numbers of documents by length and the number of labels
Count = Callable[[Mapping[int, int], int], int]


class Speed:
    """Model FLOPs a second of this process, and the share of its device's bfloat16 peak that they are (MFU).

    Only lengths of documents are noted at a step. MFU is left out for a device whose peak is not known.
    """

    when: When = "step"
    every = None

    def __init__(self) -> None:
        self.documents: Counter[int] = Counter()
        self.num_labels = self.step = 0
        self.count: Count | None = None

    def __call__(self, run: StageInProgress) -> dict[str, float] | None:
        """Count the step's documents; before a log line, divide by the time since the last one."""
        if run.progress.step <= self.step:
            # the stage has gone back, and its watch began anew
            self._clear()
        self.step = run.progress.step
        for batch in run.micro_batches:
            self.documents.update(lengths(batch))
            self.num_labels += batch.num_labels
        if not run.due.log:
            return None
        # counted while the device still works
        self.count = self.count or operations_of(run)
        operations = self.count and self.count(self.documents, self.num_labels)
        self._clear()
        run.meter.read()  # waits for the device
        seconds = run.watch.elapsed
        if operations is None or seconds <= 0:
            return None
        found = {"tflops": operations / seconds / 1e12}
        device = run.parallel.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return found if peak is None else {**found, "mfu": operations / seconds / peak}

    def _clear(self) -> None:
        self.documents.clear()
        self.num_labels = 0


def operations_of(run: StageInProgress) -> Count | None:
    """Return what counts the operations of a stage's steps on this process; it outlives the stage.

    Returns: A function of the numbers of documents by length and the number of labels; None for a teacher that does
        not say what it is made of.
    """
    needs, reaches, trained = run.objective.needs, run.objective.reaches, set(run.trained)
    student, teacher = run.student.config.to_dict(), run.teacher.facts.config
    if needs and teacher is None:
        return None

    def count(documents: Mapping[int, int], num_labels: int) -> int:
        return step_flops(
            student,
            teacher if needs else None,
            documents=documents,
            num_labels=num_labels,
            trained=trained,
            reaches=reaches,
            apart=bool(needs.mixer_io or needs.block_io),
            compares_logits=needs.hidden,
        ).total

    return count


class Shares:
    """What the parts of the logged step took of its time."""

    when: When = "log"
    every = None

    def __call__(self, run: StageInProgress) -> dict[str, float] | None:
        """Return shares that add up to one."""
        shares = run.runner.clock.read()
        shares.pop("seconds", None)
        return shares or None


def lengths(batch: Batch) -> list[int]:
    """List the lengths of a batch's documents, padding left out where the batch says what is padding."""
    if not batch.document_ids:
        return [length for length in batch.segments.lengths if length]
    pairs = zip(batch.segments.lengths, batch.document_ids, strict=True)
    return [length for length, document in pairs if document != PADDING]


def watch_speed(job: StageJob) -> Speed | None:
    """Measure speed where the recipe asks for it."""
    return Speed() if job.watch.speed else None


def watch_shares(job: StageJob) -> Shares | None:
    """Measure shares where the recipe asks for speed."""
    return Shares() if job.watch.speed else None

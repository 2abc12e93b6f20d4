"""How fast a stage is beside what its device could do, and what the time of a step goes to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from gendistill.anatomy.cost import peak_flops, step_flops
from gendistill.data.batch import PADDING, Batch
from gendistill.training.job import StageJob
from gendistill.training.monitors.base import StageInProgress, When


class Speed:
    """Model FLOPs a second of this process, and the share of its device's bfloat16 peak that they are (MFU).

    Only lengths of documents are noted at a step. MFU is left out for a device whose peak is not known.
    """

    when: When = "step"
    every = None

    def __init__(self) -> None:
        self.documents: Counter[int] = Counter()
        self.num_labels = 0
        self.configs: tuple[Any, Any] | None = None

    def __call__(self, run: StageInProgress) -> dict[str, float] | None:
        """Count the step's documents; before a log line, divide by the time since the last one."""
        for batch in run.micro_batches:
            self.documents.update(lengths(batch))
            self.num_labels += batch.num_labels
        if not run.due.log:
            return None
        run.meter.read()  # waits for the device
        operations, seconds = self._flops(run), run.watch.elapsed
        self.documents.clear()
        self.num_labels = 0
        if operations is None or seconds <= 0:
            return None
        found = {"tflops": operations / seconds / 1e12}
        device = run.parallel.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return found if peak is None else {**found, "mfu": operations / seconds / peak}

    def _flops(self, run: StageInProgress) -> int | None:
        """Count the operations since the last log line; None for a teacher that does not say what it is made of."""
        needs = run.objective.needs
        if self.configs is None:
            self.configs = run.student.config.to_dict(), run.teacher.facts.config
        student, teacher = self.configs
        if needs and teacher is None:
            return None
        return step_flops(
            student,
            teacher if needs else None,
            documents=self.documents,
            num_labels=self.num_labels,
            trained=run.trained.keys(),
            reaches=run.objective.reaches,
            apart=bool(needs.mixer_io or needs.block_io),
            compares_logits=needs.hidden,
        ).total


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
        return list(batch.segments.lengths)
    pairs = zip(batch.segments.lengths, batch.document_ids, strict=True)
    return [length for length, document in pairs if document != PADDING]


def watch_speed(job: StageJob) -> Speed | None:
    """Measure speed where the recipe asks for it."""
    return Speed() if job.watch.speed else None


def watch_shares(job: StageJob) -> Shares | None:
    """Measure shares where the recipe asks for speed."""
    return Shares() if job.watch.speed else None

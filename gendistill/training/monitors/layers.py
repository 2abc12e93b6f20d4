"""Every new mixer beside the attention that it replaces, on one held-out batch."""

from __future__ import annotations

import math

from gendistill.training.job import StageJob
from gendistill.training.layers import compare_layers
from gendistill.training.monitors.base import StageInProgress, When

_QUANTILES = (5, 50, 95)


class Layers:
    """How close each new mixer's output is to the attention's, on the teacher's own inputs, and how long it remembers.

    By layer: ``<layer>/cosine``, ``<layer>/error`` (relative, 1 is what an output of zero has) and quantiles of its
    gates' half-lives in tokens, ``<layer>/half_life_50``. Nothing for a teacher of another shape.
    """

    when: When = "log"

    def __init__(self, every: int) -> None:
        self.every = every

    def __call__(self, run: StageInProgress) -> dict[str, float] | None:
        """Run the teacher up to its last hidden states, and every new mixer once."""
        batch = next(batch for batch in run.job.heldout if batch.num_labels)
        found = compare_layers(run.student, run.teacher, [batch], compute_dtype=run.lock.dtype)
        run.parallel.settle(run.runner.plain_module)
        numbers: dict[str, float] = {}
        for layer, sums in found.items():
            if not sums.num_positions:
                continue
            numbers |= {f"{layer}/cosine": sums.mean_cosine, f"{layer}/error": sums.relative_error}
            numbers |= {
                f"{layer}/half_life_{name}": value for name, value in sums.quantiles(_QUANTILES).items()
            }
        return {name: value for name, value in numbers.items() if math.isfinite(value)} or None


def watch_layers(job: StageJob) -> Layers | None:
    """Compare layers where the recipe asks for it."""
    every = job.watch.layers_every_steps
    return None if every is None else Layers(every)

"""What looks at a stage while it runs: small values that are asked at fixed moments.

What a monitor finds at a step, a log line or a checkpoint stands under its name in the next line of ``metrics.jsonl``;
what it finds at the end, in ``result.json``. After the checkpoint of the last step there is no next line.
"""

from __future__ import annotations

from collections.abc import Callable

from gendistill.training.job import StageJob
from gendistill.training.monitors.base import Monitor, Rewind, StageInProgress, Stop, When
from gendistill.training.monitors.heldout import watch_heldout
from gendistill.training.monitors.layers import watch_layers
from gendistill.training.monitors.non_finite import NonFinite
from gendistill.training.monitors.speed import watch_shares, watch_speed
from gendistill.training.monitors.weights import Effect, watch_groups
from gendistill.training.monitors.writing import watch_answers, watch_score

__all__ = ["MONITORS", "Monitor", "Rewind", "StageInProgress", "Stop", "When"]

# name -> builder, asked in this order; None: not wanted for this stage
MONITORS: dict[str, Callable[[StageJob], Monitor | None]] = {
    "non_finite": NonFinite,
    "speed": watch_speed,
    "shares": watch_shares,
    "groups": watch_groups,
    "heldout": watch_heldout,
    "layers": watch_layers,
    "answers": watch_answers,
    "score": watch_score,
    "effect": Effect,
}

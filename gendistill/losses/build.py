"""From the ``objective:`` section of a recipe to the function that the loop minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gendistill.config.objectives import ObjectiveConfig
from gendistill.losses.base import Objective
from gendistill.losses.layerwise import align_blocks, align_mixers
from gendistill.losses.logits import compare_logits, mix_logits

# kind -> builder, beside ``config.objectives.OBJECTIVES``: a new objective is one line here, one there, and its file
OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "kl": compare_logits,
    "jsd": compare_logits,
    "ce": compare_logits,
    "mix": mix_logits,
    "mixer_output": align_mixers,
    "block_output": align_blocks,
}


def build_objective(config: ObjectiveConfig) -> Objective:
    """Build a stage's objective."""
    return OBJECTIVES[config.kind](config)

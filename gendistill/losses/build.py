"""From the ``objective:`` section of a recipe to the function that the loop minimises."""

from __future__ import annotations

from gendistill.config.objectives import BlockOutputConfig, MixConfig, MixerOutputConfig, ObjectiveConfig
from gendistill.losses.base import Objective, Signal
from gendistill.losses.layerwise import LayerwiseObjective
from gendistill.losses.logits import LogitObjective, term_of


def build_objective(config: ObjectiveConfig) -> Objective:
    """Build a stage's objective."""
    if isinstance(config, MixerOutputConfig):
        return LayerwiseObjective(Signal.MIXER_IO, config.norm)
    if isinstance(config, BlockOutputConfig):
        return LayerwiseObjective(Signal.BLOCK_IO, config.norm)
    terms = config.terms if isinstance(config, MixConfig) else (config,)
    return LogitObjective([term_of(term) for term in terms])

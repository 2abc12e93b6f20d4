"""An objective from outside: one file."""

from __future__ import annotations

from typing import Literal

import torch

from gendistill.config.objectives import ObjectiveConfig
from gendistill.data.batch import IGNORE
from gendistill.losses.base import LossTerm
from gendistill.losses.student import last_hidden
from gendistill.teachers.base import Needs


class CosineConfig(ObjectiveConfig):
    """One minus the cosine between last hidden states."""

    kind: Literal["cosine"] = "cosine"  # pyright: ignore[reportIncompatibleMethodOverride]
    weight: float = 1.0


class Cosine:
    """Compare directions of last hidden states at counted positions."""

    needs = Needs(hidden=True)
    part_names = ("cosine",)

    def __init__(self, config):
        self.weight = config.weight

    def bind(self, config, teacher):
        assert teacher.hidden_size == config.hidden_size

    def calibrate(self, teacher, batch):
        pass

    def reaches(self, parameter):
        return not parameter.startswith("lm_head.")

    def __call__(self, student, signals, batch):
        counted = batch.labels != IGNORE
        mine, theirs = last_hidden(student, batch)[counted].float(), signals.hidden[counted].float()
        total = self.weight * (1 - torch.cosine_similarity(mine, theirs, dim=-1)).sum()
        return LossTerm(total, counted.sum(), {"cosine": total.detach()})

"""The library face: load, convert, train and score models from Python, as a recipe does from YAML.

Every function returns a value and writes nothing unless it is given a folder. Settings are those of recipes, checked
by the same schema, with the same errors.
"""

from __future__ import annotations

from gendistill.api.calls import convert, dataset, distill, evaluate, generate, probe, run
from gendistill.api.values import Dataset, Evaluation, Model, Run, load

__all__ = [
    "Dataset",
    "Evaluation",
    "Model",
    "Run",
    "convert",
    "dataset",
    "distill",
    "evaluate",
    "generate",
    "load",
    "probe",
    "run",
]

"""Turn a pretrained transformer into a hybrid linear-attention student, and score it by generation.

Importing this package imports no torch; the names below load what they need when first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gendistill.api import (
        Dataset,
        Evaluation,
        Model,
        Run,
        convert,
        dataset,
        distill,
        evaluate,
        generate,
        load,
        probe,
        run,
    )
    from gendistill.config.load import dump_recipe, load_recipe
    from gendistill.runs.planning import plan_run

__version__ = "0.1.0"

_HOMES = {
    "gendistill.api": (
        *("Dataset", "Evaluation", "Model", "Run"),
        *("convert", "dataset", "distill", "evaluate", "generate", "load", "probe", "run"),
    ),
    "gendistill.config.load": ("dump_recipe", "load_recipe"),
    "gendistill.runs.planning": ("plan_run",),
}

__all__ = [
    "Dataset",
    "Evaluation",
    "Model",
    "Run",
    "__version__",
    "convert",
    "dataset",
    "distill",
    "dump_recipe",
    "evaluate",
    "generate",
    "load",
    "load_recipe",
    "plan_run",
    "probe",
    "run",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    # with a name and an object Python can propose the nearest of __dir__
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
    )


def __dir__() -> list[str]:
    return list(__all__)

"""Turn a pretrained transformer into a hybrid linear-attention student, and score it by generation.

Importing this package imports no torch; the names below load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gendistill.config.load import dump_recipe, load_recipe
    from gendistill.runs.planning import plan_run

__version__ = "0.1.0"

__all__ = ["__version__", "dump_recipe", "load_recipe", "plan_run"]


def __getattr__(name: str) -> Any:
    if name in ("dump_recipe", "load_recipe"):
        from gendistill.config import load

        return getattr(load, name)
    if name == "plan_run":
        from gendistill.runs.planning import plan_run

        return plan_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The model that a word names, where the word may also be a recipe or a run folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from gendistill.config.load import load_recipe, means_recipe
from gendistill.errors import CheckpointError
from gendistill.paths import RunDir
from gendistill.text import printable


def model_of(name: str, *, where: str) -> str:
    """Turn a recipe or its run folder into the folder of its student; models stay as they are.

    Args:
        name: A recipe, a run folder or a model.
        where: Name of the argument, for errors.
    Raises:
        CheckpointError: The recipe has not been run to its end.
    """
    if not means_recipe(name):
        return name
    folder = Path(name)
    run = RunDir(folder if (folder / "recipe.yaml").is_file() else load_recipe(name).run_folder)
    if not (run.student / "config.json").is_file():
        there = f"; {run.student_init} is there, and not trained yet" if run.student_init.is_dir() else ""
        raise CheckpointError(
            f"{run.root} has no finished student{there}",
            where=where,
            hint=f"gendistill run {printable(name)}",
        )
    return str(run.student)

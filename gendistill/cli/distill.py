"""``gendistill distill``: the stages."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gendistill.cli.arguments import add_output, add_recipe, command_line, load, pipeline_module
from gendistill.cli.dry_run import add_dry_run, print_plan
from gendistill.cli.launch import add_num_processes, is_launched, launch, say
from gendistill.errors import RecipeError

if TYPE_CHECKING:
    from gendistill.config.schema import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_recipe(parser)
    parser.add_argument(
        "--only", metavar="STAGE", action="append", default=[], help="run this stage only; may be repeated"
    )
    add_dry_run(parser)
    add_num_processes(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train the stages; finished ones are skipped, an interrupted one resumes."""
    recipe = load(arguments)
    only = _stages(arguments.only, recipe)
    if arguments.dry_run:
        return print_plan(recipe, arguments)
    if arguments.num_processes > 1 and not is_launched():
        from gendistill.runs.advice import check_batches

        check_batches(recipe, arguments.num_processes)
        return launch(arguments.num_processes)
    run_dir = pipeline_module().distill(recipe, command=command_line(), only=only)
    say(f"ok        {run_dir.student}   next: gendistill eval {run_dir.root}")
    return 0


def _stages(words: list[str], recipe: Recipe) -> tuple[str, ...]:
    names = tuple(name for word in words for name in word.split(",") if name)
    for name in names:
        if name not in recipe.stages:
            from gendistill.config.document import shortened
            from gendistill.config.explain import closest

            raise RecipeError(
                f'recipe {recipe.name} has no stage "{shortened(name)}"{closest(name, recipe.stages)}; '
                f"stages: {', '.join(recipe.stages) or 'none'}",
                where="--only",
                hint="name one of them, or leave --only out",
            )
    return names

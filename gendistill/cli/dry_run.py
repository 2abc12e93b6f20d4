"""``--dry-run``: print what a command would do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gendistill.cli.arguments import add_json, print_json

if TYPE_CHECKING:
    from gendistill.config.schema import Recipe


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add ``--dry-run``, and ``--json`` for its output."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, memory and tokens; run nothing"
    )
    add_json(parser)


def print_plan(recipe: Recipe, arguments: argparse.Namespace, *, stages: bool = True) -> int:
    """Print the plan of a recipe.

    Args:
        recipe: The recipe.
        arguments: Parsed command line; ``num_processes`` is read where the command has it.
        stages: Whether stages and memory belong to the command.
    """
    from gendistill.runs.planning import plan_run

    plan = plan_run(recipe, num_processes=getattr(arguments, "num_processes", 1))
    if arguments.json:
        print_json(plan.to_json())
    else:
        print(plan.render(stages=stages))
    return 0

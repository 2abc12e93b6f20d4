"""``gendistill data``: what the model will see."""

from __future__ import annotations

import argparse

from gendistill.cli.arguments import add_recipe, load
from gendistill.errors import RecipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_recipe(parser)
    parser.add_argument("--stage", metavar="NAME", help="the stage to show; the first unless given")
    parser.add_argument("-n", "--num-rows", type=int, default=3, metavar="N", help="packed rows to show (3)")


def run(arguments: argparse.Namespace) -> int:
    """Print packed rows of one stage, with the tokens that count in its loss."""
    recipe = load(arguments)
    stage = arguments.stage or next(iter(recipe.stages), None)
    if stage is None or stage not in recipe.stages:
        raise RecipeError(
            f'recipe {recipe.name} has no stage "{stage}"; stages: {", ".join(recipe.stages) or "none"}',
            where="--stage",
        )
    if arguments.num_rows < 1:
        raise RecipeError(f"--num-rows must be at least 1, got {arguments.num_rows}", where="--num-rows")
    from rich.console import Console

    from gendistill.runs.preview import render_preview

    Console(highlight=False, soft_wrap=True).print(render_preview(recipe, stage, arguments.num_rows))
    return 0

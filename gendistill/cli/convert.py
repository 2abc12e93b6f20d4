"""``gendistill convert``: teacher to untrained student."""

from __future__ import annotations

import argparse

from gendistill.cli.arguments import add_output, add_recipe, command_line, load, pipeline_module
from gendistill.cli.dry_run import add_dry_run, print_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_recipe(parser)
    add_dry_run(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert and probe."""
    recipe = load(arguments)
    if arguments.dry_run:
        return print_plan(recipe, arguments, stages=False)
    run_dir = pipeline_module().convert(recipe, command=command_line())
    print(f"ok        {run_dir.student_init}   next: gendistill distill {run_dir.root}")
    return 0

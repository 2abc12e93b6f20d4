"""``gendistill run``: the whole recipe."""

from __future__ import annotations

import argparse

from gendistill.cli.arguments import add_output, add_recipe, command_line, load, pipeline_module
from gendistill.cli.dry_run import add_dry_run, print_plan
from gendistill.cli.launch import add_num_processes, is_launched, launch, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_recipe(parser)
    add_dry_run(parser)
    add_num_processes(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert, distil, evaluate and report; finished steps are skipped."""
    recipe = load(arguments)
    if arguments.dry_run:
        return print_plan(recipe, arguments)
    if arguments.num_processes > 1 and not is_launched():
        from gendistill.runs.advice import check_batches

        check_batches(recipe, arguments.num_processes)
        return launch(arguments.num_processes)
    run_dir = pipeline_module().run(recipe, command=command_line())
    say(f"ok        {run_dir.root}   report: {run_dir.report / 'index.html'}")
    return 0

"""``gendistill report``: the gap between teacher and student, from run files alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from gendistill.cli.arguments import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder; several are compared")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the gap table and write the page."""
    from gendistill.paths import read_json
    from gendistill.report import compare_reports, render_terminal, write_report
    from gendistill.report.run_files import read_run
    from gendistill.text import printable

    folders = [Path(folder) for folder in arguments.runs]
    if arguments.json:
        contents = [read_json(write_report(folder).gap) for folder in folders]
        print_json(contents[0] if len(contents) == 1 else contents)
        return 0
    for folder in folders:
        if len(folders) == 1:
            render_terminal(folder)
        print(f"wrote    {printable(str(write_report(folder).page), longest=4096)}")
    if len(folders) > 1:
        print(compare_reports(folders).to_markdown(), end="")
        for run in map(read_run, folders):
            for warning in run.warnings:
                print(f"warn     {printable(run.name)}: {printable(warning, longest=2000)}")
    return 0

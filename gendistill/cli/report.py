"""``gendistill report``: the gap between teacher and student, from run files alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gendistill.cli.arguments import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder; several are compared")
    parser.add_argument(
        "--gate",
        metavar="EXPR",
        action="append",
        default=[],
        help="fail with exit code 3 if a run does not meet it, as in gap<=3 or TASK.gap<=3; may be repeated",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder of the page of several runs; by default comparison/ beside the first",
    )
    parser.add_argument("--serif", action="store_true", help="set figures with serifs, as papers are")
    parser.add_argument(
        "--width", metavar="INCHES", type=_inches, help="width of figures for print, such as 3.3 for a column"
    )
    add_json(parser)


def _inches(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 1 <= width <= 40:
        raise argparse.ArgumentTypeError(f"a width of 1 to 40 inches, got {text}")
    return width


def run(arguments: argparse.Namespace) -> int:
    """Print the gap table and write the page; hold the runs against gates last."""
    from gendistill.errors import RecipeError
    from gendistill.gates import parse_gate
    from gendistill.paths import read_json
    from gendistill.report import render_terminal, write_report
    from gendistill.report.measures import MEASURES
    from gendistill.text import printable

    folders = [Path(folder) for folder in arguments.runs]
    look = {"serif": arguments.serif, "width": arguments.width}
    if arguments.out and (len(folders) == 1 or arguments.json):
        raise RecipeError(
            "--out is for the page of several runs"
            + (
                "; with --json none is written"
                if arguments.json
                else ", and one is given: its page is in its folder"
            ),
            where="--out",
            hint="leave out --out" + (" or --json" if arguments.json else ""),
        )
    for gate in arguments.gate:
        parse_gate(gate, MEASURES)
    if arguments.json:
        contents = [read_json(write_report(folder, **look).gap) for folder in folders]
        print_json(contents[0] if len(contents) == 1 else contents)
        _hold(folders, arguments.gate, quiet=True)
        return 0
    for folder in folders:
        if len(folders) == 1:
            render_terminal(folder)
        print(f"wrote    {printable(str(write_report(folder, **look).page), longest=4096)}")
    if len(folders) > 1:
        _compare(folders, arguments.out, look)
    _hold(folders, arguments.gate, quiet=False)
    return 0


def _compare(folders: list[Path], out: str | None, look: dict[str, Any]) -> None:
    from gendistill.report import compare_reports
    from gendistill.report.many import write_comparison
    from gendistill.text import printable

    comparison = compare_reports(folders)
    print(comparison.to_markdown(), end="")
    for run in comparison.runs:
        for warning in run.warnings:
            print(f"warn     {printable(run.name)}: {printable(warning, longest=2000)}")
    folder = Path(out) if out else folders[0].absolute().parent / "comparison"
    print(f"wrote    {printable(str(write_comparison(comparison, folder, **look).page), longest=4096)}")


def _hold(folders: list[Path], gates: list[str], *, quiet: bool) -> None:
    if not gates:
        return
    from gendistill.gates import GateError
    from gendistill.report.measures import check_gates
    from gendistill.report.run_files import read_run
    from gendistill.report.write import gap_report
    from gendistill.text import printable

    missed = []
    for folder in folders:
        run = read_run(folder)
        try:
            lines = check_gates(gates, run, gap_report(run))
        except GateError as error:
            missed.append((folder, error))
            continue
        for line in lines:
            if not quiet:
                print(line)
    if len(folders) == 1 and missed:
        raise missed[0][1]
    if missed:
        raise GateError(
            "\n".join(f"{printable(str(folder), longest=2000)}: {error.message}" for folder, error in missed),
            where=f"{len(missed)} of {len(folders)} runs",
        )

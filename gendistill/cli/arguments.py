"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from gendistill.errors import RecipeError
from gendistill.text import printable_lines

if TYPE_CHECKING:
    from gendistill.config.schema import Recipe

# what is shown of a name
_LONGEST_NAME = 100
_UNITS = "a built-in name, a YAML file, or a run folder"


class Parser(argparse.ArgumentParser):
    """A parser that does not guess: no abbreviated flags, and errors in the form of every other error."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Report a usage error and leave with exit code 2."""
        text = f"usage error  {self.prog}\n  {printable_lines(message)}\n  next: {self.prog} --help\n"
        self.exit(RecipeError.exit_code, text)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Accept ``--num_rows`` for ``--num-rows``; values are left alone."""
    result, rest = [], False
    for argument in arguments:
        rest = rest or argument == "--"
        if argument.startswith("--") and not rest:
            name, equals, value = argument.partition("=")
            argument = f"--{name[2:].replace('_', '-')}{equals}{value}"
        result.append(argument)
    return result


def add_recipe(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    """Add RECIPE and its ``key=value`` overrides."""
    parser.add_argument("recipe", metavar="RECIPE", nargs=nargs, help=_UNITS)
    add_overrides(parser, help="changes, as in stages.distill.lr=5e-5")


def add_overrides(parser: argparse.ArgumentParser, *, help: str) -> None:
    """Add ``key=value`` arguments."""
    # without a default argparse calls them required where something else is missing
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=help)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output``."""
    parser.add_argument("--output", metavar="FOLDER", help="where run folders go; same as output=FOLDER")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def positive(text: str) -> int:
    """Read a number above 0, for argparse."""
    # isdigit() takes superscripts and digits of other scripts too, and int() refuses thousands of digits.
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text[:_LONGEST_NAME]}" is not a number above 0')
    return int(text)


def is_recipe(name: str) -> bool:
    """Tell whether a word means a recipe rather than a model: a built-in name, a YAML file or a run folder."""
    from gendistill.config.load import means_recipe

    return means_recipe(name)


def check_path(text: str, *, where: str, command: str) -> None:
    """Reject an argument that no file and no model can be called.

    Args:
        text: The argument.
        where: Its name, for errors.
        command: Whose argument it is.
    Raises:
        RecipeError: Says what keeps it from being a name.
    """
    try:
        text.encode()
        Path(text).expanduser().exists()
        problem = "is empty" if not text.strip() else "holds a NUL byte" if "\0" in text else None
    except UnicodeEncodeError:
        problem = "is not UTF-8"
    except RuntimeError as error:
        problem = str(error)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise RecipeError(
            f"{text[:_LONGEST_NAME]!a} is not a name or a path: {problem}",
            where=where,
            hint=f"gendistill {command} --help",
        )


def load(arguments: argparse.Namespace) -> Recipe:
    """Load the recipe that the arguments name, with their overrides, and find its tasks and trackers.

    Raises:
        RecipeError: Everything that is wrong in the recipe.
        EvalError: A task or a set of questions that does not exist or cannot be read.
    """
    from gendistill.config.load import load_recipe
    from gendistill.config.watch import check_trackers

    recipe = load_recipe(arguments.recipe, all_overrides(arguments))
    find_tasks(recipe)
    check_trackers(recipe.trackers)
    return recipe


def find_tasks(recipe: Recipe) -> None:
    """Read what evaluation and stages ask, so that a misspelt task fails now and not after hours of training."""
    from gendistill_evals import load_questions, load_task

    recipe.eval.load_tasks()
    for stage in recipe.stages.values():
        if stage.stop_early is not None:
            load_task(stage.stop_early.task)
    load_task(recipe.watch.task)
    load_questions(recipe.watch.questions)
    if recipe.eval.questions is not None:
        load_questions(recipe.eval.questions)


def all_overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the ``key=value`` texts, ``--output`` included."""
    output = getattr(arguments, "output", None)
    return [*arguments.overrides, *([f"output={json.dumps(output)}"] if output else [])]


def pipeline_module() -> ModuleType:
    """Import the pipeline, with torch and all."""
    return _quietly("gendistill.runs.pipeline")


def scoring_module() -> ModuleType:
    """Import what scores models, with torch and all."""
    return _quietly("gendistill.runs.scoring")


def _quietly(name: str) -> ModuleType:
    """Import a module that loads models, and keep the loading bars of transformers out of its output."""
    from transformers.utils import logging

    module = importlib.import_module(name)
    logging.disable_progress_bar()
    return module


def command_line() -> str:
    """Return the command as typed, for records and for printing; bytes that are not text are escaped."""
    return printable_lines(shlex.join(["gendistill", *sys.argv[1:]]))


def print_json(content: Any) -> None:
    """Print JSON to standard output, in ASCII where nothing else can be written."""
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    print(json.dumps(content, indent=2, ensure_ascii=ascii_only, allow_nan=False))

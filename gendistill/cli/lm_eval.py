"""``gendistill lm-eval``: lm-eval's own command line, with our models in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from gendistill.cli.arguments import scoring_module
from gendistill.errors import GendistillError, RecipeError

COMMAND = "lm-eval"
# lm-eval names its commands itself; this one is meant where none is
_RUN = "run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, which lm-eval reads."""
    parser.add_argument(
        "words", metavar="ARGS", nargs="*", help="as for lm-eval: run, ls or validate, and their own"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run lm-eval's command line."""
    return run_words(arguments.words)


def run_words(words: Sequence[str]) -> int:
    """Run lm-eval's command line: the gendistill model is known to it, and meant where no other is named.

    Args:
        words: What follows ``gendistill lm-eval``, untouched.
    Raises:
        GendistillError: Whatever lm-eval ends with.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    command_line = HarnessCLI()
    # what its help calls the command
    command_line._parser.prog = f"gendistill {COMMAND}"
    given = sys.argv
    # lm-eval reads them there, and fills "run" in
    sys.argv = [f"gendistill {COMMAND}", *words]
    try:
        arguments = command_line.parse_args()
        if getattr(arguments, "command", None) == _RUN:
            _prefer_ours(arguments)
        print("reading the tasks that lm-eval ships, which takes some seconds", file=sys.stderr)
        command_line.execute(arguments)
    except (GendistillError, MemoryError):
        raise
    except Exception as error:
        if _is_known(error):
            raise
        raise GendistillError(
            f"lm-eval stopped: {type(error).__name__}: {str(error).strip() or 'it says nothing more'}",
            where=f"gendistill {COMMAND}",
            hint="--debug shows where; gendistill lm-eval run --help lists the arguments",
        ) from error
    finally:
        sys.argv = given
    return 0


def _is_known(error: Exception) -> bool:
    """Whether the command line has words of its own for an error."""
    evals = sys.modules.get("gendistill_evals.errors")
    return (evals is not None and isinstance(error, evals.EvalError)) or "OutOfMemory" in type(error).__name__


def _prefer_ours(arguments: argparse.Namespace) -> None:
    """Take our model, and as many rows as memory allows, where neither the command line nor its file says otherwise."""
    settings = _config_file(arguments.config)
    if arguments.model is None and "model" not in settings:
        arguments.model = "gendistill"
    if (arguments.model or settings.get("model")) != "gendistill":
        return
    scoring_module()
    import gendistill.interop.lm_eval  # noqa: F401  registers the model

    # lm-eval's own are a single row and the first CUDA device, whether there is one or not
    for name in ("batch_size", "device"):
        if getattr(arguments, name, None) is None and name not in settings:
            setattr(arguments, name, "auto")


def _config_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        return EvaluatorConfig.load_yaml_config(path)
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(str(error), where="--config", hint="gendistill lm-eval run --help") from error

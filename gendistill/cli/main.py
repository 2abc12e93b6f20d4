"""Parse the command line, run one command, and turn every failure into a message and an exit code.

Exit codes: 0 ok, 1 failed, 2 bad usage or recipe, 3 gate not met, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from gendistill import __version__
from gendistill.cli.arguments import Parser, command_line, with_dashes
from gendistill.cli.launch import is_launched, watch_launcher
from gendistill.errors import GendistillError
from gendistill.text import printable_lines

# name: (module, summary); the module is imported only for its own command
COMMANDS = {
    "run": ("gendistill.cli.run", "convert, distil, evaluate and report: the whole recipe"),
    "convert": ("gendistill.cli.convert", "turn the teacher into an untrained hybrid student"),
    "distill": ("gendistill.cli.distill", "train the student, stage by stage"),
    "eval": ("gendistill.cli.evaluate", "score a model by log-likelihood and by generation"),
    "generate": ("gendistill.cli.generate", "complete texts, chat, or answer a file of prompts"),
    "lm-eval": ("gendistill.cli.lm_eval", "run lm-eval's command line on our models"),
    "twins": (
        "gendistill.cli.twins",
        "write the task that asks by generation what another asks by likelihood",
    ),
    "report": ("gendistill.cli.report", "show the gap between teacher and student"),
    "compare": ("gendistill.cli.compare", "compare models item by item: our scores, or lm-eval's samples"),
    "recipe": ("gendistill.cli.recipe", "list, show, copy, check and compare recipes"),
    "data": ("gendistill.cli.data", "show training rows, with the tokens that count in the loss"),
    "prune": ("gendistill.cli.prune", "remove the steps that no run folder shows"),
    "bench": (
        "gendistill.cli.bench",
        "check and time the GPU kernels and training steps, beside stock parts",
    ),
    "doctor": ("gendistill.cli.doctor", "check this machine and say how to fix it"),
}
# its arguments are another program's: none is ours to read
_PASSED_ON = "lm-eval"
_RESUMES = ("run", "convert", "distill", "eval")
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

_EXAMPLES = """\
examples:
  gendistill recipe ls
  gendistill distill qwen3-0.6b-kda --dry-run
  gendistill run smollm2-135m-kda-cpu stages.distill.minutes=10
  gendistill report runs/smollm2-135m-kda-cpu
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows ``gendistill``; ``sys.argv[1:]`` if None.
    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    passed_on = [word for word in given if word != "--debug"][:1] == [_PASSED_ON]
    words = given if passed_on else with_dashes(given)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _quiet_libraries()
    _never_fail_to_print()
    if is_launched():
        watch_launcher()
    try:
        return _flushed(words)
    except BrokenPipeError:
        # the reader has left, as in "gendistill recipe show tiny | head"; nothing may write to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _interrupted(words)
    except Exception as error:
        if debug:
            raise
        return _failed(error, words)


def _flushed(words: Sequence[str]) -> int:
    """Write out what was printed while a reader that has left can still be handled."""
    try:
        return _run(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()


def _run(words: Sequence[str]) -> int:
    if words[:1] == [_PASSED_ON]:
        return importlib.import_module(COMMANDS[_PASSED_ON][0]).run_words(words[1:])
    parser = Parser(
        prog="gendistill",
        description="Turn a pretrained transformer into a hybrid linear-attention student, and score it by generation.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"gendistill {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    wanted = next((word for word in words if not word.startswith("-")), None)
    modules: dict[str, ModuleType] = {}
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}."
        )
        if name == wanted:
            modules[name] = importlib.import_module(module_name)
            modules[name].add_arguments(subparser)
            subparser.epilog = "  --debug shows the traceback of an error"
    if any("\0" in word for word in words):
        parser.error("an argument holds a NUL character, which no name or path can")
    if wanted is not None and wanted not in COMMANDS and words[0] == wanted:
        near = difflib.get_close_matches(wanted, COMMANDS, n=1)
        guess = f'; did you mean "{near[0]}"?' if near else ""
        parser.error(f'there is no command "{wanted}"{guess}; there are: {", ".join(COMMANDS)}')
    parsed, extra = parser.parse_known_args(words)
    if parsed.command is None:
        parser.print_help()
        return 0
    _take_rest(subparsers.choices[parsed.command], parsed, extra)
    return modules[parsed.command].run(parsed) or 0


def _take_rest(parser: argparse.ArgumentParser, parsed: argparse.Namespace, extra: list[str]) -> None:
    """Accept ``key=value`` and prompts anywhere, also behind flags, where argparse does not look for them."""
    asks, rest = hasattr(parsed, "prompt"), False
    for word in extra:
        if asks and word == "--" and not rest:
            rest = True
            continue
        if asks and (rest or not word.startswith("-")):
            parsed.prompt.append(word)
            continue
        if word.startswith("-") or "=" not in word or not hasattr(parsed, "overrides"):
            _reject(parser, word)
        parsed.overrides.append(word)


def _reject(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    flags = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
    parser.error(f'unknown argument "{word}"' + (f'; did you mean "{near[0]}"?' if near else ""))


def _quiet_libraries() -> None:
    """Keep advice meant for other programs out of ours; whatever the user has set stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # what the datasets library complains of is in our error
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # a connection whose other end is gone would be told with a stack of C++ frames, beside our error
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # looking for plugins reads the metadata of every installed package, a fifth of the start-up time
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def _interrupted(words: Sequence[str]) -> int:
    lines = ["interrupted"]
    if any(word in _RESUMES for word in words[:1]) or any(word.startswith("--prompts") for word in words):
        lines.append(f"  finished work is kept; the same command resumes it: {command_line()}")
    print("\n".join(lines), file=sys.stderr)
    return 130


def _never_fail_to_print() -> None:
    """Write what a stream cannot encode as escapes instead of failing: on ASCII terminals, of odd file names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _failed(error: Exception, words: Sequence[str]) -> int:
    evals = sys.modules.get("gendistill_evals.errors")
    if isinstance(error, GendistillError) or (evals is not None and isinstance(error, evals.EvalError)):
        print(printable_lines(str(error)), file=sys.stderr)
        return error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
    print(printable_lines(_describe(error, words)), file=sys.stderr)
    return 1


def _describe(error: Exception, words: Sequence[str]) -> str:
    """Put an error that nobody foresaw into words: what kind it is, and what to do."""
    name = type(error).__name__
    first = next(iter(str(error).splitlines()), name)
    if name in _OUT_OF_MEMORY or any(sign in str(error) for sign in _NO_MEMORY):
        hint = (
            "take a smaller model or a larger device; or --dtype bfloat16, or --device cpu"
            if words[:1] == ["generate"]
            else "lower micro_batch_size or seq_len of the stage (or eval.batch_size), then run the same command"
        )
        return f"memory error\n  {first}\n  next: {hint}"
    if is_launched() and any(sign in str(error) for sign in _LOST_PEER):
        return f"rank {os.environ.get('RANK', '?')} stopped, because another process did"
    if isinstance(error, OSError):
        place = "" if error.filename is None else os.fsdecode(str(error.filename))
        code = errno.errorcode.get(error.errno or 0)
        reason = f"{error.strerror or first}" + (f" ({code})" if code else "")
        return f"system error  {place}\n  {reason}\n  next: --debug shows where it happened"
    if isinstance(error, RecursionError):
        return (
            "input error\n  something that was read is nested too deeply\n"
            f"  next: {command_line()} --debug shows which file it was"
        )
    text = f"internal error  {name}\n  {error}\n  this is a bug in gendistill, not in what you gave it"
    return text + f"\n  next: {command_line()} --debug, and report the traceback"

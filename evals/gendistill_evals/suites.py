"""Suites: sets of tasks under one name. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from gendistill_evals.errors import EvalError


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks that are asked together.

    Attributes:
        name: Key of ``SUITES``.
        description: What they ask, in a line.
        tasks: Built-in tasks, in the order in which they are asked.
    """

    name: str
    description: str
    tasks: tuple[str, ...]


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("smoke", "whether a model answers at all, in a minute", ("everyday", "arithmetic", "copy")),
        Suite(
            "knowledge",
            "facts and common sense, multiple choice",
            ("mmlu", "arc_easy", "arc_challenge", "sciq", "commonsense_qa"),
        ),
        Suite("math", "word problems, solved step by step", ("gsm8k",)),
        Suite("code", "Python functions, run in a sandbox", ("humaneval",)),
        Suite("instructions", "instructions whose keeping can be checked", ("ifeval",)),
        Suite("reasoning", "puzzles of logic, language and counting", ("bbh_choice", "bbh_open")),
        Suite(
            "long",
            "numbers to find in texts of chosen lengths",
            ("needle", "multi_key", "variable_tracking", "mqar"),
        ),
    )
}


def suite_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """List the tasks of suites, each once.

    Args:
        names: Keys of ``SUITES``.
    Raises:
        EvalError: A suite that does not exist (exit code 2).
    """
    for name in names:
        if name not in SUITES:
            close = difflib.get_close_matches(name[:100], SUITES, n=1)
            raise EvalError(
                f'there is no suite "{name[:100]}"; there are {", ".join(SUITES)}',
                where="--suite",
                hint=f'did you mean "{close[0]}"?'
                if close
                else "gendistill eval --list shows what each asks",
                exit_code=2,
            )
    return tuple(dict.fromkeys(task for name in names for task in SUITES[name].tasks))


def with_suites(tasks: Sequence[str], suites: Sequence[str]) -> tuple[str, ...]:
    """List tasks and those of suites; a task that is named and in a suite is asked once.

    Raises:
        EvalError: As ``suite_tasks``.
    """
    return (*tasks, *(name for name in suite_tasks(suites) if name not in tasks))

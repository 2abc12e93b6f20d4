"""Judge answers that are Python: run them with the tests of their item in the sandbox. Imports no torch.

Off unless asked for (``allowed``): a program that a model wrote is run, if behind barriers.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from gendistill_evals import sandbox
from gendistill_evals.errors import EvalError
from gendistill_evals.items import Item
from gendistill_evals.judges import Judgement
from gendistill_evals.reading import shorten

# Longer answers than any model is asked for; a program is read by the kernel's limits alone.
LIMITS = sandbox.Limits(wall_s=10.0, cpu_s=5)
_HINT = "rows of openai/openai_humaneval become rows of a task by gendistill_evals.code.task_row"
_ALLOWED: ContextVar[bool] = ContextVar("programs may be run", default=False)

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.#-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")
# Lines at the margin that belong to a program around a function; anything else there is prose or an example.
_TARGET = r"[A-Za-z_][\w.]*(?:\[[^\]]*\])?"
_OF_PROGRAM = re.compile(
    r"from\s+[\w.]+\s+import\b|import\s+\w|(?:async\s+)?def\s+\w|class\s+\w|@\w|#|[)\]}]|\"\"\"|'''"
    r"|(?:try|else|finally):|except\b.*:|(?:if|elif|for|while|with)\s.*:\s*(?:#.*)?$"
    rf"|{_TARGET}(?:\s*,\s*{_TARGET})*\s*(?::[^=:]+)?=[^=]"
)
_MAIN = re.compile(r"if\s+__name__\b")
_RETURN = re.compile(r"return\b")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_TRIPLE = re.compile(r"\"\"\"|'''")
# A program that cannot be read at all.
_NO_PROGRAM = ("SyntaxError", "IndentationError", "TabError")


class Problem(NamedTuple):
    """A function to complete, and its tests.

    Attributes:
        prompt: The beginning of a program, up to where the function's body begins.
        entry_point: Name of the function.
        test: A program that defines ``check``, which raises if the function that it is given is wrong.
    """

    prompt: str
    entry_point: str
    test: str


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Let judges run programs that models wrote, for as long as the context lasts.

    Raises:
        EvalError: This machine cannot contain them.
    """
    if reason := sandbox.why_not():
        raise EvalError(
            f"programs that a model wrote cannot be contained on this machine: {reason}",
            hint="leave tasks of code out; programs never run without barriers",
        )
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def why_not() -> str | None:
    """Say why no program would be run now; None if it would."""
    if not _ALLOWED.get():
        return "it runs programs that the model wrote, which is off unless asked for"
    return sandbox.why_not()


def judge_code(item: Item, text: str) -> Judgement:
    """Complete an item's function by an answer, and run its tests.

    Args:
        item: Its gold answer is the JSON that ``task_row`` writes.
        text: A generated answer: the function, in a block of code or not, or its body.
    Returns: The program that was found in the text; none at all, or one that cannot be read, is an extraction failure.
    Raises:
        EvalError: Programs are not ``allowed``, or the item does not hold a problem.
    """
    problem = problem_of(item)
    program = program_of(problem, text)
    if program is None:
        return Judgement(None, correct=False)
    outcome = run_tests(problem, program)
    if outcome.ended is sandbox.Ended.RAISED and outcome.reason.startswith(_NO_PROGRAM):
        return Judgement(None, correct=False)
    return Judgement(program, correct=outcome.ended is sandbox.Ended.FINISHED)


def run_tests(problem: Problem, program: str) -> sandbox.Outcome:
    """Run a program with the tests of its problem in the sandbox.

    Args:
        problem: The function and its tests.
        program: As ``program_of`` returns it.
    Returns: How it ended; ``FINISHED`` if all tests passed.
    Raises:
        EvalError: Programs are not ``allowed``, or cannot be contained here.
    """
    if not _ALLOWED.get():
        raise EvalError(
            "to judge this task, programs that the model wrote are run, which is off unless asked for",
            hint="give --allow-code, or eval.allow_code: true in the recipe; they run without network and files, or "
            "not at all",
        )
    return sandbox.run(f"{program}\n\n{problem.test}\n\ncheck({problem.entry_point})\n", LIMITS)


def program_of(problem: Problem, text: str) -> str | None:
    """Find the program in an answer.

    Of blocks of code the first that defines the function is read, else the first; without blocks the whole text. What
    defines the function replaces it, after what the prompt has before it (imports, other functions); anything else is
    its body, up to the first line at the margin.

    Args:
        problem: The function.
        text: A generated answer.
    Returns: A whole program without its tests; None if there is no code in the text.
    """
    definition = re.compile(
        rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(problem.entry_point)}\b", re.MULTILINE
    )
    blocks = _blocks(text)
    code = next((block for block in blocks if definition.search(block)), blocks[0] if blocks else text)
    if not code.strip():
        return None
    if found := definition.search(code):
        before = definition.search(problem.prompt)
        preamble = problem.prompt[: before.start()] if before else ""
        whole = _whole(code, found.start(), prose=not blocks)
        # These must stand before all others.
        return f"{''.join(_FUTURE.findall(whole))}{preamble}\n{_FUTURE.sub('', whole)}"
    return f"{problem.prompt.rstrip()}\n{_body(code)}"


def task_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row of openai/openai_humaneval into a row of a task: ``id``, ``prompt``, and as ``gold`` the problem.

    Args:
        row: ``task_id``, ``prompt``, ``entry_point`` and ``test``.
    Raises:
        EvalError: It lacks one of these.
    """
    lacking = [key for key in ("task_id", *Problem._fields) if not isinstance(row.get(key), str)]
    if lacking:
        raise EvalError(f"a row of HumanEval lacks {', '.join(lacking)}; it has {shorten(sorted(row))}")
    problem = {key: row[key] for key in Problem._fields}
    return {"id": row["task_id"], "prompt": row["prompt"], "gold": json.dumps(problem, ensure_ascii=False)}


def problem_of(item: Item) -> Problem:
    """Read the problem of an item from its gold answer.

    Raises:
        EvalError: It holds something else.
    """
    if reason := lacks(item):
        raise EvalError(f"item {item.id} cannot be judged by its tests: {reason}", hint=_HINT)
    return Problem(**json.loads(item.gold))


def lacks(item: Item) -> str | None:
    """Say what an item lacks to be judged by tests; None if nothing."""
    try:
        content = json.loads(item.gold)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or set(content) != set(Problem._fields):
        return f"its gold answer is not an object of {', '.join(Problem._fields)}: {shorten(item.gold)}"
    if (
        not all(isinstance(value, str) for value in content.values())
        or not content["entry_point"].isidentifier()
    ):
        return f"its gold answer must hold texts, and entry_point a name: {shorten(item.gold)}"
    return None


def _blocks(text: str) -> list[str]:
    """List the blocks of code of a text that are Python or say nothing; one without an end goes on to the text's."""
    blocks, opening = [], None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            if opening[2].lower() in _PYTHON:
                blocks.append(text[opening.end() + 1 : fence.start()])
            opening = None
    if opening is not None and opening[2].lower() in _PYTHON:
        blocks.append(text[opening.end() + 1 :])
    return [block for block in blocks if block.strip()]


def _whole(code: str, start: int, *, prose: bool) -> str:
    """Cut off what follows a program that defines its function at ``start``, and prose before it where there may be."""
    lines = code.split("\n")
    first = code.count("\n", 0, start)
    margin = _indent(lines[first])
    if margin:
        lines = [line[margin:] if not line[:margin].strip() else line for line in lines]
    begin = first if prose else 0
    while begin and (not _at_margin(lines[begin - 1]) or _OF_PROGRAM.match(lines[begin - 1])):
        begin -= 1
    end, quoted = first + 1, len(_TRIPLE.findall(lines[first])) % 2
    while end < len(lines):
        line = lines[end]
        if not quoted and _at_margin(line) and (_MAIN.match(line) or not _OF_PROGRAM.match(line)):
            break
        quoted ^= len(_TRIPLE.findall(line)) % 2
        end += 1
    return "\n".join(lines[begin:end])


def _body(code: str) -> str:
    """Cut off what follows a function's body, and indent one that lost the indent of its first line or of all."""
    lines = code.strip("\n").rstrip().split("\n")
    if _at_margin(lines[0]):
        others = [line for line in lines[1:] if line.strip()]
        inner = 8 if lines[0].rstrip().endswith(":") else 4
        # Only a line that goes on is followed by a deeper one that is not of a block.
        only_first = not others or (
            _indent(others[0]) >= inner and (not _goes_on(lines[0]) or _indent(others[-1]) >= 4)
        )
        if not only_first:
            # Nothing at this level runs after it: what comes then is prose, or another program.
            last = next(
                (n for n, line in enumerate(lines) if _RETURN.match(line) and not _goes_on(line)), len(lines)
            )
            lines = [lines[0], *(f"    {line}" for line in lines[1 : last + 1])]
        lines[0] = f"    {lines[0]}"
    end = next((number for number, line in enumerate(lines) if number and _at_margin(line)), len(lines))
    return "\n".join(lines[:end])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _goes_on(line: str) -> bool:
    """Whether the next line belongs to the same statement, as far as its end tells."""
    return line.rstrip().endswith(("(", "[", "{", ",", "\\"))


def _at_margin(line: str) -> bool:
    return bool(line) and not line[0].isspace()

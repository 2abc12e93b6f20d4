"""Judge whether an answer follows the instructions of its prompt, strictly and loosely. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gendistill_evals.errors import EvalError
from gendistill_evals.instructions.checkers import AT_LEAST, CHECKERS, LESS_THAN
from gendistill_evals.instructions.language import is_available
from gendistill_evals.items import Item
from gendistill_evals.judges import Judgement
from gendistill_evals.reading import shorten

_HINT = "rows of google/IFEval become rows of a task by gendistill_evals.instructions.task_row"
_RELATIONS = (LESS_THAN, AT_LEAST)


class Instruction(NamedTuple):
    """One instruction: its kind, a key of ``CHECKERS``, and what it says beside that."""

    kind: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Followed:
    """The instructions that an answer follows.

    Attributes:
        strict: Per instruction, whether the answer as it is follows it.
        loose: Per instruction, whether the answer does without its first or last line, or without asterisks: an
            upper bound, since these are what a chat model adds.
    """

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def judge_instructions(item: Item, text: str) -> Judgement:
    """Tell whether an answer follows all instructions of an item, strictly.

    Args:
        item: Its gold answer is the JSON that ``task_row`` writes.
        text: A generated answer.
    Returns: What was followed, in words; an empty answer is an extraction failure.
    Raises:
        EvalError: Instructions that do not exist, lack something, or need ``langdetect`` where it is absent.
    """
    instructions = instructions_of(item)
    if reason := cannot_check(instructions):
        raise EvalError(f"item {item.id} cannot be judged: {reason}", hint=_HINT)
    if not text.strip():
        return Judgement(None, correct=False)
    found = followed(instructions, text)
    broken = [each.kind for each, kept in zip(instructions, found.strict, strict=True) if not kept]
    said = f"{sum(found.strict)} of {len(found.strict)} followed strictly, {sum(found.loose)} loosely"
    return Judgement(f"{said}; broken: {', '.join(broken)}" if broken else said, correct=not broken)


def followed(instructions: Sequence[Instruction], text: str) -> Followed:
    """Check an answer against instructions.

    Args:
        instructions: What ``cannot_check`` has nothing against.
        text: A generated answer.
    """
    texts = [each for each in _loosened(text) if each.strip()]
    strict, loose = [], []
    for kind, arguments in instructions:
        check = CHECKERS[kind].check
        strict.append(bool(text.strip()) and check(text, arguments))
        loose.append(any(check(each, arguments) for each in texts))
    return Followed(tuple(strict), tuple(loose))


def summarise(answers: Iterable[Followed]) -> dict[str, float]:
    """Return the four accuracies of IFEval over answers, of which there must be at least one.

    Returns: ``prompt_strict`` and ``prompt_loose``, the shares of answers that follow all their instructions, and
        ``instruction_strict`` and ``instruction_loose``, the shares of instructions.
    """
    found = list(answers)
    shares = {}
    for name in ("strict", "loose"):
        verdicts: list[tuple[bool, ...]] = [getattr(each, name) for each in found]
        flat = [verdict for each in verdicts for verdict in each]
        shares[f"prompt_{name}"] = sum(map(all, verdicts)) / len(verdicts)
        shares[f"instruction_{name}"] = sum(flat) / len(flat)
    return shares


def task_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row of google/IFEval into a row of a task: ``id``, ``prompt``, and as ``gold`` the instructions as JSON.

    Args:
        row: ``key``, ``prompt``, ``instruction_id_list`` and ``kwargs``, whose entries may hold keys without values.
    Raises:
        EvalError: It lacks one of these, or an instruction cannot be checked by what it says.
    """
    lacking = [key for key in ("key", "prompt", "instruction_id_list", "kwargs") if key not in row]
    if lacking:
        raise EvalError(f"a row of IFEval lacks {', '.join(lacking)}; it has {shorten(sorted(row))}")
    kinds, told = row["instruction_id_list"], row["kwargs"]
    if not isinstance(kinds, list) or not isinstance(told, list) or not len(kinds) == len(told) > 0:
        raise EvalError(f"row {row['key']} needs one entry of kwargs for each of its instructions")
    instructions = [
        Instruction(str(kind), {key: value for key, value in arguments.items() if value is not None})
        for kind, arguments in zip(kinds, told, strict=True)
    ]
    if reason := _malformed(instructions):
        raise EvalError(f"row {row['key']}: {reason}")
    gold = [
        {"kind": kind, **{key: arguments[key] for key in CHECKERS[kind].arguments}}
        for kind, arguments in instructions
    ]
    return {"id": str(row["key"]), "prompt": row["prompt"], "gold": json.dumps(gold, ensure_ascii=False)}


def instructions_of(item: Item) -> list[Instruction]:
    """Read the instructions of an item from its gold answer.

    Raises:
        EvalError: It holds something else.
    """
    try:
        content = json.loads(item.gold)
        return [
            Instruction(each["kind"], {key: value for key, value in each.items() if key != "kind"})
            for each in content
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EvalError(
            f"the gold answer of item {item.id} is not a list of instructions: {shorten(item.gold)}",
            hint=_HINT,
        ) from error


def cannot_check(instructions: Sequence[Instruction]) -> str | None:
    """Say why instructions cannot be checked here; None if they can."""
    if reason := _malformed(instructions):
        return reason
    wanting = sorted({each.kind for each in instructions if CHECKERS[each.kind].needs_language})
    if wanting and not is_available():
        return f'{", ".join(wanting)} needs langdetect: pip install "gendistill[ifeval]"'
    return None


def lacks(item: Item) -> str | None:
    """Say what an item lacks to be judged by its instructions; None if nothing."""
    try:
        return cannot_check(instructions_of(item))
    except EvalError as error:
        return error.message


def _malformed(instructions: Sequence[Instruction]) -> str | None:
    if not instructions:
        return "there are no instructions"
    for kind, arguments in instructions:
        if kind not in CHECKERS:
            return f"there is no instruction {shorten(kind)}; there are {', '.join(CHECKERS)}"
        for name, wanted in CHECKERS[kind].arguments.items():
            value = arguments.get(name)
            if not _fits(value, wanted):
                return f"{kind} needs {name}, {_TYPES[wanted]}, got {shorten(value)}"
            if name.endswith("relation") and value not in _RELATIONS:
                return f"{name} of {kind} must be one of {', '.join(_RELATIONS)}, got {shorten(value)}"
    return None


def _fits(value: Any, wanted: type) -> bool:
    if isinstance(value, list):
        return wanted is list and bool(value) and all(isinstance(word, str) and word for word in value)
    return isinstance(value, wanted) and not isinstance(value, bool) and value != ""


_TYPES = {str: "a text", int: "a whole number", list: "a list of texts"}


def _loosened(text: str) -> list[str]:
    lines = text.split("\n")
    shorter = ["\n".join(lines[first:last]).strip() for first, last in ((1, None), (0, -1), (1, -1))]
    return [variant for each in (text, *shorter) for variant in (each, each.replace("*", ""))]

"""Make rows that can be asked of the rows of public benchmarks, whose layouts differ. Imports no torch.

Every function takes one row and its place, for errors, and returns the row with ``options`` and ``gold``, or None for
a row that has no single right answer: one whose options repeat, or whose answer is not among them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gendistill_evals import code, instructions
from gendistill_evals.errors import EvalError
from gendistill_evals.extract import normalise
from gendistill_evals.reading import shorten

Prepare = Callable[[Mapping[str, Any], str], dict[str, Any] | None]
_LAYOUT = "give the row the layout of the dataset that the task file names"
_LETTERED = re.compile(r"^\(([A-Z])\)", re.MULTILINE)
_BULLETED = re.compile(r"^- (\S+)[ \t]*$", re.MULTILINE)
# Subtasks of BIG-Bench-Hard whose prompt leaves the options unsaid.
_UNSAID = {frozenset({"yes", "no"}): ("yes", "no"), frozenset({"true", "false"}): ("True", "False")}


def numbered_choices(row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Read ``choices``, a list, and ``answer``, an index from 0: the layout of MMLU."""
    choices, answer = _texts(row, "choices", where), row.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise EvalError(
            f"answer must be an index from 0 to {len(choices) - 1}, got {shorten(answer)}",
            where=where,
            hint=_LAYOUT,
        )
    # Answered by letter, so that "aa" and "AA" are two options.
    return _with_options(row, choices, choices[answer], told_apart_by=str)


def labelled_choices(row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Read ``choices`` of ``text`` and ``label``, and ``answerKey``, a label: the layout of ARC and CommonsenseQA."""
    choices = row.get("choices")
    if not isinstance(choices, Mapping):
        raise EvalError(
            f"choices must hold text and label, got {shorten(choices)}", where=where, hint=_LAYOUT
        )
    texts, labels = _texts(choices, "text", where), _texts(choices, "label", where)
    key = str(row.get("answerKey"))
    if len(texts) != len(labels) or key not in labels:
        raise EvalError(
            f"answerKey must be one of the labels {', '.join(labels)}, got {shorten(row.get('answerKey'))}",
            where=where,
            hint=f"{_LAYOUT}; splits without answers cannot be scored",
        )
    return _with_options(row, texts, texts[labels.index(key)])


def distracted(row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Read ``correct_answer`` and ``distractor1`` to ``distractor3``: the layout of SciQ.

    The right answer's place among the options follows from the question, so that no place is right more often.
    """
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    texts = _texts({"options": [row.get(name) for name in names]}, "options", where)
    place = hashlib.sha256(str(row.get("question")).encode("utf-8", "surrogatepass")).digest()[0] % len(texts)
    gold = texts.pop()
    texts.insert(place, gold)
    return _with_options(row, texts, gold)


def bbh_choice(row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Read the options of a row of BIG-Bench-Hard out of its prompt; None for subtasks without options."""
    question, target = _bbh(row, where)
    options: Sequence[str] = [f"({letter})" for letter in _LETTERED.findall(question)]
    options = options or _BULLETED.findall(question)
    if not options:
        options = next((each for known, each in _UNSAID.items() if target.casefold() in known), ())
        # "Yes" or "yes": as the subtask writes it.
        options = [option.capitalize() if target[0].isupper() else option for option in options]
    if not options or target not in options:
        return None
    return {**row, "options": list(options), "gold": target}


def bbh_open(row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Keep the rows of BIG-Bench-Hard that ask for a number, sorted words or brackets."""
    question, target = _bbh(row, where)
    said = _LETTERED.search(question) or _BULLETED.search(question)
    if said or any(target.casefold() in known for known in _UNSAID):
        return None
    return {**row, "gold": target}


# What a task file may name under dataset.prepare.
def humaneval(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read a function to complete and its tests."""
    return _at(where, code.task_row, row)


def ifeval(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read a prompt and the instructions in it."""
    return _at(where, instructions.task_row, row)


PREPARE: dict[str, Prepare] = {
    "numbered_choices": numbered_choices,
    "labelled_choices": labelled_choices,
    "distracted": distracted,
    "bbh_choice": bbh_choice,
    "bbh_open": bbh_open,
    "humaneval": humaneval,
    "ifeval": ifeval,
}


def _at(
    where: str, read: Callable[[Mapping[str, Any]], dict[str, Any]], row: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return read(row)
    except EvalError as error:
        raise EvalError(error.message, where=where, hint=_LAYOUT) from error


def _bbh(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    question, target = row.get("input"), row.get("target")
    if not isinstance(question, str) or not isinstance(target, str) or not target.strip():
        raise EvalError(
            f"input and target must be texts, got {shorten(question)} and {shorten(target)}",
            where=where,
            hint=_LAYOUT,
        )
    return question, target.strip()


def _texts(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    values = row.get(name)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise EvalError(f"{name} must be a list of texts, got {shorten(values)}", where=where, hint=_LAYOUT)
    return [value.strip() for value in values]


def _with_options(
    row: Mapping[str, Any],
    options: Sequence[str],
    gold: str,
    *,
    told_apart_by: Callable[[str], str] = normalise,
) -> dict[str, Any] | None:
    """Add options and gold; None where two options are the same, or one is empty.

    Args:
        row, options, gold: As they are.
        told_apart_by: What of an option counts; answers by text leave case and outer punctuation aside.
    """
    if len({told_apart_by(option) for option in options} - {""}) < len(options):
        return None
    return {**row, "options": list(options), "gold": gold}

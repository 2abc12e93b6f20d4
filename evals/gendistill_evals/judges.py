"""Judge generated answers: find the answer in a text and compare it with the right one. Imports no torch."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gendistill_evals.bbh import bbh_answer, same_answer
from gendistill_evals.errors import EvalError
from gendistill_evals.extract import (
    find_letter,
    find_option,
    last_number,
    normalise,
    parse_number,
    written_number,
)
from gendistill_evals.items import AnswerForm, Item, Kind


class Judgement(NamedTuple):
    """The verdict of a judge on a generated answer.

    Attributes:
        extracted: The answer found in the text; None if there is none, which counts as wrong.
        correct: Whether it is right.
    """

    extracted: str | None
    correct: bool


Judge = Callable[[Item, str], Judgement]


def judge_numeric(item: Item, text: str) -> Judgement:
    """Compare the number that follows the last ``####``, else the last number, with gold."""
    number = last_number(text)
    if number is None:
        return Judgement(None, correct=False)
    return Judgement(written_number(number), number == parse_number(item.gold))


def judge_exact_match(item: Item, text: str) -> Judgement:
    """Compare the whole text with gold, without case, outer quotes and final punctuation."""
    answer = normalise(text)
    return Judgement(answer, answer == normalise(item.gold)) if answer else Judgement(None, correct=False)


def judge_option(item: Item, text: str) -> Judgement:
    """Find the one option that the text names; options that are letters are found as letters."""
    options = item.options or ()
    found = find_option(text, options) if item.texts else find_letter(text, options, ())
    return Judgement(found, found == item.gold)


def judge_letter(item: Item, text: str) -> Judgement:
    """Find the letter of the option that the text chooses."""
    found = find_letter(text, item.options or (), item.texts or ())
    return Judgement(found, found == item.gold)


def judge_bbh(item: Item, text: str) -> Judgement:
    """Find the answer in the form of BIG-Bench-Hard that gold has: a letter, a word, a number, words or brackets."""
    found = bbh_answer(item, text)
    return Judgement(found, found is not None and same_answer(found, item.gold))


# How a text is judged, by the name that a task file gives after ``judge:``. Other packages add theirs. The name goes
# into the identity of scores, so a judge whose rules change takes another name.
JUDGES: dict[str, Judge] = {
    "option": judge_option,
    "letter": judge_letter,
    "numeric": judge_numeric,
    "exact_match": judge_exact_match,
    "bbh": judge_bbh,
}
# What an item lacks to be judged by one of them, and why one judges nothing at the moment; None where nothing is wrong.
# Packages that add a judge add what it has to say here.
LACKS: dict[str, Callable[[Item], str | None]] = {}
WHY_NOT: dict[str, Callable[[], str | None]] = {}
# Judges of a short answer, which may come after a thought; others judge all that a model writes.
ANSWER_JUDGES = {"option", "letter", "numeric", "exact_match", "bbh"}
# Of these, judges that find the answer at the end of a thought by themselves.
THOUGHT_JUDGES = {"bbh"}


def default_judge(kind: Kind, answer: AnswerForm) -> str:
    """Name the judge of a task that names none."""
    if kind is Kind.MULTIPLE_CHOICE:
        return "letter" if answer is AnswerForm.LETTER else "option"
    return {Kind.NUMERIC: "numeric", Kind.EXACT_MATCH: "exact_match"}[kind]


def check_judge(judge: str, items: Iterable[Item], where: str) -> None:
    """Check that a judge can judge items.

    Args:
        judge: Name in ``JUDGES``.
        items: What it will judge.
        where: Task file, for errors.
    Raises:
        EvalError: An item that lacks what the judge compares with.
    """
    for item in items:
        if lacks := _lacks(judge, item):
            raise EvalError(
                f"judge: {judge} cannot judge item {item.id}: {lacks}",
                where=where,
                hint=f"give it what it lacks, or name another judge: {', '.join(JUDGES)}; "
                "without judge: the kind decides",
            )


def _lacks(judge: str, item: Item) -> str | None:
    if judge in LACKS:
        return LACKS[judge](item)
    if judge in ("option", "letter") and not item.options:
        return "it has no options"
    if judge == "letter" and not set(item.options or ()) <= set(string.ascii_uppercase):
        return "its options are not letters; answer: letter makes them so"
    if judge == "numeric" and parse_number(item.gold) is None:
        return "its gold answer is not a number"
    return None

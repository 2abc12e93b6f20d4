"""Answers to BIG-Bench-Hard, written and labelled by hand as a careful reader would: what they answer, or nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

import gendistill_evals
from gendistill_evals.bbh import bbh_answer, same_answer
from gendistill_evals.items import Item
from gendistill_evals.preparing import bbh_choice, bbh_open

_SAMPLE = Path(gendistill_evals.__file__).parent / "tasks" / "bbh.sample.jsonl"
_LABELLED = Path(__file__).parent / "bbh_answers.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def items() -> dict[str, Item]:
    """Name the committed rows by subtask and number, as in ``navigate-0``."""
    found, counts = {}, Counter()
    for number, row in enumerate(read(_SAMPLE)):
        task = row["task"]
        name = f"{task}-{counts[task]}"
        counts[task] += 1
        prepared = bbh_choice(row, f"{number}") or bbh_open(row, f"{number}")
        assert prepared is not None, row
        options = tuple(prepared["options"]) if "options" in prepared else None
        found[name] = Item(name, row["input"], prepared["gold"], options, options)
    return found


ITEMS = items()
LABELLED = read(_LABELLED)


@pytest.mark.parametrize("place", range(len(LABELLED)))
def test_an_answer_is_read_as_a_careful_reader_reads_it(place):
    row = LABELLED[place]
    found = bbh_answer(ITEMS[row["item"]], row["text"])
    if row["answer"] is None or found is None:
        assert found == row["answer"], row["text"]
    else:
        assert same_answer(found, row["answer"]), (found, row)


def test_the_labelled_answers_cover_every_subtask_and_say_nothing_too():
    subtasks = {name.rpartition("-")[0] for name in ITEMS}
    assert len(LABELLED) >= 100
    assert {row["item"].rpartition("-")[0] for row in LABELLED} == subtasks
    assert len(subtasks) == 14
    assert sum(row["answer"] is None for row in LABELLED) >= 10
    wrong = [
        row for row in LABELLED if row["answer"] and not same_answer(row["answer"], ITEMS[row["item"]].gold)
    ]
    assert len(wrong) >= 20


@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.parametrize(
    "form", ["{}", "So the answer is {}.", "**Answer:** {}", "I thought about it.\n\n{}"]
)
def test_every_gold_answer_is_read_in_plain_forms(name, form):
    item = ITEMS[name]
    found = bbh_answer(item, form.format(item.gold))
    assert found is not None
    assert same_answer(found, item.gold)


@pytest.mark.parametrize("name", ITEMS)
def test_what_says_nothing_is_read_as_nothing(name):
    for text in ("", " \n", "I do not know.", "Let us think about it step by step."):
        assert bbh_answer(ITEMS[name], text) is None


# Letters are found by find_letter, which tests/evals/test_extract.py times.
@pytest.mark.parametrize("form", ["navigate", "multistep_arithmetic_two", "dyck_languages", "word_sorting"])
@pytest.mark.parametrize("piece", ["the answer is ", "( not ", "no - 1 ", "dot\n"])
def test_time_is_linear_in_the_length_of_an_answer(form, piece):
    """A model may repeat itself up to the limit of tokens: eight times the text is nowhere near 64 times the work."""
    item = ITEMS[f"{form}-0"]

    def seconds(count: int) -> float:
        start = time.process_time()
        bbh_answer(item, piece * count)
        return time.process_time() - start

    short, long = (min(seconds(count) for _ in range(2)) for count in (5_000, 40_000))
    assert long < 25 * short + 0.2


def test_words_are_compared_as_they_are_and_numbers_by_value():
    assert same_answer("-11,520.0", "-11520")
    assert not same_answer("11520", "-11520")
    assert same_answer("a b", "a  b")
    assert not same_answer("b a", "a b")

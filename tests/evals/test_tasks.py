from __future__ import annotations

import re
from collections import Counter

import pytest

from gendistill_evals import (
    JUDGES,
    PROTOCOLS,
    EvalError,
    list_questions,
    list_tasks,
    load_questions,
    load_task,
)
from gendistill_evals.extract import find_option
from gendistill_evals.items import Kind
from gendistill_evals.suites import SUITES


@pytest.mark.parametrize("name", SUITES["smoke"].tasks)
def test_every_built_in_task_is_right_when_answered_with_its_gold(name):
    task = load_task(name)
    assert task.name == name
    assert task.description
    for item in task.items:
        assert JUDGES[task.judge](item, f"{item.gold}.").correct, item


@pytest.mark.parametrize("name", list_tasks())
def test_every_built_in_task_loads_and_says_what_it_is(name):
    task = load_task(name, data="sample")
    assert task.name == name
    assert task.description


@pytest.mark.parametrize("name", SUITES["smoke"].tasks)
def test_no_position_of_the_gold_answer_is_favoured(name):
    items = load_task(name).items
    assert len(items) >= 24
    places = Counter(item.options.index(item.gold) for item in items)
    assert max(places.values()) - min(places.values()) <= 1
    assert len(places) == len(items[0].options)


def test_no_built_in_question_gives_its_answer_away():
    for item in load_task("everyday").items:
        assert find_option(item.prompt, item.options) is None, item


def test_built_in_sums_are_right_and_distractors_as_long_as_the_answer():
    """Among answers of one length, log-likelihood cannot prefer one for being shorter."""
    checked = 0
    for item in load_task("arithmetic").items:
        assert {len(option) for option in item.options} == {len(item.gold)}, item
        terms = re.fullmatch(r"What is (\d+) ([+x-]) (\d+)\?", item.prompt)
        if terms:
            left, sign, right = terms.groups()
            value = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}[sign](int(left), int(right))
            assert item.gold == str(value), item
            checked += 1
    assert checked > 20


def test_built_in_questions_load():
    assert "demo" in list_questions()
    assert 8 <= len(load_questions("demo").items) <= 12


def test_gsm8k_rows_need_only_a_short_task_file(write_task):
    rows = [
        {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"question": "A thousand and one?", "answer": "Count.\n#### 1,001"},
    ]
    task = load_task(write_task(rows, kind="numeric", gold_after="####", fields={"gold": "answer"}))
    assert [item.gold for item in task.items] == ["4", "1,001"]
    assert [item.id for item in task.items] == ["0", "1"]
    assert task.items[0].options is None
    assert "distractors" in PROTOCOLS["likelihood"].why_not(task)
    assert JUDGES[task.judge](task.items[1], "So there are 1001.") == ("1001", True)
    assert JUDGES[task.judge](task.items[1], "Many.") == (None, False)


def test_mmlu_rows_are_asked_and_answered_by_letter(write_task):
    rows = [{"question": "2 + 2?", "choices": [3, 4, 5, 6], "answer": 1}]
    path = write_task(
        rows,
        kind="multiple_choice",
        answer="letter",
        gold="index",
        fields={"options": "choices", "gold": "answer"},
        prompt="{question}\n{options}\nAnswer with the letter.",
    )
    (item,) = load_task(path).items
    assert item.prompt == "2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer with the letter."
    assert (item.options, item.texts, item.gold) == (("A", "B", "C", "D"), ("3", "4", "5", "6"), "B")


def test_options_may_lie_in_several_columns_or_inside_one(write_task):
    columns = [{"q": {"text": "Why?"}, "a": "no", "b": "yes", "key": "B"}]
    path = write_task(
        columns,
        kind="multiple_choice",
        gold="letter",
        fields={"question": "q.text", "options": ["a", "b"], "gold": "key"},
        prompt="{question} {options}? {{}}",
    )
    (item,) = load_task(path).items
    assert (item.prompt, item.gold) == ("Why? no or yes? {}", "yes")


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    (tmp_path / "open.jsonl").write_text('{"question": "one\u2028two"}\n\n{"question": "three"}\n')
    assert [each.question for each in load_questions(tmp_path / "open.jsonl").items] == [
        "one\u2028two",
        "three",
    ]


def test_hashes_follow_content_and_not_wording_of_the_file(write_task):
    rows = [{"question": "a?", "gold": "b"}]
    base = load_task(write_task(rows, kind="exact_match"))
    same = load_task(write_task(rows, kind="exact_match", description="other words"))
    assert (same.items_sha256, same.prompt_sha256) == (base.items_sha256, base.prompt_sha256)
    longer = load_task(write_task(rows, kind="exact_match", max_new_tokens=9))
    assert longer.items_sha256 == base.items_sha256
    assert longer.prompt_sha256 != base.prompt_sha256
    other = load_task(write_task([{"question": "a?", "gold": "c"}], kind="exact_match"))
    assert other.items_sha256 != base.items_sha256


def test_unknown_names_say_what_was_meant():
    with pytest.raises(EvalError) as caught:
        load_task("everydy")
    assert caught.value.exit_code == 2
    assert 'did you mean "everyday"' in caught.value.hint
    with pytest.raises(EvalError, match="there is no file") as caught:
        load_task("missing/task.yaml")
    assert caught.value.exit_code == 2
    with pytest.raises(EvalError, match="set of questions"):
        load_questions("dem")


ROW = {"question": "a?", "gold": "b", "options": ["b", "c"]}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        pytest.param([ROW], {"kind": "essay"}, '"kind" must be one of', id="kind"),
        pytest.param([ROW], {"promt": "x"}, 'unknown key "promt"', id="unknown key"),
        pytest.param([ROW], {"max_new_tokens": 0}, "above 0", id="no tokens"),
        pytest.param([ROW], {"metric": "f1"}, '"metric" must be one of', id="metric"),
        pytest.param([ROW], {"stop": "x"}, "list of texts", id="stop"),
        pytest.param([ROW], {"name": "../x"}, "must be letters", id="name"),
        pytest.param([ROW], {"fields": {"gold": 3}}, "maps names to columns", id="fields"),
        pytest.param([ROW], {"items": "gone.jsonl"}, "file of items is missing", id="missing items"),
        pytest.param([ROW], {"prompt": "{question.__class__}"}, "only plain names", id="attribute"),
        pytest.param([ROW], {"prompt": "{question!r}"}, "only plain names", id="conversion"),
        pytest.param([ROW], {"prompt": "{question"}, "not a template", id="brace"),
        pytest.param([ROW], {"prompt": "{topic}"}, "which the row lacks", id="unknown column"),
        pytest.param([ROW], {"kind": "exact_match", "answer": "letter"}, "only fit", id="letters for text"),
        pytest.param([ROW], {"gold_after": "#"}, "does not fit", id="gold_after for options"),
        pytest.param([], {}, "no items", id="empty"),
        pytest.param([ROW | {"gold": "d"}], {}, "none of b, c", id="gold is no option"),
        pytest.param([ROW], {"gold": "index"}, "index from 0 to 1", id="gold is no index"),
        pytest.param([ROW | {"options": ["b"]}], {}, "2 to 26", id="one option"),
        pytest.param([ROW | {"options": ["b", "b"]}], {}, "the same", id="equal options"),
        pytest.param([ROW | {"options": ["b", "B."]}], {}, "differ only", id="options alike"),
        pytest.param([ROW | {"options": ["b", " "]}], {}, "is empty", id="empty option"),
        pytest.param([{"question": "a?"}], {}, 'no column "gold"', id="no gold"),
        pytest.param([ROW | {"id": 1}, ROW | {"id": 1}], {}, "stands twice", id="repeated id"),
        pytest.param([ROW], {"kind": "numeric"}, "is not a number", id="gold is no number"),
        pytest.param([ROW], {"kind": "exact_match", "gold_after": "#"}, 'no "#"', id="no marker"),
        pytest.param(
            [ROW | {"distractors": ["c"]}, ROW],
            {"kind": "exact_match"},
            "has no distractors",
            id="some distractors",
        ),
        pytest.param(
            [{"question": "a?", "gold": "1000", "distractors": ["1,000.0", "5"]}],
            {"kind": "numeric"},
            "the same answer",
            id="a distractor that is right",
        ),
        pytest.param(
            [{"question": "a?", "gold": "Paris", "distractors": ["paris", "Rome"]}],
            {"kind": "exact_match"},
            "the same answer",
            id="a distractor in small letters",
        ),
    ],
)
def test_what_does_not_fit_is_named(write_task, rows, settings, message):
    with pytest.raises(EvalError, match=re.escape(message)) as caught:
        load_task(write_task(rows, **{"kind": "multiple_choice", **settings}))
    assert caught.value.where
    assert caught.value.exit_code == 1


def test_a_broken_line_is_named_by_number(write_task):
    path = write_task([ROW], kind="multiple_choice")
    items = path.with_suffix(".jsonl")
    items.write_text(items.read_text() + "{broken\n")
    with pytest.raises(EvalError, match="not JSON") as caught:
        load_task(path)
    assert caught.value.where == f"{items}:2"


def test_kinds_are_the_documented_ones():
    assert [str(kind) for kind in Kind] == ["multiple_choice", "numeric", "exact_match"]

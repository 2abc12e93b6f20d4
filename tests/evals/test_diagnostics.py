"""Planted models: one that always says A, one that is right by content, one that lost the form of answers."""

from __future__ import annotations

import json
import re

import pytest

from gendistill_evals import PROTOCOLS, EvalError, evaluate_model, load_task
from gendistill_evals.diagnostics import (
    answer_statistics,
    by_subject,
    diagnose,
    in_other_orders,
    order_statistics,
)
from gendistill_evals.items import Item
from gendistill_evals.protocols import ends_in_loop
from gendistill_evals.results import read_results, read_samples
from gendistill_evals.stats import flips, gap, hidden_gap

COLORS = ["red", "blue", "green", "black"]
ROWS = [
    {
        "id": f"q{n}",
        "question": f"Number {n}?",
        "options": COLORS,
        "gold": COLORS[n % 4],
        "topic": f"t{n % 3}",
    }
    for n in range(24)
]
LETTERS = ["likelihood_letter", "generation_letter"]


@pytest.fixture
def quiz(write_task):
    return write_task(
        ROWS, stem="quiz", kind="multiple_choice", subject="topic", max_new_tokens=16, thought_tokens=16
    )


def gold_letter(prompt):
    """Read the question's number, and find the letter that the gold color stands at now."""
    number = int(re.findall(r"Number (\d+)\?", prompt)[-1])
    found = re.findall(r"([A-D])\. (\w+)", prompt)
    return next((letter for letter, text in found if text == COLORS[number % 4]), COLORS[number % 4])


class ByContent:
    """Prefer and say the right option, wherever it stands."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def log_probs(self, pairs):
        for index, pair in enumerate(pairs):
            prompt = self.tokenizer.decode(pair.context)
            text = self.tokenizer.decode(pair.continuation).strip()
            yield index, [0.0 if text == gold_letter(prompt) else -9.0] * len(pair.continuation)


def knower(scripted, tokenizer):
    return ByContent(scripted(tokenizer, says=gold_letter))


def test_a_model_that_always_says_a_sticks_to_its_place(quiz, scripted, chat_tokenizer, tmp_path):
    model = scripted(chat_tokenizer, log_probs={"A": -1.0}, says=lambda prompt: "A")
    results = evaluate_model(
        model, tasks=[quiz], out_dir=tmp_path, model_name="m", protocols=LETTERS, permutations=3
    )
    assert results["diagnostics"]["permutations"] == 3
    for name in LETTERS:
        order = results["diagnostics"]["tasks"]["quiz"][name]["order"]
        assert (order["n"], order["answered"], order["pairs"]) == (24, 24, 72)
        assert order["stickiness"] == 1.0
        # What stands at A is another option each time; right a quarter of the time, in each order.
        assert order["content_changes"] == 1.0
        assert order["places"] == {"0": 1.0}
        assert order["flips"] == pytest.approx(0.5)
    rows = read_samples(tmp_path)
    assert [each["order"] for each in rows[0]["generation_letter"]["permuted"]] == [
        [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]
    ]  # fmt: skip
    assert {each["choice"] for row in rows for each in row["generation_letter"]["permuted"]} == {0}


def test_a_model_that_knows_the_content_follows_it(quiz, scripted, chat_tokenizer, tmp_path):
    model = knower(scripted, chat_tokenizer)
    results = evaluate_model(
        model, tasks=[quiz], out_dir=tmp_path, model_name="m", protocols=LETTERS, permutations=2
    )
    for name in LETTERS:
        order = results["diagnostics"]["tasks"]["quiz"][name]["order"]
        assert (order["stickiness"], order["content_changes"], order["flips"]) == (0, 0, 0)
        assert order["places"] == pytest.approx({"0": 0.25, "1": 0.25, "2": 0.25, "3": 0.25})
        assert results["tasks"][0][name]["value"] == 1


def test_options_that_no_prompt_shows_have_no_order(quiz, scripted, chat_tokenizer, tmp_path):
    model = scripted(chat_tokenizer, says=lambda prompt: "red")
    results = evaluate_model(model, tasks=[quiz], out_dir=tmp_path, model_name="m", permutations=3)
    assert [
        results["diagnostics"]["tasks"]["quiz"][name]["order"] for name in ("likelihood", "generation")
    ] == [None] * 2
    assert not any("permuted" in row["generation"] for row in read_samples(tmp_path))


def test_words_in_the_prompt_have_an_order_too(write_task, scripted, chat_tokenizer, tmp_path):
    """It names whichever option is listed first, so its place never changes."""
    path = write_task(ROWS, kind="multiple_choice", prompt="{question} {options}?")
    model = scripted(chat_tokenizer, says=lambda prompt: re.search(r"\? (\w+),", prompt)[1])
    results = evaluate_model(
        model, tasks=[path], out_dir=tmp_path, model_name="m", protocols=["generation"], permutations=1
    )
    order = results["diagnostics"]["tasks"]["demo"]["generation"]["order"]
    assert (order["stickiness"], order["content_changes"], order["n"]) == (1.0, 1.0, 24)


def test_letters_that_only_the_prompt_explains_are_permuted(write_task, scripted, chat_tokenizer, tmp_path):
    rows = [{"input": f"{n}?\nA. 3\nB. 4\nC. 5\nAnswer:", "output": "B"} for n in range(5)]
    path = write_task(
        rows, kind="multiple_choice", options=["A", "B", "C"], fields={"gold": "output"}, gold="letter",
        prompt="{input}",
    )  # fmt: skip
    model = scripted(chat_tokenizer, says=lambda prompt: re.search(r"([ABC])\. 4", prompt)[1])
    results = evaluate_model(
        model, tasks=[path], out_dir=tmp_path, model_name="m", protocols=["generation"], permutations=2
    )
    order = results["diagnostics"]["tasks"]["demo"]["generation"]["order"]
    assert (order["stickiness"], order["content_changes"], order["flips"]) == (0, 0, 0)
    assert results["tasks"][0]["generation"]["value"] == 1


def test_orders_shift_every_option_and_leave_small_items_out(write_task):
    rows = [
        {"question": "a?", "options": ["x", "y"], "gold": "x"},
        {"question": "b?", "options": ["x", "y", "z"], "gold": "z"},
    ]
    task = load_task(write_task(rows, kind="multiple_choice", prompt="{question} {options}"))
    first, second = in_other_orders(task, 5)
    assert (first.places, first.orders) == ((0, 1), ((1, 0), (1, 2, 0)))
    assert (second.places, second.orders) == ((1,), ((2, 0, 1),))
    assert [item.gold for item in first.task.items] == ["x", "z"]
    assert in_other_orders(task, 0) == []
    assert [each.places for each in in_other_orders(task, 3, limit=1)] == [(0,)]


def test_unread_answers_are_not_counted_as_chosen():
    def said(choice, *, correct=False, order=(1, 0)):
        return {"choice": choice, "correct": correct, "order": list(order)}

    first = [said(0, correct=True), said(None), said(1), said(1)]
    others = [{0: said(None), 1: said(0, correct=True), 2: said(0), 3: said(1)}]
    # Items 2 and 3 were answered both times: 2 followed the content, 3 stayed at its place.
    assert order_statistics(first, others) == {
        "n": 4, "answered": 2, "stickiness": 0.5, "pairs": 4, "content_changes": 0.5, "flips": 0.5,
        "places": {"0": 3 / 6 - 0, "1": 3 / 6},
    }  # fmt: skip
    assert order_statistics(first, [{}]) is None
    nothing = order_statistics([said(None)], [{0: said(None)}])
    assert nothing is not None
    assert (nothing["stickiness"], nothing["content_changes"], nothing["places"]) == (None, None, {})


def test_unread_answers_have_examples_and_lengths_are_told():
    items = [Item(f"i{n}", "q", "g", None, None) for n in range(30)]
    samples = [
        {"text": f"text {n}" + "x" * 400, "extracted": None if n < 25 else "g", "ended": n > 5, "num_tokens": n + 1,
         "repeats": n == 3, "correct": n >= 25}
        for n in range(30)
    ]  # fmt: skip
    found = answer_statistics(items, samples)
    assert found["unread"] == 25 / 30
    assert [each["id"] for each in found["unread_examples"]] == [f"i{n}" for n in range(20)]
    assert all(len(each["text"]) == 300 for each in found["unread_examples"])
    assert (found["ended"], found["looping"], found["looping_ids"]) == (24 / 30, 1 / 30, ["i3"])
    assert found["num_tokens"] == {"mean": 15.5, "p5": 2, "p50": 15, "p95": 28, "max": 30}


def test_subjects_are_scored_by_themselves(quiz, scripted, chat_tokenizer, tmp_path):
    model = scripted(chat_tokenizer, says=lambda prompt: "red")
    results = evaluate_model(model, tasks=[quiz], out_dir=tmp_path, model_name="m", protocols=["generation"])
    subjects = results["diagnostics"]["tasks"]["quiz"]["generation"]["subjects"]
    right = [row["gold"] == "red" for row in ROWS]
    assert subjects == {
        f"t{topic}": {"value": sum(right[topic::3]) / 8, "n": 8} for topic in range(3)
    }  # fmt: skip
    assert {row["subject"] for row in read_samples(tmp_path)} == {"t0", "t1", "t2"}
    assert by_subject([Item("0", "q", "g", None, None)], [{"correct": True}]) == {}


def test_items_have_a_group_in_their_rows(write_task, scripted, chat_tokenizer, tmp_path):
    path = write_task(ROWS, kind="multiple_choice", group="topic")
    evaluate_model(scripted(chat_tokenizer), tasks=[path], out_dir=tmp_path, model_name="m")
    assert [row["group"] for row in read_samples(tmp_path)] == [row["topic"] for row in ROWS]
    plain = write_task(ROWS, stem="plain", kind="multiple_choice")
    assert [item.group for item in load_task(plain).items] == [row["id"] for row in ROWS]
    # Neither says how items are asked.
    assert load_task(path).prompt_sha256 == load_task(plain).prompt_sha256


@pytest.mark.parametrize("key", ["group", "subject"])
@pytest.mark.parametrize(
    ("value", "message"), [(None, "there is no column"), (" ", "is empty"), ([1], "must be a text")]
)
def test_groups_and_subjects_that_are_none_are_named_by_line(write_task, key, value, message):
    rows = [{"question": "a?", "gold": "b", "of": "x"}, {"question": "c?", "gold": "d", "of": value}]
    with pytest.raises(EvalError, match=message) as caught:
        load_task(write_task(rows, kind="exact_match", **{key: "of"}))
    assert caught.value.where.endswith("demo.jsonl:2")


@pytest.mark.parametrize("value", [-1, 26, True, 1.5])
def test_orders_that_cannot_be_are_refused(quiz, scripted, chat_tokenizer, tmp_path, value):
    with pytest.raises(EvalError, match="permutations must be a whole number from 0 to 25"):
        evaluate_model(
            scripted(chat_tokenizer), tasks=[quiz], out_dir=tmp_path, model_name="m", permutations=value
        )


def test_time_spent_on_other_orders_is_not_the_scores(quiz, scripted, chat_tokenizer, tmp_path):
    model = scripted(chat_tokenizer, says=lambda prompt: "A")
    where = {"tasks": [quiz], "model_name": "m", "protocols": LETTERS, "parts_dir": tmp_path / "parts"}
    alone = evaluate_model(model, **where, out_dir=tmp_path / "a")
    beside = evaluate_model(model, **where, out_dir=tmp_path / "b", permutations=3)
    assert beside["tasks"] == alone["tasks"]
    assert "order" not in alone["diagnostics"]["tasks"]["quiz"]["generation_letter"]


def vectors(folder, names):
    rows = read_samples(folder)
    return {name: [row[name]["correct"] for row in rows] for name in names}


def test_a_broken_form_of_answers_is_a_hidden_gap(quiz, scripted, chat_tokenizer, tmp_path):
    """The student ranks as its teacher does, and of what it writes a third is nothing but a loop."""
    teacher = knower(scripted, chat_tokenizer)

    def broken(prompt):
        number = int(re.findall(r"Number (\d+)\?", prompt)[-1])
        return "0 " * 30 if number % 3 == 0 else gold_letter(prompt)

    student = ByContent(scripted(chat_tokenizer, says=broken))
    names = [*PROTOCOLS]
    for role, model in (("teacher", teacher), ("student", student)):
        evaluate_model(
            model, tasks=[quiz], out_dir=tmp_path / role, model_name=role, role=role,
            protocols=[name for name in names if name != "generation_thought"],
        )  # fmt: skip
    for ranked, written in (("likelihood", "generation"), ("likelihood_letter", "generation_letter")):
        before, after = (vectors(tmp_path / role, (ranked, written)) for role in ("teacher", "student"))
        hidden = hidden_gap(
            teacher_likelihood=before[ranked],
            student_likelihood=after[ranked],
            teacher_generation=before[written],
            student_generation=after[written],
        )
        assert hidden.value == pytest.approx(-1 / 3)
        assert hidden.high < -0.10
        answers = read_results(tmp_path / "student")["diagnostics"]["tasks"]["quiz"][written]["answers"]
        assert answers["unread"] == pytest.approx(1 / 3)
        assert answers["looping"] == pytest.approx(1 / 3)
        assert len(answers["unread_examples"]) == 8


def test_a_teacher_against_itself_is_exactly_nothing(quiz, tiny_llama, chat_tokenizer, tmp_path):
    names = [*PROTOCOLS]
    for role in ("teacher", "student"):
        evaluate_model(
            tiny_llama, chat_tokenizer, tasks=[quiz], out_dir=tmp_path / role, model_name=role, role=role,
            protocols=names, permutations=2, parts_dir=tmp_path / "parts" / role,
        )  # fmt: skip
    before, after = (vectors(tmp_path / role, names) for role in ("teacher", "student"))
    assert before == after
    for name in names:
        found = gap(before[name], after[name])
        assert found.value == 0
        # no difference among a few items does not prove that there is none: the interval keeps a width
        assert found.low == -found.high < 0
        turned = flips(before[name], after[name])
        assert (turned.gained, turned.lost, turned.p) == (0, 0, 1.0)
    hidden = hidden_gap(
        teacher_likelihood=before["likelihood"], student_likelihood=after["likelihood"],
        teacher_generation=before["generation"], student_generation=after["generation"],
    )  # fmt: skip
    assert hidden.value == 0
    assert hidden.low == -hidden.high < 0
    diagnostics = [read_results(tmp_path / role)["diagnostics"] for role in ("teacher", "student")]
    assert json.dumps(diagnostics[0]) == json.dumps(diagnostics[1])


def test_a_protocol_of_anybody_is_diagnosed_by_what_it_gives():
    from gendistill_evals import ProtocolRun

    items = [Item("0", "q", "g", None, None)]
    assert diagnose(items, {"mine": ProtocolRun({"value": 1.0, "n": 1}, ({"correct": True},))}, {}) == {
        "mine": {}
    }
    assert not ends_in_loop([])


@pytest.mark.parametrize(
    "option",
    [
        "All of the above", "none of the above.", "All of the above areas.", "it could be any of the above",
        "the above", "All of these", "Either of these.", "All of these options.", "none of the other choices",
        "both A and B", "Neither a nor b.", "neither a nor. b.", "C. both (a) and (c)", "A and C only", "A, B and C",
        "A & B", "(B) or (C)", "A only", "Options B and C",
    ],
)  # fmt: skip
def test_options_that_speak_of_others_stay_where_they_are(write_task, option):
    """In another place they say another thing: "all of the above" is nothing at the top."""
    rows = [{"question": "a?", "options": ["x", "y", "z", option], "gold": "x"}]
    task = load_task(
        write_task(rows, kind="multiple_choice", answer="letter", prompt="{question}\n{options}")
    )
    assert in_other_orders(task, 3) == []


@pytest.mark.parametrize(
    "option",
    [
        "0.40 ounce above the mean", "These organisms have analogous structures.", "Above $30.", "both parties",
        "has all of its electrons paired", "I and II only", "Neither the man nor the student", "vitamins A and D",
        "Both I and II", "a mean of the above-ground mass of trees", "A cat", "a", "both a cat and a dog",
        "Some of these molecules are split", "AB", "Consistent when A and B are true",
    ],
)  # fmt: skip
def test_options_that_speak_of_the_world_are_moved(write_task, option):
    rows = [{"question": "a?", "options": ["x", "y", "z", option], "gold": "x"}]
    task = load_task(
        write_task(rows, kind="multiple_choice", answer="letter", prompt="{question}\n{options}")
    )
    assert len(in_other_orders(task, 3)) == 3


def test_an_answer_that_writes_an_option_otherwise_has_its_place(
    write_task, scripted, chat_tokenizer, tmp_path
):
    rows = [
        {"question": f"Number {n}?", "gold": "1,234", "distractors": ["12.5", "7"], "id": str(n)}
        for n in range(3)
    ]
    path = write_task(rows, stem="sums", kind="numeric", max_new_tokens=16)
    said = {"0": "1234", "1": "12.50", "2": "8"}
    model = scripted(chat_tokenizer, says=lambda prompt: said[re.search(r"Number (\d)", prompt)[1]])
    evaluate_model(model, tasks=[path], out_dir=tmp_path, model_name="m", protocols=["generation"])
    found = [row["generation"]["choice"] for row in read_samples(tmp_path)]
    # The right answer takes turns among the places.
    assert found == [0, 0, None]

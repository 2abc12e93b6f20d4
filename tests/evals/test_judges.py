"""A task names its judge or has the one of its kind."""

from __future__ import annotations

import pytest

from gendistill_evals import JUDGES, EvalError, HFModel, Judgement, evaluate_model, load_task
from gendistill_evals.forms import Form
from gendistill_evals.items import Item
from gendistill_evals.protocols import Generation

CHOICE = {"question": "a?", "options": ["red", "blue"], "gold": "blue"}
NUMBER = {"question": "a?", "gold": "3", "distractors": ["4"]}


@pytest.mark.parametrize(
    ("row", "settings", "judge"),
    [
        (CHOICE, {"kind": "multiple_choice"}, "option"),
        (CHOICE, {"kind": "multiple_choice", "answer": "letter"}, "letter"),
        (NUMBER, {"kind": "numeric"}, "numeric"),
        (NUMBER, {"kind": "exact_match"}, "exact_match"),
    ],
)
def test_the_kind_decides_unless_the_task_does(write_task, row, settings, judge):
    task = load_task(write_task([row], **settings))
    assert task.judge == judge
    assert load_task(write_task([row], **settings, judge=judge)).prompt_sha256 == task.prompt_sha256


def test_another_judge_gives_the_task_another_identity(write_task):
    tasks = [
        load_task(write_task([NUMBER], kind="exact_match", judge=judge))
        for judge in ("exact_match", "numeric")
    ]
    assert tasks[0].prompt_sha256 != tasks[1].prompt_sha256
    text = "It is 3."
    assert [JUDGES[task.judge](task.items[0], text).correct for task in tasks] == [False, True]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (CHOICE, {"kind": "multiple_choice", "judge": "letter"}, "options are not letters"),
        (CHOICE, {"kind": "multiple_choice", "judge": "numeric"}, "gold answer is not a number"),
        ({"question": "a?", "gold": "b"}, {"kind": "exact_match", "judge": "option"}, "has no options"),
    ],
)
def test_a_judge_that_lacks_what_it_compares_with_is_refused(write_task, row, settings, message):
    with pytest.raises(EvalError, match=f"cannot judge item 0: .*{message}") as caught:
        load_task(write_task([row], **settings))
    assert "option, letter, numeric, exact_match" in caught.value.hint


@pytest.mark.parametrize("judge", ["exact_mach", 3, None, ["option"]])
def test_a_judge_that_there_is_not_is_refused_with_those_there_are(write_task, judge):
    with pytest.raises(
        EvalError, match='"judge" must be one of option, letter, numeric, exact_match'
    ) as caught:
        load_task(write_task([CHOICE], kind="multiple_choice", judge=judge))
    assert (caught.value.hint == 'did you mean "exact_match"?') == (judge == "exact_mach")


def test_a_judge_of_another_package_judges(write_task, speaker, chat_tokenizer, tmp_path, monkeypatch):
    def polite(item, text):
        return Judgement(text or None, text.endswith("please"))

    monkeypatch.setitem(JUDGES, "polite", polite)
    path = write_task([{"question": "a?", "gold": "b"}, {"question": "c?", "gold": "d"}], kind="exact_match",
                      judge="polite")  # fmt: skip
    model = HFModel(speaker(lambda prompt: "A please" if "a?" in prompt else "A"), chat_tokenizer)
    (entry,) = evaluate_model(model, tasks=[path], out_dir=tmp_path / "out", model_name="m")["tasks"]
    assert (entry["judge"], entry["generation"]["value"]) == ("polite", 0.5)


@pytest.mark.parametrize("judge", ["numeric", "bbh"])
@pytest.mark.parametrize(
    ("text", "extracted"),
    [("9" * 5000, "9" * 5000), ("0.00000001", "0.00000001"), ("18.00", "18"), ("-007", "-7"), ("0.0", "0")],
)
def test_numbers_of_any_size_are_read_in_plain_digits(judge, text, extracted):
    item = Item("1", "How many?", "18", None, None)
    assert JUDGES[judge](item, text) == (extracted, extracted == "18")


def test_a_stated_number_is_the_first_of_its_statement(write_task):
    item = Item("1", "How many?", "18", None, None)
    thought = Generation("generation_thought", "", form=Form.THOUGHT)
    task = load_task(
        write_task([{"question": "q", "gold": "18"}], stem="sums", kind="numeric", max_new_tokens=4)
    )
    assert thought._judge(item, "So the answer is that 18 apples last 2 days.", task, opens=False).correct

"""Options that every item of a task shares, such as letters that the prompt's own text explains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import gendistill_evals
from gendistill_evals import JUDGES, PROTOCOLS, EvalError, evaluate_model, load_task

ROWS = [
    {"subject": "maths", "input": "2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:", "output": "B"},
    {"subject": "music", "input": "Strings of a violin?\nA. 3\nB. 6\nC. 5\nD. 4\nAnswer:", "output": "D"},
]
MMLU = {
    "kind": "multiple_choice",
    "options": ["A", "B", "C", "D"],
    "fields": {"gold": "output"},
    "gold": "letter",
    "prompt": "{input}",
}


@pytest.mark.parametrize("gold", ["letter", "text"])
@pytest.mark.parametrize("answer", ["letter", "text"])
def test_letters_that_the_prompt_explains_are_ranked_and_read(write_task, gold, answer):
    task = load_task(write_task(ROWS, **MMLU | {"gold": gold, "answer": answer}))
    assert [item.prompt for item in task.items] == [row["input"] for row in ROWS]
    assert [(item.options, item.gold) for item in task.items] == [
        (("A", "B", "C", "D"), gold) for gold in "BD"
    ]
    assert PROTOCOLS["likelihood"].why_not(task) is None
    for text, found in (
        ("B", "B"),
        ("The answer is (b) 4.", "B"),
        ("A dog", None),
        ("a number", None),
        ("A or B", None),
    ):
        assert JUDGES[task.judge](task.items[0], text) == (found, found == "B")


def test_gold_may_be_an_index(write_task):
    rows = [{**row, "output": place} for row, place in zip(ROWS, (1, 3), strict=True)]
    task = load_task(write_task(rows, **MMLU | {"gold": "index"}))
    assert [item.gold for item in task.items] == ["B", "D"]


def test_words_may_be_options_too(write_task):
    rows = [{"question": "Is fire cold?", "gold": "no"}, {"question": "Is ice cold?", "gold": "yes"}]
    task = load_task(
        write_task(rows, kind="multiple_choice", options=["yes", "no"], prompt="{question} {options}?")
    )
    assert [item.prompt for item in task.items] == ["Is fire cold? yes or no?", "Is ice cold? yes or no?"]
    assert JUDGES[task.judge](task.items[1], "Yes, it is.") == ("yes", True)
    lettered = load_task(
        write_task(
            rows,
            kind="multiple_choice",
            options=["yes", "no"],
            answer="letter",
            prompt="{question}\n{options}",
        )
    )
    assert lettered.items[0].prompt == "Is fire cold?\nA. yes\nB. no"
    assert JUDGES[lettered.judge](lettered.items[1], "yes") == ("A", True)


def test_options_enter_the_hash_of_the_prompt(write_task):
    rows = [{"question": "a?", "gold": "yes"}]
    hashes = {
        load_task(write_task(rows, kind="multiple_choice", options=options)).prompt_sha256
        for options in (["yes", "no"], ["no", "yes"], ["yes", "no", "maybe"])
    }
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fields": {"gold": "output", "options": ["A", "B"]}}, "both options and fields.options"),
        ({"fields": {"gold": "output", "options": "choices"}}, "both options and fields.options"),
        ({"options": []}, '"options" must be a list of 2 to 26 texts'),
        ({"options": None}, '"options" must be a list of 2 to 26 texts'),
        ({"options": "ABCD"}, '"options" must be a list of texts'),
        ({"options": [True, False]}, '"options" must be a list of texts'),
        ({"options": [1, 2]}, '"options" must be a list of texts'),
        ({"options": ["A"]}, "2 to 26 options"),
        ({"options": ["A", "A"]}, "the same"),
        ({"options": ["A", "B"]}, "none of A, B"),
        ({"kind": "exact_match", "gold": None}, "options only fit"),
    ],
)
def test_options_that_cannot_be_are_named(write_task, settings, message):
    content = {
        key: value for key, value in {**MMLU, **settings}.items() if value is not None or key == "options"
    }
    with pytest.raises(EvalError, match=re.escape(message)) as caught:
        load_task(write_task(ROWS, **content))
    assert caught.value.hint


def test_the_example_of_the_readme_scores_a_model(tiny_llama, chat_tokenizer, write_task, tmp_path):
    readme = (Path(gendistill_evals.__file__).parents[1] / "README.md").read_text()
    example = next(
        block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "\noptions: [A" in block
    )
    content = yaml.safe_load(example)
    path = write_task(ROWS, **{**content, "items": "demo.jsonl"})
    results = evaluate_model(
        tiny_llama, chat_tokenizer, tasks=[path], out_dir=tmp_path / "out", model_name="demo", batch_size=2
    )
    (task,) = results["tasks"]
    assert (task["n"], task["likelihood"]["n"], task["generation"]["n"]) == (2, 2, 2)

"""What a stage may ask its student while it trains."""

from __future__ import annotations

import json

import pytest
import yaml

import gendistill as gd
from gendistill.config.load import load_recipe
from gendistill.runs.examiner import TaskExaminer, check_examiner
from gendistill_evals.errors import EvalError
from gendistill_evals.task import load_task


@pytest.fixture(scope="module")
def tiny():
    return gd.load("builtin:tiny")


def test_texts_of_generated_tasks_are_made_for_the_student(tiny, tmp_path):
    content = yaml.safe_load((gd_tasks() / "needle.yaml").read_text())
    content["generate"] |= {"lengths": [192], "depths": [50], "per_cell": 2}
    content["max_new_tokens"] = 4
    path = tmp_path / "needle.yaml"
    path.write_text(json.dumps(content))
    assert not load_task(path).items
    score = TaskExaminer(tiny.model, tiny.tokenizer).score(tiny.model, str(path), 1)
    assert score["n"] == 1


def test_programs_are_not_run_while_a_stage_trains(tiny, tmp_path):
    problem = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() is None\n", "entry_point": "f"}
    (tmp_path / "items.jsonl").write_text(
        json.dumps({"id": "1", "prompt": "def f():", "gold": json.dumps(problem)})
    )
    task = tmp_path / "programs.yaml"
    task.write_text(
        "kind: exact_match\njudge: code\nitems: items.jsonl\nprompt: '{prompt}'\nmax_new_tokens: 4\n"
    )
    recipe = load_recipe("tiny", [f"watch.task={task}", "watch.score_every_steps=2"])
    with pytest.raises(EvalError, match="off unless asked for"):
        check_examiner(recipe, tiny.tokenizer, tiny.model.config.to_dict())


def gd_tasks():
    from gendistill_evals import task

    return task._TASKS

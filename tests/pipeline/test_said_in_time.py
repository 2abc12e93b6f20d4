"""What cannot end well is said before anything is converted or trained, and what is unwise is in the manifest."""

from __future__ import annotations

import json

import pytest

from gendistill.paths import read_json
from gendistill.runs import pipeline
from gendistill_evals import task
from gendistill_evals.errors import EvalError


def fail(*_, **__):
    pytest.fail("nothing may be converted yet")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.question_tokens=5000", "are too long for the model"),
        ("eval.tasks=[arithmetic, {root}/long.yaml]", "are too long for the model"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_before_conversion(place, monkeypatch, override, message):
    (place.root / "long.yaml").write_text(
        json.dumps(
            {"items": "colours.jsonl", "kind": "exact_match", "prompt": "{question}", "max_new_tokens": 4000}
        )
    )
    monkeypatch.setattr(pipeline, "apply_plan", fail)
    with pytest.raises(EvalError, match=message) as caught:
        place.run(override.format(root=place.root))
    assert caught.value.hint


def test_a_template_that_refuses_questions_is_named_before_conversion(place, monkeypatch):
    (place.teacher / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    monkeypatch.setattr(pipeline, "apply_plan", fail)
    with pytest.raises(EvalError, match="template"):
        place.run()


def test_warnings_are_said_and_kept(place, capsys):
    run = pipeline.convert(
        place.recipe("stages.distill.seq_len=4096", "heldout.seq_len=4096", "heldout.rows=2"), command="test"
    )
    said = capsys.readouterr().out
    kept = read_json(run.manifest)["warnings"]
    for words in ("stages.distill.seq_len is 4,096, the teacher has 2,048 positions", "chat template"):
        assert words in said.replace("\n", " ")
        assert any(words in line for line in kept)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["eval.suite=[code]"], "humaneval cannot be scored"),
        (["eval.tasks=[humaneval]", "eval.allow_code=true"], "cannot be contained on this machine"),
        (["eval.suite=[long]", "eval.lengths=[4096]"], "2,048 positions"),
        (["eval.tasks=[copy]", "eval.lengths=[512]"], "none of the tasks generates texts"),
        (["watch.score_every_steps=1", "watch.task=both"], "2 tasks, and one is meant"),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused_before_conversion(place, monkeypatch, override, message):
    monkeypatch.setenv("GENDISTILL_EVAL_DATA", "sample")
    monkeypatch.setattr("gendistill_evals.sandbox.why_not", lambda: "there are no namespaces")
    monkeypatch.setattr(task, "LOADERS", [_both])
    monkeypatch.setattr(pipeline, "apply_plan", fail)
    with pytest.raises(EvalError, match=message) as caught:
        place.run(*override)
    assert caught.value.hint


def _both(name, trust_code):
    """Load a group, as lm-eval has them."""
    return [task.load_task("copy"), task.load_task("arithmetic")] if name == "both" else None


def test_a_group_of_tasks_and_a_suite_are_scored_in_a_recipe(place, monkeypatch):
    monkeypatch.setattr(task, "LOADERS", [_both])
    run = place.run(
        "eval.tasks=[both]", "eval.suite=[long]", "eval.lengths=[1024]", "eval.limit=1", "eval.questions=null"
    )
    scored = [entry["task"] for entry in read_json(run.eval("student") / "results.json")["tasks"]]
    assert scored == ["copy", "arithmetic", "needle", "multi_key", "variable_tracking", "mqar"]
    rows = (run.eval("student") / "samples.jsonl").read_text().splitlines()
    assert [row["length"] for row in map(json.loads, rows) if "length" in row] == [1024] * 4

"""A run does again what has become stale, says why, and does nothing twice."""

from __future__ import annotations

import pytest

from gendistill.errors import GendistillError
from gendistill.paths import read_json
from gendistill.runs import pipeline


def test_nothing_is_trained_or_scored_again_under_another_name(shared_place, monkeypatch, steps_of):
    first = shared_place.run()
    for work in ("apply_plan", "train_stage", "score"):
        monkeypatch.setattr(pipeline, work, lambda *_, **__: pytest.fail("this was done before"))
    second = shared_place.run(name="second")
    assert steps_of(first) == steps_of(second)
    for name in ("model.safetensors", "config.json"):
        assert (second.student / name).read_bytes() == (first.student / name).read_bytes()
    assert read_json(second.report / "gap.json")["name"] == "second"


def test_a_run_whose_data_has_gone_can_be_scored_again_and_says_so(shared_place, capsys):
    shared_place.run()
    hidden = shared_place.texts.rename(shared_place.root / "hidden")
    try:
        run = pipeline.evaluate(shared_place.recipe("eval.limit=2"), command="test")
        assert "data.text cannot be read any more" in capsys.readouterr().out
        assert read_json(run.eval("student") / "results.json")["tasks"][0]["n"] == 2
        with pytest.raises(GendistillError, match="there is no file"):
            shared_place.run("seed=3", name="another")
        with pytest.raises(GendistillError, match="there is no file"):
            shared_place.run(f"data.text.path={shared_place.root}/misspelt.jsonl")
    finally:
        hidden.rename(shared_place.texts)


@pytest.mark.parametrize("misspelt", ["texts.json", "*.jsn", "texts.jsonl/rows.jsonl"])
def test_data_that_are_looked_for_elsewhere_are_not_taken_for_data_that_have_gone(shared_place, misspelt):
    shared_place.run()
    with pytest.raises(GendistillError, match=r"data\.text"):
        shared_place.run(f"data.text.path={shared_place.root / misspelt}")


def test_scoring_a_student_that_is_not_made_names_the_command_that_makes_it(place):
    command = f"gendistill eval {place.root}/my.yaml seed=3"
    with pytest.raises(GendistillError, match="no finished student") as caught:
        pipeline.evaluate(place.recipe(), command=command)
    assert caught.value.hint == f"gendistill distill {place.root}/my.yaml seed=3"


def test_the_reason_is_said(shared_place, capsys):
    shared_place.run()
    capsys.readouterr()
    pipeline.distill(shared_place.recipe("stages.distill.lr=5e-4"), command="test")
    said = capsys.readouterr().out
    assert "made anew: stages.distill.lr 0.001 -> 0.0005" in said
    assert said.count("done before") == 2

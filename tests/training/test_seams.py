"""What is added from outside: an objective and a monitor, by one file and a line in a dictionary each."""

import json
from dataclasses import replace
from io import StringIO
from typing import Literal

import pytest
import torch

from gendistill.config import objectives
from gendistill.config.load import load_recipe
from gendistill.data.batch import IGNORE
from gendistill.errors import RecipeError, TrainingError
from gendistill.losses import build
from gendistill.losses.base import LossTerm
from gendistill.losses.student import last_hidden
from gendistill.teachers.base import Needs
from gendistill.training import monitors
from gendistill.training.monitors import Stop


class CosineConfig(objectives.ObjectiveConfig):
    """One minus the cosine between last hidden states."""

    kind: Literal["cosine"] = "cosine"  # pyright: ignore
    weight: float = 1.0


class Cosine:
    """Compare directions of last hidden states at counted positions."""

    needs = Needs(hidden=True)
    part_names = ("cosine",)

    def __init__(self, config):
        self.weight = config.weight

    def bind(self, config, teacher):
        if teacher.hidden_size != config.hidden_size:
            raise RecipeError("other width", where="teacher")

    def calibrate(self, teacher, batch):
        pass

    def reaches(self, parameter):
        return not parameter.startswith("lm_head")

    def __call__(self, student, signals, batch):
        counted = batch.labels != IGNORE
        mine, theirs = last_hidden(student, batch)[counted].float(), signals.hidden[counted].float()
        total = self.weight * (1 - torch.cosine_similarity(mine, theirs, dim=-1)).sum()
        return LossTerm(total, counted.sum(), {"cosine": total.detach()})


@pytest.fixture
def cosine(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "cosine", CosineConfig)
    monkeypatch.setitem(build.OBJECTIVES, "cosine", Cosine)


def test_an_objective_from_outside_trains_from_a_recipe(tiny, tmp_path, cosine):
    recipe = load_recipe("tiny", ["stages.distill.objective={kind: cosine, weight: 2}"])
    objective = recipe.stages["distill"].objective
    assert objective == CosineConfig(weight=2)
    assert recipe.model_dump(mode="json")["stages"]["distill"]["objective"] == {
        "kind": "cosine",
        "weight": 2.0,
    }
    groups = ["mixer", "attention", "mlp", "norm", "embed"]
    result, _ = tiny.run_stage(tmp_path, objective=objective, train=groups, steps=30, lr=1e-2)
    assert result.objective == "cosine"
    assert result.loss_last < result.loss_first < 4
    assert tiny.rows(tmp_path)[0]["parts"] == {"cosine": pytest.approx(result.loss_first)}


def test_errors_in_an_objective_from_outside_are_told_as_those_of_ours(cosine):
    with pytest.raises(
        RecipeError, match=r"(?s)objective\.wieght.*did you mean .weight.*accepts: kind, weight"
    ):
        load_recipe("tiny", ["stages.distill.objective={kind: cosine, wieght: 2}"])
    with pytest.raises(RecipeError, match=r"(?s)stages\.distill\.objective\.weight.*number"):
        load_recipe("tiny", ["stages.distill.objective={kind: cosine, weight: two}"])
    with pytest.raises(RecipeError, match=r"(?s)cosin.*did you mean .cosine.*allowed: kl,.*cosine"):
        load_recipe("tiny", ["stages.distill.objective={kind: cosin}"])


def test_an_objective_that_is_not_in_the_dictionary_is_refused():
    with pytest.raises(RecipeError, match="allowed: kl, jsd, ce, mix, mixer_output, block_output"):
        load_recipe("tiny", ["stages.distill.objective={kind: cosine}"])


class Watch:
    """Note when it is asked, and answer with the step."""

    def __init__(self, when, every=None, answer=lambda run: {"at": float(run.progress.step)}):
        self.when, self.every, self.answer = when, every, answer
        self.asked = []

    def __call__(self, run):
        self.asked.append(run.progress.step)
        return self.answer(run)


def add(monkeypatch, **watches):
    for name, watch in watches.items():
        monkeypatch.setitem(monitors.MONITORS, name, lambda job, watch=watch: watch)


def test_a_monitor_from_outside_is_asked_at_its_moments_and_lands_in_the_files(tiny, tmp_path, monkeypatch):
    step, log, rare = Watch("step"), Watch("log"), Watch("log", every=4)
    save, end = Watch("save"), Watch("end")
    add(monkeypatch, paced=step, spread=log, rare=rare, kept=save, close=end)
    tiny.run_stage(tmp_path, steps=6, log_every_steps=3, save_every_steps=2)
    assert step.asked == [1, 2, 3, 4, 5, 6]
    assert log.asked == [3, 4, 6]
    assert rare.asked == [4]
    assert save.asked == [2, 4, 6]
    assert end.asked == [6]
    rows = tiny.rows(tmp_path)
    assert [row["step"] for row in rows] == [3, 4, 6]
    assert [row["spread"] for row in rows] == [{"at": 3.0}, {"at": 4.0}, {"at": 6.0}]
    assert [row.get("rare") for row in rows] == [None, {"at": 4.0}, None]
    # what is found after a checkpoint stands in the next line
    assert [row.get("kept") for row in rows] == [{"at": 2.0}, None, {"at": 4.0}]
    result = json.loads((tmp_path / "stages/tiny/result.json").read_text())
    assert result["monitors"] == {"close": {"at": 6.0}}


@pytest.mark.parametrize("when", ["step", "log", "save"])
def test_a_monitor_can_end_a_stage_and_a_resume_agrees(tiny, tmp_path, monkeypatch, when):
    stop = Watch(when, answer=lambda run: Stop("good enough") if run.progress.step == 4 else None)
    changes = {"steps": 6, "log_every_steps": 2, "save_every_steps": 2, "out": (out := StringIO())}
    add(monkeypatch, early=stop)
    result, _ = tiny.run_stage(tmp_path, **changes)
    assert result.steps == 4
    assert "early ends the stage at step 4 of 6: good enough" in out.getvalue()
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2, 4]
    (tmp_path / "stages/tiny/result.json").unlink()
    monkeypatch.delitem(monitors.MONITORS, "early")
    again, _ = tiny.run_stage(tmp_path, **changes)
    assert replace(again, seconds=0) == replace(result, seconds=0)


@pytest.mark.parametrize("when", ["step", "save"])
def test_a_stage_that_ends_between_two_log_lines_logs_its_last_step(tiny, tmp_path, monkeypatch, when):
    stop = Watch(when, answer=lambda run: Stop("good enough") if run.progress.step == 4 else None)
    changes = {"steps": 9, "log_every_steps": 3, "save_every_steps": 2}
    add(monkeypatch, early=stop)
    result, _ = tiny.run_stage(tmp_path, **changes)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [3, 4]
    assert result.tokens == tiny.rows(tmp_path)[-1]["tokens"]
    assert result.loss_last == tiny.rows(tmp_path)[-1]["loss"]
    (tmp_path / "stages/tiny/result.json").unlink()
    monkeypatch.delitem(monitors.MONITORS, "early")
    again, _ = tiny.run_stage(tmp_path, **changes)
    assert replace(again, seconds=0) == replace(result, seconds=0)


def test_a_monitor_can_end_a_stage_before_its_first_log_line(tiny, tmp_path, monkeypatch):
    add(monkeypatch, early=Watch("save", answer=lambda run: Stop("good enough")))
    result, _ = tiny.run_stage(tmp_path, steps=9, log_every_steps=5, save_every_steps=2)
    assert result.steps == 2
    assert result.loss_first == result.loss_last == tiny.rows(tmp_path)[0]["loss"]


def test_a_monitor_with_the_name_of_a_metric_is_refused(tiny, tmp_path, monkeypatch):
    add(monkeypatch, loss=Watch("log"))
    with pytest.raises(ValueError, match="MONITORS: loss is a name of the log line itself"):
        tiny.run_stage(tmp_path, steps=1)


def test_a_number_that_is_not_finite_is_named(tiny, tmp_path, monkeypatch):
    add(monkeypatch, spread=Watch("log", answer=lambda run: {"at": float("nan")}))
    with pytest.raises(TrainingError, match="a figure of step 1 is not finite"):
        tiny.run_stage(tmp_path, steps=1)

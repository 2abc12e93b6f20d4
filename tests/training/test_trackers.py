"""Trackers get the lines of metrics.jsonl under the same names; a run goes on after a resume; failures stay small."""

import json
import sys
import time
from importlib import metadata
from io import StringIO
from types import ModuleType, SimpleNamespace

import pytest

from gendistill.cli.main import main
from gendistill.errors import RecipeError, TrainingError
from gendistill.training.trackers import flat

STEPS = {"steps": 4, "save_every_steps": 3, "keep_checkpoints": 2}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "stages/tiny/metrics.jsonl").read_text().splitlines()]


def numbers(row):
    return dict(flat({name: value for name, value in row.items() if name != "step"}))


def break_last_checkpoint(folder):
    (folder / "stages/tiny/checkpoints/step-000004/state.json").unlink()


class Run:
    """What wandb.init and trackio.init hand out."""

    def __init__(self, settings):
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def twin(monkeypatch):
    """Stand in for a tracker's package, and return the list of runs that are begun."""

    def install(name):
        runs = []
        module = ModuleType(name)
        module.init = lambda **settings: (runs.append(Run(settings)), runs[-1])[1]  # pyright: ignore
        module.config = SimpleNamespace(update=lambda values, **_: runs[-1].settings.update(config=values))  # pyright: ignore
        monkeypatch.setitem(sys.modules, name, module)
        real = metadata.distribution
        monkeypatch.setattr(metadata, "distribution", lambda asked: asked == name or real(asked))
        return runs

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_line_and_a_resume_continues_its_run(tiny, tmp_path, twin, monkeypatch, name):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    runs, out = twin(name), StringIO()
    job = {"trackers": (name,), "project": "study"}
    tiny.run_stage(tmp_path, job=job, out=out, **STEPS)
    (run,) = runs
    assert run.logged == [(row["step"], numbers(row)) for row in lines_of(tmp_path)]
    assert {"loss", "parts/kl", "lr/mixer", "grad_norm", "tokens_per_second", "groups/mlp/moved"} <= set(
        run.logged[0][1]
    )
    assert run.finished
    assert run.settings["project"] == "study"
    assert run.settings["resume"] == "allow"
    assert run.settings["config"]["stage"] == "tiny"
    assert run.settings["config"]["schedule/kind"] == "wsd"
    assert name in out.getvalue()
    if name == "wandb":
        assert run.settings["mode"] == "offline"
        assert run.settings["dir"] == str(tmp_path / "stages/tiny")
    break_last_checkpoint(tmp_path)
    tiny.run_stage(tmp_path, job=job, **STEPS)
    first, second = runs
    assert [step for step, _ in second.logged] == [4]
    names = ("name", "id") if name == "wandb" else ("name",)
    assert [first.settings[each] for each in names] == [second.settings[each] for each in names]
    tiny.run_stage(tmp_path / "other", job=job, **STEPS)
    assert runs[2].settings["name"] != first.settings["name"]


def test_wandb_goes_online_if_it_is_told_to(tiny, tmp_path, twin, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    runs = twin("wandb")
    tiny.run_stage(tmp_path, job={"trackers": ("wandb",)}, steps=1)
    assert runs[0].settings["mode"] == "online"


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(tiny, tmp_path, twin, monkeypatch):
    runs, out = twin("wandb"), StringIO()

    def fails(self, values, step=None):
        if step == 2:
            raise OSError("the network is down")
        self.logged.append(step)

    monkeypatch.setattr(Run, "log", fails)
    result, _ = tiny.run_stage(tmp_path, job={"trackers": ("wandb",)}, out=out, **STEPS)
    assert result.steps == 4
    assert runs[0].logged == [1]
    assert "wandb fails and is left out from here on: OSError: the network is down" in out.getvalue()


def test_a_tracker_that_does_not_start_is_an_error_before_the_first_step(tiny, tmp_path, twin, monkeypatch):
    twin("trackio")

    def fails(**settings):
        raise ValueError("no such project")

    monkeypatch.setattr(sys.modules["trackio"], "init", fails)
    with pytest.raises(
        TrainingError, match=r"trackio does not start: ValueError: no such project(?s:.*)leave trackio out"
    ):
        tiny.run_stage(tmp_path, job={"trackers": ("trackio",)}, **STEPS)
    assert not tiny.rows(tmp_path)


def test_trackers_that_have_started_are_finished_if_a_later_one_does_not_start(
    tiny, tmp_path, twin, monkeypatch
):
    runs = twin("wandb")
    twin("trackio")

    def fails(**settings):
        raise ValueError("no such project")

    monkeypatch.setattr(sys.modules["trackio"], "init", fails)
    with pytest.raises(TrainingError, match="trackio does not start"):
        tiny.run_stage(tmp_path, job={"trackers": ("wandb", "trackio")}, **STEPS)
    assert runs[0].finished


def test_the_time_in_which_a_tracker_starts_is_none_of_the_first_steps(tiny, tmp_path, twin, monkeypatch):
    twin("wandb")
    init, late, clock = sys.modules["wandb"].init, [0.0], time.perf_counter

    def slowly(**settings):
        late[0] += 1000.0
        return init(**settings)

    monkeypatch.setattr(sys.modules["wandb"], "init", slowly)
    monkeypatch.setattr(
        "gendistill.training.meter.time", SimpleNamespace(perf_counter=lambda: clock() + late[0])
    )
    result, _ = tiny.run_stage(tmp_path, job={"trackers": ("wandb",)}, **STEPS)
    assert late == [1000.0]
    assert result.seconds < 1000


def test_a_missing_tracker_is_refused_with_what_to_install(tiny, tmp_path, monkeypatch, capsys):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("gendistill.config.watch.metadata.distribution", nothing)
    with pytest.raises(
        RecipeError, match=r"writes to wandb, and the package wandb is not installed(?s:.*)pip install wandb"
    ):
        tiny.run_stage(tmp_path, job={"trackers": ("wandb",)}, **STEPS)
    assert main(["recipe", "check", "tiny", "trackers=[trackio]"]) == 2
    assert "pip install trackio" in capsys.readouterr().err


def test_only_the_main_process_tracks(tiny, tmp_path, twin):
    from gendistill.training.console import TrainingConsole
    from gendistill.training.trackers import Trackers

    runs = twin("wandb")
    job = SimpleNamespace(trackers=("wandb",), folder=tmp_path)
    with Trackers(job, step=0, console=TrainingConsole(main=False), main=False) as trackers:  # pyright: ignore
        trackers.write({"step": 1, "loss": 2.0})
    assert runs == []
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_the_lines_and_none_of_a_step_twice(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = {"trackers": ("tensorboard",)}
    tiny.run_stage(tmp_path, job=job, **STEPS)
    break_last_checkpoint(tmp_path)
    tiny.run_stage(tmp_path, job=job, **STEPS)
    events = EventAccumulator(str(tmp_path / "stages/tiny/tensorboard"))
    events.Reload()
    rows = lines_of(tmp_path)
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert set(numbers(rows[0])) <= set(events.Tags()["scalars"])

"""Steps that are not finite change nothing; several in a row take a stage back, the same way after any interruption."""

import json
from io import StringIO

import pytest
import torch

from gendistill.errors import TrainingError
from gendistill.training.meter import Meter

SAVING = {"steps": 9, "save_every_steps": 3, "keep_checkpoints": 3}


@pytest.fixture
def bad(tiny):
    """Make a student for which the rows of some steps, from 1, give no finite loss."""

    return lambda *steps: tiny.spoil(tiny.make_student(), steps)


def rows_of(tiny, folder):
    return {row["step"]: row for row in tiny.rows(folder)}


def result_of(folder):
    return json.loads((folder / "stages/tiny/result.json").read_text())


def test_a_lone_step_is_skipped_and_counted(tiny, bad, tmp_path):
    out = StringIO()
    result, student = tiny.run_stage(tmp_path, student=bad(3), out=out, **SAVING)
    rows = rows_of(tiny, tmp_path)
    assert rows[2].get("skipped") is None
    assert (rows[3]["loss"], rows[3]["skipped"], rows[9]["skipped"]) == (None, 1, 1)
    assert rows[3]["parts"] == {}
    assert rows[3]["grad_norm"] == rows[2]["grad_norm"]
    assert result.skipped == result_of(tmp_path)["skipped"] == 1
    assert result.rewinds == []
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert "1 of 3 steps were not finite and changed nothing" in out.getvalue()
    assert "no finite step" in out.getvalue()


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(tiny, bad, tmp_path):
    """Up to the step's place in the schedule, its rows might as well not have been there."""
    constant = {"kind": "constant", "warmup": 0.0}
    _, skipping = tiny.run_stage(tmp_path / "skipping", student=bad(3), schedule=constant, steps=5)

    class Without(tiny.TinyStream):
        def __next__(self):
            if self.step == 2:
                self.step = 3
            return super().__next__()

    stream, tiny.TinyStream = tiny.TinyStream, Without
    try:
        _, without = tiny.run_stage(tmp_path / "without", schedule=constant, steps=4)
    finally:
        tiny.TinyStream = stream
    for name, value in skipping.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name


def test_three_in_a_row_go_back_to_the_checkpoint_and_leave_the_rows_out(tiny, bad, tmp_path):
    out = StringIO()
    result, _ = tiny.run_stage(tmp_path, student=bad(5, 6, 7), out=out, **SAVING)
    back = {"step": 7, "to": 3, "skipped_to": 7}
    assert result.steps == 9
    assert result.rewinds == result_of(tmp_path)["rewinds"] == [back]
    rows = tiny.rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row.get("rewinds") for row in rows] == [None] * 3 + [[back]] + [None] * 5
    assert all(row["loss"] is not None for row in rows)
    assert (
        "takes the stage from step 7 back to 3 (1 of at most 2 times), without the rows up to step 7"
        in out.getvalue()
    )
    assert "output of model.layers.1.mlp.gate_proj" in out.getvalue()

    # as a stage that reads the rows of step 8 after those of step 3
    class Shorter(tiny.TinyStream):
        def __next__(self):
            if self.step == 3:
                self.step = 7
            return super().__next__()

    stream, tiny.TinyStream = tiny.TinyStream, Shorter
    try:
        tiny.run_stage(tmp_path / "shorter", **SAVING)
    finally:
        tiny.TinyStream = stream
    expected = rows_of(tiny, tmp_path / "shorter")
    for row in rows:
        assert row["loss"] == expected[row["step"]]["loss"]


def test_a_step_that_is_skipped_after_a_return_is_told_as_well(tiny, bad, tmp_path):
    out = StringIO()
    tiny.run_stage(tmp_path, student=bad(4, 6, 7, 8, 10), out=out, **SAVING)
    assert "back to 3" in out.getvalue()
    assert out.getvalue().count("1 of 4 steps were not finite and changed nothing") == 1
    assert "1 of 5 steps were not finite and changed nothing" in out.getvalue()


@pytest.mark.parametrize("log_every", [2, 5])
def test_when_the_host_looks_does_not_matter(tiny, bad, tmp_path, monkeypatch, log_every):
    """On a GPU it looks at log lines only; steps that are taken meanwhile change nothing."""
    from dataclasses import replace

    from gendistill.training.stage import StageRun

    _, whole = tiny.run_stage(tmp_path / "each", student=bad(5, 6, 7), **SAVING)
    due = StageRun._due
    monkeypatch.setattr(
        StageRun,
        "_due",
        lambda run, request: replace(each := due(run, request), waits=each.log or each.save),
    )
    result, seldom = tiny.run_stage(
        tmp_path / "seldom", student=bad(5, 6, 7), **{**SAVING, "log_every_steps": log_every}
    )
    assert [{**back, "step": 0} for back in result.rewinds] == [{"step": 0, "to": 3, "skipped_to": 7}]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, seldom.state_dict()[name]), name


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [6, 8, 9])
def test_a_stage_that_is_stopped_around_a_rewind_resumes_to_the_same_curve(tiny, bad, tmp_path, at):
    """Stopped before a step's rows are read: in the middle of the bad ones, right after them, and later."""
    _, whole = tiny.run_stage(tmp_path / "whole", student=bad(5, 6, 7), **SAVING)

    class Stops(tiny.TinyStream):
        count = 0

        def __next__(self):
            Stops.count += 1
            if Stops.count == at:
                raise Killed
            return super().__next__()

    stream, tiny.TinyStream = tiny.TinyStream, Stops
    try:
        with pytest.raises(Killed):
            tiny.run_stage(tmp_path / "stopped", student=bad(5, 6, 7), **SAVING)
    finally:
        tiny.TinyStream = stream
    _, again = tiny.run_stage(tmp_path / "stopped", student=bad(5, 6, 7), **SAVING)
    assert tiny.rows(tmp_path / "stopped") == tiny.rows(tmp_path / "whole")
    names = ("rewinds", "skipped", "loss_last", "heldout")
    whole_result, result = result_of(tmp_path / "whole"), result_of(tmp_path / "stopped")
    assert {name: result[name] for name in names} == {name: whole_result[name] for name in names}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_checkpoint_of_an_older_version_will_do(tiny, bad, tmp_path):
    """It knows nothing of rewinds."""
    tiny.run_stage(tmp_path / "new", student=bad(5, 6, 7), **SAVING)
    with pytest.raises(TrainingError):
        tiny.run_stage(tmp_path / "old", student=bad(*range(4, 16)), **SAVING)
    path = tmp_path / "old/stages/tiny/checkpoints/step-000003/state.json"
    state = json.loads(path.read_text())
    state["progress"] = {
        name: state["progress"][name]
        for name in ("step", "tokens", "seconds", "loss_first", "loss_last", "window")
    }
    state["stream"] = {"step": 3}
    del state["crc32"]
    path.write_text(json.dumps(state))
    tiny.run_stage(tmp_path / "old", student=bad(5, 6, 7), **SAVING)
    assert tiny.rows(tmp_path / "old") == tiny.rows(tmp_path / "new")


def test_too_many_rewinds_end_the_stage_with_an_intact_checkpoint(tiny, bad, tmp_path):
    student = bad(*range(5, 16))
    # the rows of steps 5 to 7, then 8 to 10 as steps 4 to 6, then 11 to 13
    with pytest.raises(
        TrainingError, match=r"step 6 of 9, for 3 steps in a row.*gone back 2 times already"
    ) as caught:
        tiny.run_stage(tmp_path, student=student, **SAVING)
    assert "step-000003 is intact" in str(caught.value)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tiny, bad, tmp_path):
    with pytest.raises(
        TrainingError, match=r"step 3 of 9, for 3 steps in a row.*No checkpoint had been saved yet"
    ):
        tiny.run_stage(tmp_path, student=bad(1, 2, 3), **SAVING)


def test_a_stage_without_a_finite_step_is_an_error(tiny, bad, tmp_path):
    with pytest.raises(TrainingError, match="not finite at step 2 of 2"):
        tiny.run_stage(tmp_path, student=bad(1, 2), steps=2)


def test_any_monitor_may_ask_to_go_back(tiny, tmp_path, monkeypatch):
    from gendistill.training import monitors

    class Spike:
        when, every = "log", None
        asked = 0

        def __call__(self, run):
            if run.progress.step == 5 and not Spike.asked:
                Spike.asked += 1
                return monitors.Rewind("the loss jumped")
            return None

    monkeypatch.setitem(monitors.MONITORS, "spike", lambda job: Spike())
    out = StringIO()
    result, _ = tiny.run_stage(tmp_path, out=out, **SAVING)
    assert result.rewinds == [{"step": 5, "to": 3, "skipped_to": 5}]
    assert "spike takes the stage from step 5 back to 3" in out.getvalue()
    assert [row["step"] for row in tiny.rows(tmp_path)] == list(range(1, 10))
    Spike.asked = 0
    with pytest.raises(
        TrainingError, match="spike asks to go back at step 5: the loss jumped; but the stage goes back 0"
    ):
        tiny.run_stage(tmp_path / "never", non_finite={"rewinds": 0}, **SAVING)


def test_a_meter_counts_in_a_row_and_freezes_what_follows():
    meter = Meter(1, torch.device("cpu"), in_a_row=2)
    losses = [1.0, float("nan"), 3.0, float("inf"), float("nan"), 5.0]
    void = [
        float(meter.add(step, torch.tensor([loss]), torch.tensor(10), torch.tensor(1.0)))
        for step, loss in enumerate(losses, 1)
    ]
    assert void == [0, 1, 0, 1, 1, 1]
    reading = meter.read()
    assert reading.losses == [2.0]
    assert (reading.stuck_at, reading.skipped, reading.tokens) == (5, 4, 60)

"""What only real processes can show: kills, signals, and two ranks."""

import json
import signal

import pytest


def test_killed_stages_resume_to_the_same_curve_bit_for_bit(tiny, scenarios):
    folder, codes, _ = scenarios
    assert codes["whole"] == 0
    whole = tiny.rows(folder / "whole")
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    for name in ("killed_1", "killed_3"):
        assert codes[name] == -signal.SIGKILL
        assert codes[f"{name}_resumed"] == 0
        assert tiny.rows(folder / name) == whole
        assert results(folder / name) == results(folder / "whole")


def test_a_terminated_stage_saves_says_how_to_resume_and_resumes_exactly(tiny, scenarios):
    folder, codes, output = scenarios
    assert codes["terminated"] == 128 + signal.SIGTERM
    assert "SIGTERM at step" in output
    assert "run the same command again" in output
    assert f"resuming from {folder / 'terminated' / 'stages' / 'tiny' / 'checkpoints'}" in output
    assert codes["terminated_resumed"] == 0
    assert tiny.rows(folder / "terminated") == tiny.rows(folder / "whole")


def test_two_processes_equal_one_within_float32_rounding(tiny, scenarios):
    folder, codes, _ = scenarios
    assert codes["two"] == 0
    one, two = tiny.rows(folder / "whole"), tiny.rows(folder / "two")
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    scores = results(folder / "whole")["heldout"]
    assert results(folder / "two")["heldout"] == pytest.approx(scores, rel=1e-5)


def test_a_monitor_ends_a_stage_on_two_processes_at_the_same_step(tiny, scenarios):
    folder, codes, output = scenarios
    assert codes["two_early"] == codes["two_early_resumed"] == 0
    assert output.count("early ends the stage at step 4 of 6: enough") == 1
    assert "resuming from" in output.split("early ends the stage")[1]
    two = tiny.rows(folder / "two")
    early = tiny.rows(folder / "two_early")
    assert [row["step"] for row in early] == [3, 4]
    assert early[-1]["tokens"] == two[3]["tokens"]
    assert early[-1]["grad_norm"] == pytest.approx(two[3]["grad_norm"], rel=1e-5)
    assert results(folder / "two_early")["steps"] == 4


def results(folder):
    content = json.loads((folder / "stages" / "tiny" / "result.json").read_text())
    content.pop("seconds")
    return content

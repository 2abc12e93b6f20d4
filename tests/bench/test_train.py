"""The training comparison: its data, its statistics, and that it goes through the ordinary trainer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gendistill.bench.tasks import TaskStream, copy_row, draw_batch, recall_row
from gendistill.bench.train import Comparison, Setup, TrainBench, save_plot
from gendistill.cli.main import main
from gendistill.data.batch import IGNORE
from gendistill.errors import CheckpointError
from gendistill.results.table import load_results, write_results_json

NAMES = ("triton", "reference")
TINY = Setup(
    steps=2,
    seeds=2,
    rows=2,
    tokens=40,
    mixers=("kda", "full"),
    hidden_size=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    heldout_batches=1,
)


@pytest.mark.parametrize("tokens", [20, 33, 200])
def test_what_recall_and_copying_ask_was_shown_before(tokens):
    row, counted = recall_row(tokens, torch.Generator().manual_seed(0))
    assert len(row) == tokens + 1
    assert counted.any()
    asked = counted.nonzero().flatten().tolist()
    # keys and values in turn from the first place on, then a separator
    shown = {int(row[place]): row[place + 1] for place in range(1, asked[0] - 1, 2)}
    assert all(shown[int(row[place])] == row[place + 1] for place in asked)
    row, counted = copy_row(tokens, torch.Generator().manual_seed(0))
    assert len(row) == tokens + 1
    # one separator and the text, after the start
    period = int(counted.nonzero()[0]) - 1
    assert counted.sum() == tokens - period - 1
    assert torch.equal(row[1 + period :], row[1:-period])


def test_seed_and_step_alone_decide_a_batch():
    one, other = TaskStream(3, 40, seed=1), TaskStream(3, 40, seed=1)
    first, second = next(one)[0], next(one)[0]
    assert not torch.equal(first.input_ids, second.input_ids)
    other.load_state_dict({"step": 1})
    assert torch.equal(next(other)[0].input_ids, second.input_ids)
    assert not torch.equal(next(TaskStream(3, 40, seed=2))[0].input_ids, first.input_ids)
    batch = draw_batch(3, 40, seed=(0, 0))
    assert batch.num_labels == (batch.labels != IGNORE).sum()
    assert batch.cu_seqlens.tolist() == [0, 40, 80, 120]


def test_a_difference_is_held_against_the_spread_of_the_reference():
    found = Comparison((1.0, 1.2, 1.4), (1.1, 1.2, 1.6), {"triton": 4.0, "reference": 8.0}, 2000, 90)
    assert found.difference == pytest.approx(-0.1)
    assert found.noise == pytest.approx(math.sqrt(0.07))
    # differences -0.1, 0, -0.2: deviation 0.1, and 4.303 of Student's t with two degrees of freedom
    assert found.interval == pytest.approx((-0.1 - 4.303 * 0.1 / 3**0.5, -0.1 + 4.303 * 0.1 / 3**0.5))
    assert found.within_noise
    rows = {row.name: row for row in found.rows(NAMES)}
    verdict = rows["|difference of the means|"]
    assert (verdict.value, verdict.bar) == pytest.approx((0.1, 0.07**0.5))
    assert verdict.met
    assert rows["time of a step, triton"].value == pytest.approx(2.0)
    far = replace(found, ours=(2.0, 2.2, 2.4))
    assert not far.within_noise
    assert {row.name: row for row in far.rows(NAMES)}["|difference of the means|"].met is False


def test_equal_implementations_end_equal_and_a_second_call_continues(tmp_path, capsys, monkeypatch):
    # otherwise every run decides by a stopwatch
    monkeypatch.setattr("gendistill.training.stage.choose_compute_dtype", lambda *_: torch.float32)
    settings = {"folder": tmp_path, "setup": TINY, "impls": ("auto", "reference"), "cpu": True}
    found = TrainBench(**settings, commit="0123abc").run()
    assert found.differences == (0.0, 0.0)
    assert found.noise > 0
    path = tmp_path / "train.json"
    write_results_json(path, command="c", device="d", rows=found.rows(NAMES), commit="0123abc")
    assert len(load_results(path).rows) == 12
    more = TrainBench(**{**settings, "setup": replace(TINY, seeds=3)}, commit="0123abc").run()
    assert more.ours[:2] == found.ours
    assert more.seconds["auto"] > 0
    assert "auto-2: held-out loss" in capsys.readouterr().out
    save_plot(tmp_path / "train.png", tmp_path, ("auto", "reference"))
    assert (tmp_path / "train.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(CheckpointError, match="commit"):
        TrainBench(**settings, commit="fffffff").run()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "--seeds must be 2 to"),
        (["--steps", "0"], "--steps must be positive"),
        (["--json", "x.json", "--commit", "main"], "hexadecimal"),
        (["--gate", "bounded"], 'unknown argument "--gate"'),
    ],
)
def test_wrong_arguments_are_named(words, message, capsys, monkeypatch):
    monkeypatch.setattr("gendistill.cli.bench._check_device", lambda action: None)
    assert main(["bench", "train", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without one")
def test_without_cuda_it_says_so(capsys):
    assert main(["bench", "train"]) == 1
    assert "gendistill bench train measures on a CUDA device" in capsys.readouterr().err


def test_a_chart_that_nothing_can_draw_is_refused_first(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["bench", "train", "--plot", "x.png", "--commit", "0123abc"]) == 1
    assert "matplotlib" in capsys.readouterr().err

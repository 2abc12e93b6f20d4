"""CUDA graphs of passes: the same losses and weights as without, few launches, and memory that comes back."""

from __future__ import annotations

import pytest
import torch

from gendistill.bench.shapes import SHAPES
from gendistill.bench.step import StepBench
from gendistill.config.engine import EngineConfig
from gendistill.training import capture

pytestmark = pytest.mark.gpu


def train(stage, steps, *, checkpointing=False, **engine):
    """Take steps on a small shape that has all kinds of layers; returns losses, weights and the number of graphs."""
    bench = StepBench(shape=SHAPES["tiny"], stage=stage, checkpointing=checkpointing)
    config = EngineConfig(**engine)
    with bench.opened(config, stream=bench.stream(config)) as run:
        found = []
        for _ in range(steps):
            run.step()
            found.append(run.meter.read().losses[0])
            run.meter.reset()
        weights = {name: value.detach().clone() for name, value in run.trained.items()}
        graphs = run.runner.captured.num_graphs if run.runner.captured else 0
    return found, weights, graphs


@pytest.mark.parametrize(
    ("stage", "checkpointing", "most"),
    [("distill", False, 64), ("distill", True, 64), ("distill", False, 1), ("block", False, 64)],
)
def test_graphs_train_as_eager_steps_do(monkeypatch, stage, checkpointing, most):
    monkeypatch.setattr(capture, "MOST_GRAPHS", most)
    # however often one makes room for another
    monkeypatch.setattr(capture, "LAUNCHES_PER_LOSS", 0)
    losses, weights, graphs = train(stage, 12, checkpointing=checkpointing, capture="always")
    expected, others, none = train(stage, 12, checkpointing=checkpointing, capture="never")
    assert 0 < graphs <= most
    assert none == 0
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=1e-5), name


@pytest.mark.parametrize("capture_", ["always", "never"])
def test_a_stage_has_the_same_bits_every_time(capture_):
    (losses, weights, _), (again, others, _) = (train("distill", 10, capture=capture_) for _ in range(2))
    assert losses == again
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("stage", ["distill", "block"])
def test_measured_steps_say_what_takes_the_time(stage):
    bench = StepBench(shape=SHAPES["tiny"], stage=stage)
    config = EngineConfig(capture="always")
    with bench.opened(config, stream=bench.stream(config)) as run:
        clock, model = run.runner.clock, run.student.model
        blocks, shares = [model.layers[layer] for layer in run.converted], {}
        for _ in range(12):
            with clock.step(model, blocks, measured=True):
                run.step()
            shares = clock.read() or shares
        assert run.runner.captured.num_graphs > 0
    assert 0 < shares["mixers"] < 1
    assert 0 < shares["teacher"] < 1
    assert sum(share for name, share in shares.items() if name != "seconds") == pytest.approx(1, abs=0.05)


def test_memory_comes_back():
    # cuBLAS keeps what it needs on a stream
    train("distill", 8, capture="always")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    train("distill", 8, capture="always")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**25


def test_a_capture_that_fails_leaves_the_stream_as_it_was():
    def passes(_):
        # waits for the device
        return torch.ones(1, device="cuda").cpu()

    captured = capture.CapturedPasses(
        passes, models=[], clock=None, device=torch.device("cuda"), failed=lambda _: None
    )
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        captured._capture(None)
    assert torch.cuda.current_stream() == before

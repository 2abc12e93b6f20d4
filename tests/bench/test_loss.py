"""The benchmark of losses: right or red, what it writes, whom it leaves out; with a clock that says what it is told."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from gendistill.bench import loss, measure
from gendistill.bench.cases import LOSS_BARS, LOSS_CASES, LossCase
from gendistill.bench.loss import LossBench, Op, draw_loss, exact_mean
from gendistill.bench.measure import Timing
from gendistill.cli.main import main
from gendistill.ops import Impl

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without one")
CASES = tuple(
    LossCase(f"{kind}, {trained}", kind, trained, 12, 8, 6, 50)
    for kind in ("kl", "reverse_kl", "jsd")
    for trained in (True, False)
)


class Broken:
    label = "broken 1"

    def mean(self, case, x):
        raise NotImplementedError("not here")


class Wrong(Op):
    def mean(self, case, x):
        return super().mean(case, x) * 1.01


def bench(monkeypatch, **changed):
    """Make a bench on the CPU and return it with what it prints."""
    monkeypatch.setattr(
        measure, "time_rounds", lambda steps: {name: Timing(2.0, 1.9, 2.1, 1.8, 2.2) for name in steps}
    )
    monkeypatch.setattr(measure, "peak_extra_mib", lambda step: 1000.0)
    out = io.StringIO()
    made = {
        "cases": CASES,
        "ours": Op(Impl.REFERENCE),
        "device": "cpu",
        "dtype": torch.float32,
        "console": Console(file=out, width=200),
    }
    return LossBench(**{**made, **changed}), out


def test_every_case_is_checked_and_timed(monkeypatch):
    saved = []
    made, out = bench(monkeypatch, peers=[Broken()], save=lambda rows: saved.append(len(rows)))
    assert made.run() == 0
    # three errors of each kind, then time and memory of each case
    assert saved == [9 + 2 * number for number in range(1, len(CASES) + 1)]
    assert all(row.met for row in made.rows[:9])
    assert "broken 1 is not measured: NotImplementedError: not here" in out.getvalue()
    assert {row.peer for row in made.rows} == {None}


def test_what_is_wrong_is_red_and_not_timed(monkeypatch):
    made, out = bench(monkeypatch, ours=Wrong(Impl.REFERENCE))
    assert made.run() == 1
    assert "RED" in out.getvalue()
    assert not [row for row in made.rows if row.unit == "ms"]


def test_each_peer_has_rows_of_its_own(monkeypatch):
    peer, other = Wrong(Impl.REFERENCE), Wrong(Impl.REFERENCE)
    peer.label, other.label = "one 1", "other 2"
    made, _ = bench(monkeypatch, cases=CASES[:1], peers=[peer, other])
    assert made.run() == 0
    assert [row.peer for row in made.rows if row.unit == "ms"] == ["one 1", "other 2"]


def test_a_spent_budget_leaves_out_cases(monkeypatch):
    made, out = bench(monkeypatch, budget_s=0.0)
    assert made.run() == 0
    assert f"left out: {CASES[0].name}" in out.getvalue()


def test_the_right_answer_has_the_gradients_of_finite_differences():
    case = CASES[0]
    x = draw_loss(case, device="cpu", dtype=torch.float64)
    value, grad, _ = exact_mean(case, x)
    step = torch.randn_like(grad) * 1e-5
    moved = [
        exact_mean(case, x._replace(hidden=(x.hidden + way).detach().requires_grad_()))[0]
        for way in (step, -step)
    ]
    assert (moved[0] - moved[1]).item() == pytest.approx(2 * (grad * step).sum().item(), rel=1e-4)
    assert value > 0


def test_every_bar_is_of_a_case():
    assert {name for name, _ in LOSS_BARS} <= {case.name for case in LOSS_CASES}
    assert loss.Op(Impl.TRITON).label == "gendistill"


@no_gpu
def test_without_cuda_it_says_so(capsys):
    assert main(["bench", "loss"]) == 1
    assert "gendistill bench loss measures on a CUDA device" in capsys.readouterr().err


def test_what_can_be_captured_is_timed_as_a_graph_too(monkeypatch):
    monkeypatch.setattr(LossBench, "_replays", lambda self, steps: dict(steps))
    made, _ = bench(monkeypatch)
    assert made.run() == 0
    rows = {row.name: row for row in made.rows}
    for case in CASES:
        eager = rows[f"{case.name}: forward+backward"]
        graph = rows[f"{case.name}: forward+backward, CUDA graph"]
        assert (graph.value, graph.bar, graph.unit) == (eager.value, eager.bar, eager.unit)

"""The benchmark's own rules: what it refuses, what turns it red, and that what it writes can be read."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import pytest
import torch
from rich.console import Console

from gendistill.bench import measure, ops
from gendistill.bench.cases import (
    BARS,
    CASES,
    DECODE_CASES,
    SMOKE_CASES,
    SMOKE_DECODE,
    Case,
)
from gendistill.bench.inputs import exact_decode
from gendistill.bench.measure import Timing, summarise
from gendistill.bench.rows import Check, Measurement, check_table, plot_measurements
from gendistill.cli import bench as command
from gendistill.cli.main import main
from gendistill.ops import OpOutput, chunk_kda
from gendistill.results.table import load_results

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without one")


class Reference:
    """The eager ops in the place of kernels."""

    label = "fla-core 0.6.0"

    def __init__(self, off: float = 1.0, breaks: bool = False):
        self.off, self.breaks = off, breaks

    def sequence(self, x):
        settings = {"gate": x.gate, "a_log": x.a_log, "dt_bias": x.dt_bias}
        settings |= {"state": x.state, "segments": x.segments}
        out, state = chunk_kda(x.q, x.k, x.v, x.decay, x.beta, **settings)
        return OpOutput(out * self.off, state)

    def decode(self, x):
        if self.breaks:
            raise NotImplementedError("no decode here")
        return lambda: OpOutput(*(part.float() for part in exact_decode(x)))


def settings(**changed):
    made = {"cases": SMOKE_CASES, "decode_cases": (SMOKE_DECODE,), "device": "cpu", "dtype": torch.float32}
    return {**made, "ours": Reference(), **changed}


@pytest.fixture
def fake_clock(monkeypatch):
    """Replace what needs a GPU; returns the steps that were timed."""
    timed = []

    def time_rounds(steps):
        timed.append(list(steps))
        return {name: Timing(2.0 if name == "ours" else 3.0, 1.9, 2.1, 1.8, 2.2) for name in steps}

    class Graph:
        replay = staticmethod(lambda: None)

    monkeypatch.setattr(measure, "time_rounds", time_rounds)
    monkeypatch.setattr(measure, "capture", lambda step: Graph)
    monkeypatch.setattr(measure, "peak_extra_mib", lambda step: 100.0)
    monkeypatch.setattr(measure, "count_launches", lambda step: 2)
    monkeypatch.setattr(measure, "rotations", lambda size: 4)
    return timed


@no_gpu
def test_without_cuda_it_says_so(capsys):
    assert main(["bench", "ops"]) == 1
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "huge"], "invalid choice"),
        (["--gate", "none"], "invalid choice"),
        (["--budget", "0"], "must be positive"),
        (["--commit", "main"], "hexadecimal"),
        (["--no-peer", "--cold-peer"], "--no-peer"),
        (["--iters", "3"], 'unknown argument "--iters"'),
    ],
)
def test_wrong_arguments_are_named(words, message, capsys):
    assert main(["bench", "ops", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_results_file_without_a_commit_is_refused_before_measuring(monkeypatch, capsys):
    monkeypatch.setattr("gendistill.provenance.source_commit", lambda: None)
    assert main(["bench", "ops", "--json", "x.json"]) == 2
    assert "--commit" in capsys.readouterr().err


def test_kernel_times_are_medians_of_what_a_step_takes_in_each_kernel(monkeypatch):
    class Event(NamedTuple):
        name: str
        device_time: float

    runs = iter([[Event("a", 1000.0), Event("b", 10.0), Event("a", 3000.0)], [Event("b", 5000.0)]] * 2)
    monkeypatch.setattr(measure, "_device_events", lambda step: next(runs))
    assert measure.kernel_times(lambda: None, repeats=4) == {"b": 2.505, "a": 2.0}


def test_a_breakdown_lists_our_kernels(fake_clock, monkeypatch):
    monkeypatch.setattr(measure, "kernel_times", lambda step: {"prepare_kernel": 0.5, "scan_kernel": 0.3})
    bench = ops.Bench(**settings(cases=SMOKE_CASES[:1], decode_cases=(), gates=("bounded",), breakdown=True))
    assert bench.run() == 0
    listed = [each for each in bench.found if each.quantity.endswith("scan_kernel on the device")]
    assert [(each.ours, each.unit) for each in listed] == [(0.3, "ms"), (0.3, "ms")]


def test_a_bar_may_be_how_many_times_as_fast_as_the_peer_ours_is(fake_clock, monkeypatch):
    case = SMOKE_CASES[0]
    ratio = "times as fast as the peer"
    bars = {(case.name, f"forward, {ratio}"): 1.4, (SMOKE_DECODE.name, f"step, {ratio}"): 1.6}
    monkeypatch.setattr(ops, "BARS", bars)
    found = {}
    for peer in (Reference(), None):
        bench = ops.Bench(**settings(cases=[case], gates=("bounded",), peer=peer))
        assert bench.run() == 0
        rows = [each.row("peer") for each in bench.found if each.quantity.endswith("as fast as the peer")]
        found[peer is None] = {row.name: (row.value, row.bar, row.met) for row in rows}
    assert found[True] == {}
    assert found[False] == {
        f"{case.name} bounded: forward, times as fast as the peer": (1.5, 1.4, True),
        f"{SMOKE_DECODE.name}: step, times as fast as the peer": (1.5, 1.6, False),
    }


def test_least_bytes_are_those_of_the_notes():
    one = Case("one", 1, 1, 1, 128, kv_heads=1)
    assert one.least_bytes(backward=False, item_size=2) == 1282
    assert one.least_bytes(backward=True, item_size=2) == 3590


def test_every_bar_belongs_to_something_that_is_measured():
    names = {case.name for case in (*CASES, *DECODE_CASES)} | {"cold start"}
    assert {name for name, _ in BARS} <= names


@pytest.mark.parametrize("error", [math.nan, math.inf, 0.03])
def test_nan_and_large_errors_are_red(error):
    check = Check("a", "bounded", {"out": error}, True, peer={"out": math.nan})
    assert not check.passed
    assert Check("a", "bounded", {"d A_log": 0.025}, True, peer={}).passed
    assert not Check("a", "bounded", {"d A_log": 0.025}, False, peer={}).passed
    check_table([check], "peer")


def test_errors_are_compared_with_the_peer_s_where_it_has_any():
    ours = {"out": 3.6e-3, "state": 2e-3, "d q": 5e-3, "d k": 1e-3}
    peer = {"out": 3e-3, "state": 1e-3, "d q": math.nan, "d k": 0.0}
    check = Check("a", "bounded", ours, True, peer=peer)
    rows = {row.name: row for each in check.measurements() if (row := each.row("peer")) is not None}
    ratios = {name: row for name, row in rows.items() if "ratio" in name}
    assert list(ratios) == [
        "a bounded: error ratio to peer, out",
        "a bounded: error ratio to peer, state",
    ]
    assert [row.met for row in ratios.values()] == [True, False]
    # the ratio turns nothing red
    assert check.passed
    text = Console(file=io.StringIO(), width=200)
    text.print(check_table([check], "peer"))
    assert "2.00 missed" in text.file.getvalue()
    assert not Check("a", "bounded", ours, True, peer={}).ratios


def test_spread_covers_the_rounds():
    timing = summarise([[1.0, 2.0, 9.0], [3.0, 3.0, 3.0], [4.0, 4.0, 4.0]])
    assert (timing.median, timing.low, timing.high) == (3.0, 2.0, 4.0)
    assert timing.early <= timing.median <= timing.late


def test_what_is_measured_can_be_loaded_even_if_the_run_is_cut_short(fake_clock, tmp_path):
    path = tmp_path / "ops.json"
    peer = Reference()
    sizes = []
    save = command._saver(path, peer, "a GPU", "0123abc")

    def counting(found):
        save(found)
        sizes.append(len(load_results(path).rows))

    bench = ops.Bench(**settings(peer=peer, gates=("softplus",), save=counting))
    assert bench.run() == 0
    assert len(sizes) == 4
    assert sizes == sorted(sizes)
    results = load_results(path)
    assert results.versions["fla-core"] == "0.6.0"
    rows = {row.name: row for row in results.rows}
    assert rows["tiny softplus: forward"].peer_value == 3.0
    assert rows["tiny softplus: forward+backward, peak extra memory"].value == 100.0
    assert rows["tiny-decode: step"].value == 500.0
    assert rows["tiny softplus: relative error of d A_log"].bar == 3e-2
    assert plot_measurements(bench.found, peer.label)[:4] == b"\x89PNG"


def test_a_peer_that_fails_is_left_out_with_its_reason(fake_clock):
    bench = ops.Bench(**settings(peer=Reference(breaks=True), cases=(), gates=("bounded",)))
    assert bench.run() == 0
    step = next(each for each in bench.found if each.quantity == "step")
    assert step.peer is None
    assert "NotImplementedError: no decode here" in step.note
    assert step.row("fla-core 0.6.0").peer is None


def test_a_wrong_op_is_not_timed(fake_clock, capsys):
    bench = ops.Bench(**settings(ours=Reference(off=1.05), decode_cases=()))
    assert bench.run() == 1
    assert not fake_clock
    assert not bench.found
    assert "RED" in capsys.readouterr().out


def test_a_spent_budget_starts_no_case_but_keeps_the_checks(fake_clock, capsys):
    bench = ops.Bench(**settings(budget_s=1e-9))
    assert bench.run() == 0
    assert not fake_clock
    assert "5 of 5 left out" in capsys.readouterr().out
    assert all("relative error" in each.quantity for each in bench.found)


def test_a_missed_bar_is_written_as_a_row():
    row = Measurement(case="a", quantity="forward", unit="ms", ours=2.0, bar=1.0).row(None)
    assert row.met is False

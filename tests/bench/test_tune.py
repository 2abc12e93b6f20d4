"""The tuner's own rules, with a clock that is told what to show: what is tried, dropped, chosen and printed."""

from __future__ import annotations

import io
import os

import pytest
import torch
from rich.console import Console

from gendistill.cli.main import main
from gendistill.results.table import load_results, write_results_json

pytest.importorskip("triton", reason="the Triton kernels need triton")

from gendistill.bench import tune
from gendistill.bench.cases import CASES, TUNE_NAMES, Case
from gendistill.bench.launches import PLACES, TABLES, watch
from gendistill.bench.tune import CANDIDATES, Job, Outcome, Trial, Tuner, candidates, code, make_jobs
from gendistill_kernels.delta import layout
from gendistill_kernels.delta import rows as delta_rows
from gendistill_kernels.delta.rows import TABLE, is_many
from gendistill_kernels.runtime.lookup import Config, forced

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without one")
TINY = Case("tiny", 1, 65, 2, 16, kv_heads=1)


def job(kernel="scan", keys=128, values=128, *, many=True, save=False, step=dict):
    key = (keys, values, 2, many, save) if kernel in TABLE.kernels else (2,)
    return Job(kernel, "a case", key, step)


def outcome(*milliseconds):
    trials = [
        Trial(Config(2 << number, 4), ms, None if ms else "does not fit")
        for number, ms in enumerate(milliseconds)
    ]
    return Outcome(job(), trials)


@pytest.mark.parametrize(
    ("milliseconds", "best"),
    [
        ((1.0, 0.9, 0.8), 2),
        # within the noise of what the table has
        ((1.0, 0.98, 0.975), 0),
        ((1.0, None, 0.5), 2),
        # what the table has cannot run here
        ((None, 2.0, 1.9), 2),
        ((None, None), 0),
    ],
)
def test_the_best_is_the_fastest_if_it_is_faster_than_noise(milliseconds, best):
    found = outcome(*milliseconds)
    assert found.best is found.trials[best]


@pytest.mark.parametrize("kernel", PLACES)
@pytest.mark.parametrize("channels", [64, 128])
def test_candidates_start_with_the_table_and_are_few_and_different(kernel, channels):
    one = job(kernel, channels, channels, many=channels == 128, save=True)
    tried = candidates(one, one.row.config)
    assert tried[0] == one.row.config
    assert 2 <= len(tried) == len(set(tried)) <= 13
    if kernel in ("scan", "summary", "reverse_scan", "reverse_summary", "carry", "keys", "prepare"):
        assert all(config.block <= channels for config in tried[1:])
    # that of the table counts as tried where there are fewer channels than its block
    launches = [config._replace(block=min(config.block, channels)) for config in tried]
    if kernel in ("prepare", "keys"):
        assert len(set(launches)) == len(launches)


def test_configurations_and_rows_are_written_as_in_the_table():
    for rows in (rows for table in TABLES for rows in table.rows.values()):
        for row in rows:
            assert eval(code(row.config), {"Config": Config}) == row.config
    found = outcome(1.0, 0.5).paste()
    assert found == 'Row("scan", 128, 128, 2, True, False, Config(4, 4)),  # a case'
    (row,) = eval(found, vars(delta_rows))
    assert row.config == Config(4, 4)
    norm = Outcome(job("norm_forward"), [Trial(Config(4096, 4), 1.0)])
    assert norm.paste() == 'ByBytes("norm_forward", 2, Config(4096, 4)),  # a case'


def written(tuner):
    text = Console(file=io.StringIO(), width=200)
    tuner.console = text
    return tuner.run(), text.file.getvalue()


class Steps:
    """Stand in for a pass: launches one kernel, and is wrong with some configurations."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(tune, "watch", self.watch)

    def watch(self, kernel):
        class Watch:
            __enter__ = staticmethod(lambda: self.asked)
            __exit__ = staticmethod(lambda *_: None)

        return Watch()

    def __call__(self):
        config = TABLE.lookup(torch.device("cpu"), "scan", 128, 128, 2, True)
        self.asked.append(config)
        if config.stages == 1:
            raise RuntimeError("out of resource: shared memory\nand more")
        off = 1.1 if config.block == 32 else 1.0
        return {"out": torch.full((4,), off), "d A_log": torch.ones(2)}


def test_wrong_and_failing_candidates_are_dropped_with_their_reason(monkeypatch, tmp_path):
    one = job(step=Steps(monkeypatch))
    timed, saved = [], []

    def clock(config):
        timed.append(config)
        return 0.5 if config == Config(128, 4, 2) else 1.0

    (found,), text = written(Tuner(jobs=[one, one], clock=clock, save=saved.append))
    by_config = {trial.config: trial for trial in found.trials}
    assert by_config[Config(64, 4)].reason == "RuntimeError: out of resource: shared memory"
    assert by_config[Config(32, 4, 2)].reason == "ValueError: out is off by 1.0e-01"
    assert all(config.block != 32 and config.stages > 1 for config in timed)
    assert found.now.config == Config(128, 8, stages=3)
    assert found.best.config == Config(128, 4, 2)
    assert 'Row("scan", 128, 128, 2, True, False, Config(128, 4, stages=2)),' in text
    for words in (
        "scan: K 128, V 128, 2 bytes, many chains",
        "chosen now?",
        "best?",
        "off by 1.0e-01",
        "0.5000",
    ):
        assert words in text
    # a second job of the same sizes is the same job; nothing stays forced
    assert len(saved) == 1
    assert TABLE.lookup(torch.device("cpu"), "scan", 128, 128, 2, True) == found.now.config
    path = tmp_path / "tune.json"
    write_results_json(path, command="x", device="a GPU", rows=found.rows(), commit="0123abc")
    rows = {row.name: row for row in load_results(path).rows}
    assert len(rows) == len(timed)
    best = rows["scan, K 128, V 128, 2 bytes, many chains, a case: Config(128, 4, stages=2)"]
    assert (best.value, best.note) == (0.5, "best")


def test_where_nothing_is_faster_it_says_so(monkeypatch):
    _, text = written(Tuner(jobs=[job(step=Steps(monkeypatch))], clock=lambda config: 1.0))
    assert "nothing is faster by 3% than what the table has" in text
    assert "Row(" not in text


def test_a_spent_budget_starts_no_job(monkeypatch):
    found, text = written(Tuner(jobs=[job(step=Steps(monkeypatch))], clock=float, budget_s=-1.0))
    assert not found
    assert "scan and what follows left out" in text


def test_a_pass_without_the_kernel_is_left_out(monkeypatch):
    steps = Steps(monkeypatch)
    found, text = written(Tuner(jobs=[job(step=lambda: {"out": torch.ones(1)})], clock=float))
    assert not found
    assert not steps.asked
    assert "not launched here" in text


def test_the_cases_reach_every_kernel_and_shape_class():
    cases = [case for case in CASES if case.name in TUNE_NAMES]
    assert len(cases) == len(TUNE_NAMES)
    chains = {is_many(case.batch * case.heads, case.channels, packed=False) for case in cases}
    assert chains == {True, False}
    assert any(case.tokens > 64 * layout.SPAN for case in cases)
    assert set(CANDIDATES) == set(PLACES)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter would run what is recorded"
)
def test_every_job_launches_its_kernel_with_what_is_forced(monkeypatch):
    """Recorded on the CPU, in segments of one chunk; no kernel runs."""
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 1)
    names = []
    for one in make_jobs([TINY], dtype=torch.float32, device="cpu"):
        names.append(one.kernel)
        now = one.row.config
        with forced(one.kernel, now._replace(warps=2)), watch(one.kernel, run=False) as launches:
            one.step()
        assert launches, one.kernel
        if not one.kernel.startswith("decode"):
            assert launches[-1].settings["num_warps"] == 2
    assert set(names) == set(PLACES)


@no_gpu
def test_without_cuda_it_says_so(capsys):
    assert main(["bench", "tune"]) == 1
    assert "gendistill bench tune measures on a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "huge"], "invalid choice"),
        (["--budget", "0"], "must be positive"),
        (["--commit", "main"], "hex"),
    ],
)
def test_wrong_arguments_are_named(words, message, capsys):
    assert main(["bench", "tune", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.interpret
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off: make interpret"
)
def test_interpreted_candidates_agree_with_the_table(monkeypatch):
    """The whole way but for the clock: real passes, of a sequence in segments."""
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 1)
    kernels = ("reverse_scan", "keys", "norm_backward")
    jobs = make_jobs([TINY], dtype=torch.float32, device="cpu", kernels=kernels)
    found, _ = written(Tuner(jobs=jobs, clock=lambda launch: float(launch.grid[0])))
    assert [outcome.job.kernel for outcome in found] == list(kernels)
    assert all(trial.ms for outcome in found for trial in outcome.trials)

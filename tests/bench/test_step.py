"""Timed training steps: that they are the trainer's own, that what is wrong is not timed, and that counts are right."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from gendistill.bench.documents import Drawer, synthetic_stream
from gendistill.bench.engines import PLAIN, SWITCHES, choose_engines, plain_value, read_engine
from gendistill.bench.pair import make_student, make_teacher
from gendistill.bench.shapes import SHAPES
from gendistill.bench.step import Peer, StepBench
from gendistill.bench.step_parts import documents, find_syncs
from gendistill.bench.step_rows import StepTime, result_rows
from gendistill.bench.stock import StockStep
from gendistill.bench.trace import covered, summarise_trace
from gendistill.cli.main import main
from gendistill.config.engine import EngineConfig
from gendistill.data.batch import PADDING
from gendistill.errors import GendistillError, RecipeError
from gendistill.ops import Segments, chunk_kda
from gendistill.ops.conv import causal_conv
from gendistill.results.table import load_results
from gendistill.training.parallel import Single

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def test_the_command_measures_both_stages(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = [
        "bench",
        "step",
        "--shape",
        "tiny",
        "--stage",
        "distill",
        "block",
        "--cpu",
        "--json",
        str(path),
    ]
    assert main([*arguments, "--commit", "0" * 40, "--steps", "2", "--warmup", "1"]) == 0
    rows = {row.name: row for row in load_results(path).rows}
    assert rows["distill stage, tiny: tokens/s"].n == 2
    assert rows["block stage, tiny: tokens/s"].value > 0
    shares = [row.value for name, row in rows.items() if name.startswith("distill stage, tiny: share of")]
    assert len(shares) == 6
    assert sum(shares) == pytest.approx(1)
    assert "relative error in float32" in capsys.readouterr().out


def test_steps_are_those_of_the_trainer():
    bench = StepBench(shape=TINY, cpu=True)
    with bench.opened(EngineConfig(), stream=bench.stream(EngineConfig())) as run:
        before = {name: value.detach().clone() for name, value in run.module.named_parameters()}
        tokens = 0
        for _ in range(2):
            run.step()
            tokens += sum(documents(run.micro_batches))
        assert run.progress.step == 2
        assert run.meter.read().tokens == tokens
        after = dict(run.module.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.layers.1.mlp.up_proj.weight" in changed
    assert "model.layers.1.self_attn.q_proj.weight" not in changed  # kept attention
    assert "model.embed_tokens.weight" not in changed


def test_a_wrong_engine_is_not_timed(monkeypatch):
    right = StepBench._solve

    def wrong(self: StepBench, engine: EngineConfig, *, exact: bool = False) -> Any:
        found, dtype = right(self, engine, exact=exact)
        if engine != PLAIN:
            for gradient in found.gradients.values():
                gradient *= 1.01
        return found, dtype

    monkeypatch.setattr(StepBench, "_solve", wrong)
    monkeypatch.setattr(StepBench, "_time", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(GendistillError, match="wrong under default"):
        StepBench(shape=TINY, cpu=True).run()


def test_the_student_is_what_conversion_makes():
    teacher = make_teacher(TINY, device=CPU, dtype=torch.bfloat16, seed=3)
    student = make_student(teacher, TINY)
    weights, ours = teacher.state_dict(), student.state_dict()
    assert student.config.mixers == ["kda", "full", "kda"]
    assert {value.dtype for value in ours.values()} == {torch.float32}
    copied = [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ]
    for name in (*copied, "model.layers.0.self_attn.v_proj.weight", "model.norm.weight"):
        assert torch.equal(ours[name], weights[name].float()), name
    # the scale of the teacher's q_norm is folded into the projection
    q, scale = (weights[f"model.layers.0.self_attn.{name}.weight"].float() for name in ("q_proj", "q_norm"))
    expected = q * scale.repeat(TINY.sizes["num_attention_heads"])[:, None]
    assert torch.equal(ours["model.layers.0.self_attn.q_proj.weight"], expected)


def test_equal_seeds_give_equal_weights():
    one, other = (
        make_student(make_teacher(TINY, device=CPU, dtype=torch.float32, seed=1), TINY).state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_documents_are_as_described():
    drawer = Drawer(vocab_size=1000, seq_len=4096, mean_tokens=500, seed=0)
    lengths = np.array([len(drawer.draw(number)) for number in range(4000)])
    assert lengths.min() >= 8
    assert lengths.max() <= 4096
    # cut at the row: the mean falls by a little
    assert 440 < lengths.mean() < 510
    assert 280 < np.median(lengths) < 330
    assert np.array_equal(
        drawer.draw(7).ids, Drawer(vocab_size=1000, seq_len=4096, mean_tokens=500, seed=0).draw(7).ids
    )


def test_the_stream_packs_documents_without_the_padding():
    settings = {"vocab_size": 257, "seq_len": 64, "mean_tokens": 20, "rows": 4, "micro_batch": 2, "seed": 0}
    batches = next(synthetic_stream(**settings, prefetch=0))
    assert [batch.input_ids.shape for batch in batches] == [(2, 64), (2, 64)]
    assert sum(documents(batches)) == sum(batch.num_tokens for batch in batches)
    assert len(documents(batches)) == sum(name != PADDING for batch in batches for name in batch.document_ids)


def test_idle_time_is_what_no_kernel_covers():
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    # a copy from the host beside nothing leaves the GPU idle
    trace = summarise_trace(
        [("a", 0.0, 4.0), ("b", 3.0, 5.0), ("Memcpy HtoD (Pinned -> Device)", 5.0, 7.0), ("a", 8.0, 10.0)],
        steps=2,
    )
    assert trace.wall_ms == 5
    assert trace.busy_ms == 3.5
    assert trace.idle == pytest.approx(0.3)
    assert trace.idle_of(7.0) == pytest.approx(0.5)
    assert trace.launches == 2
    assert tuple(trace.kernels[0]) == ("a", 1.0, 3.0)


def test_bars_are_for_the_chosen_engine_alone():
    about = {"tokens": 80_000.0, "flops": 1e12, "device": "NVIDIA H200"}
    found = StepTime(name="default", seconds=(0.5, 1.0, 2.0), memory_gb=61.0, **about)
    other = StepTime(name="loss=reference", seconds=(2.0,), **about)
    peer = StepTime(name="stock", seconds=(4.0,), **about)
    assert found.spread == (40_000.0, 160_000.0)
    assert found.mfu == pytest.approx(1 / 989)
    rows = {row.name: row for row in result_rows("qwen3-0.6b", "distill", [found, other], peer)}
    speed = rows["distill stage, qwen3-0.6b: tokens/s"]
    assert (speed.value, speed.bar, speed.met) == (80_000, 75_000, True)
    assert (speed.peer, speed.peer_value) == ("stock", 20_000)
    assert rows["distill stage, qwen3-0.6b: times as fast as stock parts"].value == 4
    assert rows["distill stage, qwen3-0.6b: peak memory"].met is False
    slower = rows["distill stage, qwen3-0.6b, loss=reference: tokens/s"]
    assert (slower.value, slower.bar) == (40_000, None)
    assert rows["distill stage, qwen3-0.6b, loss=reference: times default"].value == 0.5


class ReferenceParts:
    """Our reference ops in the place of fla-core's, which run on no CPU."""

    label = "reference 1"

    class Conv(torch.nn.Conv1d):
        def forward(self, x: Any, cu_seqlens: Any) -> Any:
            segments = Segments.from_cu_seqlens(cu_seqlens)
            taps, bias = self.weight[:, 0], self.bias
            return causal_conv(x, taps, bias, activation="identity", segments=segments)[0], None

    def conv(self, channels: int, taps: int) -> torch.nn.Module:
        return self.Conv(channels, channels, taps, groups=channels)

    def rule(self, q: Any, k: Any, v: Any, decay: Any, beta: Any, **settings: Any) -> Any:
        segments, a_log = Segments.from_cu_seqlens(settings.pop("cu_seqlens")), settings.pop("A_log")
        return chunk_kda(q, k, v, decay, beta, gate="bounded", a_log=a_log, segments=segments, **settings).out


@pytest.mark.parametrize("stage", ["distill", "block"])
def test_the_peer_computes_the_same_loss_and_gradients(stage):
    bench = StepBench(shape=TINY, stage=stage, cpu=True)
    found, _ = bench._solve(PLAIN)
    batch = bench._check_batch()
    stock = StockStep(
        TINY, bench.stage_config(), device=CPU, teacher_dtype=torch.float32, parts=ReferenceParts(), seed=0
    )
    loss = stock.loss(batch) / batch.num_labels
    loss.backward()
    assert loss.item() == pytest.approx(found.loss, rel=1e-4)
    parameters = dict(stock.student.named_parameters())
    assert {name for name, value in parameters.items() if value.grad is not None} == set(found.gradients)
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=2e-3, atol=1e-6, msg=name)
    assert stock.step([batch]).isfinite()


def test_the_peer_is_timed_only_if_it_computes_the_same(capsys):
    bench = StepBench(shape=TINY, cpu=True, steps=1, warmup=1, peer=Peer(ReferenceParts()))
    rows = {row.name: row for row in bench.run()}
    assert rows["distill stage, tiny: tokens/s"].peer == "transformers, reference 1"
    wrong = StepBench(shape=TINY, cpu=True, steps=1, peer=Peer(ReferenceParts()))
    assert wrong._time_peer(exact=100.0) is None
    assert "computes something else" in capsys.readouterr().out


def test_a_peer_without_fla_core_has_no_mixers(capsys):
    bench = StepBench(shape=TINY, cpu=True, steps=1, warmup=1, check=False, peer=Peer(None, "not installed"))
    rows = {row.name: row for row in bench.run()}
    assert rows["distill stage, tiny: tokens/s"].peer == "transformers, mixers left out"
    assert "mixers are left out: not installed" in capsys.readouterr().out


def test_every_switch_can_be_turned_off():
    assert {"loss", "blocks", "prefetch"} <= set(SWITCHES)
    assert "parallel" not in SWITCHES
    for name in SWITCHES:
        assert getattr(PLAIN, name) == plain_value(name) != EngineConfig.model_fields[name].default
    engines = choose_engines([], [])
    assert list(engines) == ["default", *(f"{name}={plain_value(name)}" for name in SWITCHES), "all off"]
    assert engines["all off"] == PLAIN


def test_engines_are_read_from_words():
    assert read_engine(["loss=triton"], where="--engine").loss == "triton"
    engines = choose_engines(["loss=triton"], ["blocks=family,loss=reference", "loss=triton"])
    assert list(engines) == ["loss=triton", "blocks=family loss=reference"]
    for word in ("loss", "lose=auto", "loss=fast"):
        with pytest.raises(RecipeError, match=r"setting of the engine|loss="):
            read_engine([word], where="--engine")


def test_every_engine_shares_a_stage_in_its_own_way(monkeypatch):
    asked = []

    def connect(engine, *, cpu):
        asked.append(engine)
        return Single(CPU)

    monkeypatch.setattr("gendistill.bench.step.connect", connect)
    engines = {mode: EngineConfig(parallel=mode) for mode in ("ddp", "fsdp2")}
    bench = StepBench(shape=TINY, cpu=True, engines=engines)
    for engine in engines.values():
        with bench.opened(engine, stream=bench.stream(engine)) as run:
            assert asked[-1] is engine
            assert run.parallel is bench.parallel


def test_two_processes_share_the_rows_in_both_modes(tmp_path):
    path = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "gendistill",
        "bench",
        "step",
        "--shape",
        "tiny",
        "--cpu",
        "--steps",
        "2",
    ]
    command += ["--engine", "parallel=ddp", "--compare", "parallel=fsdp2"]
    more = ["--warmup", "1", "--num-processes", "2", "--json", str(path), "--commit", "0" * 40]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens a step in micro-batches of 2 on 2 x CPU") == 1
    assert "parallel=fsdp2: " in done.stdout
    [first, *_] = load_results(path).rows
    assert first.name == "distill stage, tiny, 2 processes: tokens/s"
    assert first.bar is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be positive"),
        (["--rows", "6", "--micro-batch", "4"], "not a multiple"),
        (["--engine", "loss=fast"], "loss="),
        (["--num-processes", "3"], "4 rows cannot be shared equally by 3 processes"),
    ],
)
def test_bad_numbers_are_refused(arguments, message, capsys):
    assert main(["bench", "step", "--shape", "tiny", "--cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_waits_are_counted_by_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    [(place, number)] = find_syncs(step).items()
    assert number == 2
    assert place.startswith("bench/test_step.py:")


@pytest.mark.gpu
def test_the_gpu_is_profiled(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    arguments = ["--steps", "2", "--warmup", "1", "--profile", "2", "--trace", str(trace)]
    assert main(["bench", "step", "--shape", "tiny", *arguments]) == 0
    assert "ms a step" in capsys.readouterr().out
    assert trace.stat().st_size > 1000

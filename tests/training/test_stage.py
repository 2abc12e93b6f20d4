"""The loop in one process: invariances, budgets, what it writes and how it fails."""

import hashlib
import json
import math
import re
from io import StringIO

import pytest
import torch

from gendistill.data.batch import model_inputs
from gendistill.errors import CheckpointError, RecipeError, TrainingError
from gendistill.losses import logits
from gendistill.ops import Impl
from gendistill.testing import tiny_teacher
from gendistill.training import stage
from gendistill.training.stage import StageRun, recompute_activations
from gendistill.training.step import StepRunner


def digest(parameter):
    return hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()


def stage_folder(folder):
    return folder / "stages" / "tiny"


def test_micro_batch_split_changes_nothing(tiny, tmp_path):
    """Rows count different numbers of labels; one of eight, eight of one and a checkpointed split must agree."""
    runs = {}
    for name, changes in {
        "whole": {"micro_batch_size": 8},
        "split": {"micro_batch_size": 1},
        "recomputed": {"micro_batch_size": 4, "gradient_checkpointing": True},
        "one layer recomputed": {"micro_batch_size": 4, "gradient_checkpointing": 1},
    }.items():
        _, student = tiny.run_stage(tmp_path / name, steps=3, **changes)
        runs[name] = (tiny.rows(tmp_path / name), dict(student.named_parameters()))
    rows, weights = runs["whole"]
    for name in ("split", "recomputed", "one layer recomputed"):
        for mine, theirs in zip(runs[name][0], rows, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for key, value in runs[name][1].items():
            # Adam turns a rounding error of a near-zero gradient into a part of a step of 1e-3
            assert torch.allclose(value, weights[key], atol=2e-4), key


@pytest.mark.parametrize(("asked", "expected"), [(False, [0, 0]), (1, [1, 0]), (True, [1, 1]), (5, [1, 1])])
def test_activations_of_the_first_layers_are_computed_again(tiny, asked, expected):
    student = tiny.make_student().train()
    recompute_activations(student, asked)
    calls = [0, 0]
    for index, layer in enumerate(student.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
    batch = tiny.batch_of(range(2))
    student.model(**model_inputs(batch)).last_hidden_state.sum().backward()
    assert calls == [1 + more for more in expected]
    recompute_activations(student, False)
    student.model(**model_inputs(batch)).last_hidden_state.sum().backward()
    assert calls == [2 + more for more in expected]


def test_nothing_is_hooked_to_a_student_whose_activations_are_computed_again(tiny):
    """A hook would keep passes from being captured, and have gradients go further down than what learns."""
    student = tiny.make_student().train()
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for asked in (True, 1, False):
        recompute_activations(student, asked)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
        assert not student.model.embed_tokens(torch.tensor([[1]])).requires_grad


class Noisy(torch.nn.Module):
    """What somebody else might have put into a layer: it draws, and is no ``Dropout``."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * torch.rand_like(x)


@pytest.mark.parametrize("draws", ["a module from outside", "attention of the family"])
def test_what_is_drawn_at_random_is_the_same_when_it_is_computed_again(tiny, draws):
    student = tiny.make_student().train()
    if draws == "a module from outside":
        student.model.layers[0].mlp = Noisy(student.model.layers[0].mlp)
    else:
        student.config.attention_dropout = 0.5
        student.model.layers[1].self_attn.attention_dropout = 0.5
    batch, found = tiny.batch_of(range(2)), []
    for again in (False, True):
        student.zero_grad()
        recompute_activations(student, again)
        torch.manual_seed(0)
        student.model(**model_inputs(batch)).last_hidden_state.square().sum().backward()
        found.append([value.grad for value in student.model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_stage_that_does_not_begin_lets_go_of_what_its_steps_hold(tiny, tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr(StepRunner, "release", lambda self: released.append(self))

    def fails(self, locked):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StageRun, "_decide", fails)
    with pytest.raises(torch.OutOfMemoryError):
        tiny.run_stage(tmp_path)
    assert released


def test_graphs_are_gone_when_heldout_text_is_scored_at_the_end(tiny, tmp_path, monkeypatch):
    order, score = [], stage.heldout_measure
    monkeypatch.setattr(StepRunner, "release", lambda self: order.append("release"))
    monkeypatch.setattr(stage, "heldout_measure", lambda run: order.append("score") or score(run))
    tiny.run_stage(tmp_path, steps=1)
    assert order[:2] == ["release", "score"]


class Hungry:
    """A monitor that fits beside nothing."""

    when, every = "log", 1

    def __init__(self):
        self.asked = 0

    def __call__(self, run):
        self.asked += 1
        if run.runner.captured is not None and run.runner.captured.num_graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"found": 1.0}


@pytest.mark.parametrize("graphs", [0, 1])
def test_graphs_make_room_for_a_monitor(tiny, tmp_path, monkeypatch, graphs):
    class Held:
        num_graphs, num_bytes = graphs, 0

        def release(self):
            self.num_graphs = 0

    monitor = Hungry()
    monkeypatch.setitem(stage.MONITORS, "hungry", lambda job: monitor)
    ask = StageRun._ask

    def asked(self, when):
        self.runner.captured = Held() if when == "log" else None
        ask(self, when)
        self.runner.captured = None

    monkeypatch.setattr(StageRun, "_ask", asked)
    tiny.run_stage(tmp_path, steps=1)
    assert monitor.asked == 1 + graphs
    assert tiny.rows(tmp_path)[0]["hungry"] == {"found": 1.0}


@pytest.mark.parametrize("norm", ["mse", "relative"])
def test_alignment_is_invariant_to_the_split_too(tiny, tmp_path, norm):
    changes = {"objective": {"kind": "mixer_output", "norm": norm}, "train": ["mixer"], "steps": 2}
    tiny.run_stage(tmp_path / "a", micro_batch_size=8, **changes)
    tiny.run_stage(tmp_path / "b", micro_batch_size=2, **changes)
    for mine, theirs in zip(tiny.rows(tmp_path / "a"), tiny.rows(tmp_path / "b"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["parts"] == pytest.approx(theirs["parts"], rel=1e-5)


def test_loss_is_the_mean_over_the_whole_step(tiny, tmp_path):
    """The first logged loss is KL summed over all rows of the step, divided by all their labels."""
    tiny.run_stage(tmp_path, steps=1, micro_batch_size=2)
    batch = tiny.batch_of(range(8))
    with torch.no_grad():
        inputs = {"position_ids": batch.position_ids, "use_cache": False}
        counted = batch.labels != -100
        p = tiny.make_teacher()(batch.input_ids, **inputs).logits[counted].double().log_softmax(-1)
        q = tiny.make_student()(batch.input_ids, **inputs).logits[counted].double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum() / counted.sum()
    row = tiny.rows(tmp_path)[0]
    assert row["loss"] == row["parts"]["kl"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["tokens"] == batch.num_tokens


def test_frozen_tensors_keep_their_bytes_and_trained_ones_change(tiny, tmp_path):
    student = tiny.make_student()
    before = {name: digest(value) for name, value in student.named_parameters()}
    result, _ = tiny.run_stage(tmp_path, student=student, train=["mixer", "norm"], steps=2)
    for name, value in student.named_parameters():
        trained = "layers.0.self_attn" in name or name.endswith(("layernorm.weight", "model.norm.weight"))
        assert (digest(value) != before[name]) == trained, name
    assert result.tensors_changed == 1.0


def test_a_stage_learns(tiny, tmp_path):
    """An all-attention student with cross-entropy: plain fine-tuning memorises one repeated step."""

    class SameStep(tiny.TinyStream):
        def __next__(self):
            self.step = 0
            return super().__next__()

    stream, tiny.TinyStream = tiny.TinyStream, SameStep
    try:
        result, _ = tiny.run_stage(
            tmp_path,
            student=tiny.make_teacher(seed=5),
            objective={"kind": "ce"},
            train=["attention", "mlp", "norm", "embed", "head"],
            steps=40,
            lr=1e-2,
            log_every_steps=10,
        )
    finally:
        tiny.TinyStream = stream
    assert result.loss_last < 0.2 * result.loss_first


def test_files_say_what_happened(tiny, tmp_path):
    result, _ = tiny.run_stage(tmp_path, steps=4, log_every_steps=2, heldout_every=2, keep_checkpoints=2)
    lines = [json.loads(line) for line in (stage_folder(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert set(lines[1]) == {
        *("step", "tokens", "loss", "parts", "lr", "grad_norm", "tokens_per_second", "seconds"),
        *("speed", "shares", "groups"),
    }
    assert lines[0]["heldout"]["num_tokens"] == sum(batch.num_labels for batch in tiny.heldout())
    assert set(lines[1]["lr"]) == {"mixer", "attention", "mlp", "norm", "embed", "head"}
    written = json.loads((stage_folder(tmp_path) / "result.json").read_text())
    assert (written["stage"], written["objective"], written["steps"]) == ("tiny", "kl", 4)
    assert (written["loss_first"], written["loss_last"]) == (lines[0]["loss"], lines[1]["loss"])
    assert written["heldout"] == result.heldout
    assert written["heldout"]["ln_vocab"] == pytest.approx(math.log(97))


def test_logged_loss_averages_the_interval_also_across_a_resume(tiny, tmp_path, monkeypatch):
    """A checkpoint inside a log interval keeps the interval's sums."""
    tiny.run_stage(tmp_path / "each", steps=4)
    each = [row["loss"] for row in tiny.rows(tmp_path / "each")]
    changes = {"steps": 4, "log_every_steps": 4, "save_every_steps": 3, "keep_checkpoints": 2}
    tiny.run_stage(tmp_path / "some", **changes)
    whole = tiny.rows(tmp_path / "some")
    assert whole[0]["loss"] == pytest.approx(sum(each) / 4, rel=1e-6)
    checkpoints = stage_folder(tmp_path / "some") / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000003", "step-000004"]
    (checkpoints / "step-000004" / "state.json").unlink()
    tiny.run_stage(tmp_path / "some", **changes)
    assert tiny.rows(tmp_path / "some") == whole


def test_damaged_checkpoints_are_passed_over_with_a_reason(tiny, tmp_path):
    changes = {"steps": 4, "save_every_steps": 1, "keep_checkpoints": 4}
    tiny.run_stage(tmp_path, **changes)
    whole = tiny.rows(tmp_path)
    checkpoints = stage_folder(tmp_path) / "checkpoints"
    flipped = bytearray((checkpoints / "step-000004" / "trained.safetensors").read_bytes())
    flipped[-5] ^= 1
    (checkpoints / "step-000004" / "trained.safetensors").write_bytes(flipped)
    (checkpoints / "step-000003" / "optimizer.safetensors").unlink()
    text = (checkpoints / "step-000002" / "state.json").read_text()
    (checkpoints / "step-000002" / "state.json").write_text(text[: len(text) // 2])
    (checkpoints / ".step-000009.99999999.partial").mkdir()
    out = StringIO()
    tiny.run_stage(tmp_path, out=out, **changes)
    assert "step-000004: trained.safetensors is damaged" in out.getvalue()
    assert "step-000003: optimizer.safetensors is missing" in out.getvalue()
    assert "step-000002: state.json cannot be read" in out.getvalue()
    assert f"resuming from {checkpoints / 'step-000001'}" in out.getvalue()
    assert tiny.rows(tmp_path) == whole
    assert not (checkpoints / ".step-000009.99999999.partial").exists()


def test_a_changed_recipe_is_refused_by_name_once_there_is_something_to_lose(tiny, tmp_path):
    with pytest.raises(RecipeError):
        tiny.run_stage(tmp_path, steps=2, only=["no such parameter"])
    tiny.run_stage(tmp_path, steps=2)
    with pytest.raises(CheckpointError) as caught:
        tiny.run_stage(tmp_path, steps=3, lr=2e-3, schedule={"warmup": 0.5})
    for change in (
        "stages.tiny.lr: 0.001 -> 0.002",
        "stages.tiny.steps: 2 -> 3",
        "schedule.warmup: 0.1 -> 0.5",
    ):
        assert change in str(caught.value)
    assert "stages.tiny.betas" not in str(caught.value)
    with pytest.raises(CheckpointError, match="a student of other weights"):
        tiny.run_stage(tmp_path, steps=2, student=tiny.make_student(seed=8))
    # neither where the log goes nor how a step is cut changes the mathematics
    tiny.run_stage(tmp_path, steps=2, log_every_steps=2, micro_batch_size=2, save_every_minutes=1)


def test_minutes_become_steps_once_and_leave_no_trace(tiny, tmp_path):
    out = StringIO()
    result, _ = tiny.run_stage(tmp_path / "minutes", steps=None, minutes=0.02, out=out)
    plan = json.loads((stage_folder(tmp_path / "minutes") / "plan.json").read_text())
    assert plan["steps"] == result.steps
    assert 0 < plan["seconds_per_step"] * plan["steps"] <= 1.2 + plan["seconds_per_step"]
    tiny.run_stage(tmp_path / "steps", steps=plan["steps"])
    assert tiny.rows(tmp_path / "minutes") == tiny.rows(tmp_path / "steps")
    again, _ = tiny.run_stage(tmp_path / "minutes", steps=None, minutes=0.02)
    assert again.steps == plan["steps"]


def test_minutes_that_end_before_the_first_step_are_refused_with_the_mend(tiny, tmp_path):
    with pytest.raises(RecipeError) as caught:
        tiny.run_stage(tmp_path, steps=None, minutes=1e-6)
    assert caught.value.where == "stages.tiny.minutes"
    assert "minutes 1e-06 end before the first step: timing took" in caught.value.message
    assert re.fullmatch(r"give it more than [\d.]+, or set steps", caught.value.hint or "")
    assert not (stage_folder(tmp_path) / "plan.json").exists()


def test_tokens_become_whole_steps(tiny, tmp_path):
    result, _ = tiny.run_stage(tmp_path, steps=None, tokens=129)
    assert result.steps == 2


def test_checkpoints_come_by_time_too(tiny, tmp_path):
    tiny.run_stage(tmp_path, steps=3, save_every_minutes=1e-9, keep_checkpoints=2)
    names = sorted(path.name for path in (stage_folder(tmp_path) / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000003"]


AT_ONCE = {"in_a_row": 1, "rewinds": 0}


class Poison:
    """Make a module's output not finite from one training call on."""

    def __init__(self, module, call):
        self.calls, self.call = 0, call
        module.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        self.calls += module.training
        return output * float("nan") if module.training and self.calls >= self.call else output


def test_a_non_finite_loss_stops_names_the_module_and_spoils_nothing(tiny, tmp_path):
    student = tiny.make_student()
    Poison(student.model.layers[1].mlp.gate_proj, call=2 * 2 + 2)  # the second of two micro-batches of step 3
    with pytest.raises(TrainingError) as caught:
        tiny.run_stage(tmp_path, student=student, save_every_steps=2, non_finite=AT_ONCE)
    message = str(caught.value)
    assert "stages.tiny" in message
    assert "not finite at step 3 of 6" in message
    assert "output of model.layers.1.mlp.gate_proj (micro-batch" in message
    assert str(stage_folder(tmp_path) / "checkpoints" / "step-000002") in message
    assert "run the same command again" in message
    assert [row["step"] for row in tiny.rows(tmp_path)] == [1, 2]
    healthy, _ = tiny.run_stage(tmp_path / "healthy", steps=6, save_every_steps=2)
    resumed, _ = tiny.run_stage(tmp_path, save_every_steps=2, non_finite=AT_ONCE)
    assert resumed.loss_last == healthy.loss_last


def test_a_non_finite_gradient_names_its_parameter_and_leaves_the_weights(tiny, tmp_path):
    student = tiny.make_student()
    gate = student.model.layers[0].self_attn.A_log
    before = digest(gate)
    gate.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"gradient of model\.layers\.0\.self_attn\.A_log.*No checkpoint"):
        tiny.run_stage(tmp_path, student=student, non_finite=AT_ONCE)
    assert digest(gate) == before


def test_ineffective_training_is_reported(tiny, tmp_path):
    out = StringIO()
    result, _ = tiny.run_stage(tmp_path, steps=1, lr=1e-30, out=out)
    assert result.tensors_changed < 0.99
    assert "warning: tiny:" in out.getvalue()
    assert "did not change at all" in out.getvalue()


def test_bfloat16_compute_keeps_float32_weights(tiny, tmp_path, monkeypatch):
    exact, _ = tiny.run_stage(tmp_path / "float32", steps=2)
    monkeypatch.setattr(stage, "choose_compute_dtype", None)
    result, student = tiny.run_stage(tmp_path / "bfloat16", steps=2, compute_dtype="bfloat16")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert result.loss_last != exact.loss_last
    assert result.loss_last == pytest.approx(exact.loss_last, rel=0.05)
    assert result.heldout["kl"] == pytest.approx(exact.heldout["kl"], rel=0.05)


def test_a_bfloat16_student_is_trained_in_float32(tiny, tmp_path):
    result, student = tiny.run_stage(tmp_path, student=tiny.make_student().bfloat16(), steps=1, lr=1e-6)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert result.tensors_changed == 1.0


def test_mismatched_vocabularies_stop_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(RecipeError, match=r"98.*97"):
        tiny.run_stage(tmp_path, teacher=tiny_teacher(vocab_size=98))
    assert not list(tmp_path.iterdir())


def test_plain_output_is_one_line_per_log_interval(tiny, tmp_path):
    out = StringIO()
    tiny.run_stage(tmp_path, steps=4, log_every_steps=2, out=out)
    lines = [line for line in out.getvalue().splitlines() if "tok/s" in line]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    for word in ("loss", "kl", "lr", "gnorm", "eta"):
        assert all(word in line for line in lines)


def test_what_computes_the_loss_is_chosen_once_and_said(tiny, tmp_path, monkeypatch):
    """Also one that is not the device's own choice reaches every call of the op."""
    seen = []
    op = logits.linear_divergence

    def watched(*arguments, impl, **settings):
        seen.append(impl)
        return op(*arguments, impl=Impl.REFERENCE, **settings)

    monkeypatch.setattr(logits, "linear_divergence", watched)
    monkeypatch.setattr(logits, "resolve", lambda requested, **about: Impl(requested))
    out = StringIO()
    tiny.run_stage(tmp_path / "one", steps=2, out=out, engine={"loss": "triton"})
    assert "float32 on cpu, the loss by triton" in out.getvalue()
    assert set(seen) == {Impl.TRITON}
    out = StringIO()
    tiny.run_stage(tmp_path / "two", steps=1, out=out, train=["mixer"], objective={"kind": "block_output"})
    assert "the loss by" not in out.getvalue()


def test_kernels_that_cannot_run_here_are_refused_before_the_first_step(tiny, tmp_path):
    with pytest.raises(
        RecipeError, match=r'impl "triton" is not available for linear_divergence on cpu'
    ) as caught:
        tiny.run_stage(tmp_path, engine={"loss": "triton"})
    assert caught.value.where == "engine.loss"
    assert not list(tmp_path.rglob("*.json"))

"""Stages on the fused engine: the same losses, whatever the objective."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from gendistill.engine.decoder import fuse, is_fused
from gendistill.errors import RecipeError, TrainingError

_SPEC = importlib.util.spec_from_file_location(
    "tiny_run", Path(__file__).parents[1] / "training" / "tiny_run.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

OBJECTIVES = {
    "kl": {},
    "mixer_output": {"objective": {"kind": "mixer_output"}, "train": ["mixer"]},
    "block_output": {"objective": {"kind": "block_output"}, "train": ["mixer", "mlp"]},
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_are_those_of_the_family_s_layers(kind, tmp_path):
    losses = {}
    for blocks in ("family", "fused"):
        result, student = tiny.run_stage(
            tmp_path / blocks, engine={"blocks": blocks}, compute_dtype="float32", **OBJECTIVES[kind]
        )
        assert not is_fused(student)
        losses[blocks] = [row["loss"] for row in tiny.rows(tmp_path / blocks)] + [result.heldout["kl"]]
    assert losses["fused"] == pytest.approx(losses["family"], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fused_stage_that_resumes_goes_the_same_way(dtype, tmp_path):
    def run():
        return tiny.run_stage(
            tmp_path, engine={"blocks": "fused"}, compute_dtype=dtype, save_every_steps=3, log_every_steps=1
        )

    result, student = run()
    losses = [row["loss"] for row in tiny.rows(tmp_path)]
    shutil.rmtree(tmp_path / "stages" / "tiny" / "checkpoints" / "step-000006")
    again, resumed = run()
    assert [row["loss"] for row in tiny.rows(tmp_path)] == losses
    assert again.heldout == result.heldout
    weights = resumed.state_dict()
    assert [
        name for name, value in student.state_dict().items() if not torch.equal(value, weights[name])
    ] == []


def test_a_teacher_keeps_one_copy_of_its_weights(tmp_path, monkeypatch):
    copies = []

    def watched(model, dtype, **settings):
        fuse(model, dtype, **settings)
        decoder = vars(model.model)["_fused_decoder"]
        pairs = zip(decoder.sources, decoder.targets, strict=True)
        copies.append(sum(source.data_ptr() != target.data_ptr() for source, target in pairs))

    monkeypatch.setattr("gendistill.training.stage.fuse", watched)
    tiny.run_stage(tmp_path, engine={"blocks": "fused"}, compute_dtype="float32")
    student, teacher = copies
    assert student > 0
    assert teacher == 0


def test_a_model_is_not_its_own_teacher(tmp_path):
    student = tiny.make_student()
    with pytest.raises(RecipeError, match="teacher would change"):
        tiny.run_stage(tmp_path, student=student, teacher=student)


def test_a_model_that_cannot_run_fused_is_refused_with_the_reason(tmp_path):
    student = tiny.make_student()
    student.config.hidden_act = "gelu"
    with pytest.raises(RecipeError, match=r"the student cannot run fused.*gelu"):
        tiny.run_stage(tmp_path, student=student, engine={"blocks": "fused"})


def test_the_module_of_a_non_finite_loss_is_still_named(tmp_path):
    student = tiny.make_student()

    def poison(_module, _inputs, output):
        return torch.full_like(output, float("nan"))

    student.model.layers[1].mlp.down_proj.register_forward_hook(poison)
    with pytest.raises(TrainingError, match="down_proj"):
        tiny.run_stage(tmp_path, student=student, engine={"blocks": "family"})

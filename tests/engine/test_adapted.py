"""Fused layers with adapters: what they compute is what peft's modules do, before and after the merge."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from gendistill.config.schema import StageConfig
from gendistill.engine.decoder import fuse, is_fused, release, why_not
from gendistill.engine.linear import can_lie_diagonally
from gendistill.mixers.base import Mixer
from gendistill.training.adapters import insert_adapters, merge_adapters
from gendistill.training.freeze import apply_freeze

pytest.importorskip("peft")


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = load("decoder_cases", Path(__file__).parent / "test_decoder.py")
tiny = load("tiny_run", Path(__file__).parents[1] / "training" / "tiny_run.py")

STAGES = {
    "everything": {"lora": {"rank": 3, "groups": ["mixer", "attention", "mlp"]}},
    "beside what learns whole": {
        "train": ["mixer", "norm"],
        "lora": {"rank": 4, "alpha": 3, "groups": ["attention", "mlp"]},
    },
    "some of packed layers": {
        "train": ["norm"],
        "lora": {
            "rank": 2,
            "groups": ["attention", "mixer", "mlp"],
            "only": [r"v_proj|up_proj|b_proj|o_proj"],
        },
    },
    "the last of the mlp": {"lora": {"rank": 2, "groups": ["mlp"], "only": ["down_proj"]}},
}


def adapt(student, stage):
    """Put adapters into a student and move them, so that they count."""
    config = StageConfig(
        **{"data": "none", "steps": 1, "seq_len": 16, "batch_size": 4, "lr": 1e-3, **STAGES[stage]}
    )
    apply_freeze(student, config)
    report = insert_adapters(student, config)
    assert report is not None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return student.train()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("mixers", "family"),
    [
        ("kda", "qwen3"),
        ("kda", "llama with biases"),
        ("kda", "qwen2"),
        ("all kinds", "mistral with a window"),
    ],
)
def test_fused_layers_with_adapters_compute_what_the_modules_do(stage, mixers, family):
    student = adapt(cases.make_student(mixers, family), stage)
    plain, _ = cases.run(cases.make_student(mixers, family))
    adapted, _ = cases.run(student)
    assert cases.distance(plain, adapted) > 1e-3, "the adapters say nothing"
    cases.compare(student, 1e-5)


def test_adapters_learn_and_merge_as_without_fusion():
    found = []
    for fused in (False, True):
        student = adapt(cases.make_student("kda"), "beside what learns whole")
        learning = [value for value in student.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-3, eps=1e-3, fused=True)
        if fused:
            fuse(student, torch.float32)
        for _ in range(3):
            cases.run(student)
            optimizer.step()
        release(student)
        merge_adapters(student)
        found.append(student.state_dict())
    family, ours = found
    assert family.keys() == ours.keys() == cases.make_student("kda").state_dict().keys()
    assert {name: d for name in family if (d := cases.distance(ours[name], family[name])) > 1e-4} == {}


def test_layers_with_adapters_are_part_of_no_diagonal():
    student = adapt(cases.make_student("kda"), "everything")
    layers = [
        layer.self_attn.side_by_side() for layer in student.model.layers if isinstance(layer.self_attn, Mixer)
    ]
    assert layers
    assert not any(map(can_lie_diagonally, layers))
    merge_adapters(student)
    layers = [
        layer.self_attn.side_by_side() for layer in student.model.layers if isinstance(layer.self_attn, Mixer)
    ]
    assert all(map(can_lie_diagonally, layers))


def test_bfloat16_stays_close_to_float32():
    student = adapt(cases.make_student("kda"), "everything")
    hidden, grads = cases.run(student)
    fuse(student, torch.bfloat16)
    found, fused_grads = cases.run(student)
    assert cases.distance(found, hidden) < 0.03
    assert fused_grads.keys() == grads.keys()
    assert all(value.dtype == torch.float32 for value in fused_grads.values())
    both = [torch.cat([each[name].flatten() for name in grads]) for each in (fused_grads, grads)]
    assert cases.distance(*both) < 0.05


def test_dropout_and_foreign_adapters_are_a_reason():
    student = adapt(cases.make_student("kda"), "everything")
    layer = student.model.layers[1].mlp.up_proj
    device = torch.device("cpu")
    assert why_not(student, device=device, dtype=torch.float32) is None
    layer.lora_dropout["default"] = torch.nn.Dropout(0.1)
    assert why_not(student, device=device, dtype=torch.float32) == "its adapters have dropout"
    student.model.layers[1].mlp.up_proj = torch.nn.Sequential(layer.base_layer)
    reason = why_not(student, device=device, dtype=torch.float32)
    assert reason == "one of its linear layers is a Sequential"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stage_with_adapters_runs_fused_and_is_the_same(tmp_path, checkpointing):
    losses = {}
    for blocks in ("family", "fused"):
        result, student = tiny.run_stage(
            tmp_path / blocks,
            engine={"blocks": blocks},
            compute_dtype="float32",
            gradient_checkpointing=checkpointing,
            train=["mixer"],
            lora={"rank": 2, "groups": ["attention", "mlp"]},
        )
        assert not is_fused(student)
        assert not any(".lora_" in name for name, _ in student.named_parameters())
        losses[blocks] = [row["loss"] for row in tiny.rows(tmp_path / blocks)] + [result.heldout["kl"]]
    assert losses["fused"] == pytest.approx(losses["family"], rel=1e-4)

"""Rates, decay and schedules."""

import pytest
import torch

from gendistill.config.schema import ScheduleConfig, StageConfig
from gendistill.testing import tiny_student
from gendistill.training.freeze import apply_freeze
from gendistill.training.optim import (
    build_optimizer,
    choose_compute_dtype,
    learning_rate_factor,
    set_learning_rates,
)

ALL = ["mixer", "attention", "mlp", "norm", "embed", "head"]


def test_weight_decay_touches_matrices_only():
    student = tiny_student("qwen3")
    stage = StageConfig(data="d", train=ALL, steps=1, lr=1e-3, weight_decay=0.3)
    apply_freeze(student, stage)
    names = {parameter: name for name, parameter in student.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"]
        for group in build_optimizer(student, stage).param_groups
        for parameter in group["params"]
    }
    assert set(decay) == set(names.values())
    for name, value in decay.items():
        matrix = name.endswith("_proj.weight") or name == "lm_head.weight"
        assert value == (0.3 if matrix else 0.0), name
    for word in ("A_log", "dt_bias", "q_conv1d.weight", "q_norm.weight", "embed_tokens.weight"):
        assert any(word in name for name in decay), word


def test_every_group_has_its_rate_and_frozen_tensors_have_none():
    student = tiny_student()
    stage = StageConfig(data="d", train=["mixer", "mlp"], steps=1, lr={"mixer": 6e-4, "mlp": 2e-4})
    apply_freeze(student, stage)
    optimizer = build_optimizer(student, stage)
    assert set_learning_rates(optimizer, 0.5) == {"mixer": 3e-4, "mlp": 1e-4}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4, 1e-4}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in student.parameters() if parameter.requires_grad}


def test_wsd_warms_up_stays_and_decays_linearly():
    schedule = ScheduleConfig(kind="wsd", warmup=0.1, decay=0.2, min_ratio=0.1)
    factors = [learning_rate_factor(schedule, step, 20) for step in range(20)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:16] == [1.0] * 14
    assert factors[16:] == pytest.approx([0.775, 0.55, 0.325, 0.1])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_cosine_and_linear_fall_from_the_peak_to_the_floor(kind):
    schedule = ScheduleConfig(kind=kind, warmup=0.2, min_ratio=0.05)
    factors = [learning_rate_factor(schedule, step, 50) for step in range(50)]
    assert max(factors) == factors[9] == 1.0
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.05)
    assert factors[29] == pytest.approx(0.525)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_short_stages_have_a_positive_rate_at_every_step(kind, num_steps):
    for warmup in (0.0, 0.5, 1.0):
        schedule = ScheduleConfig(kind=kind, warmup=warmup, decay=1 - warmup)
        factors = [learning_rate_factor(schedule, step, num_steps) for step in range(num_steps)]
        assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize(
    ("amx", "avx512", "mkldnn", "width", "expected"),
    [
        (True, False, True, 576, torch.bfloat16),
        (False, True, True, 576, torch.bfloat16),
        (False, False, True, 576, torch.float32),
        (True, True, False, 576, torch.float32),
        (True, True, True, 64, torch.float32),
    ],
)
def test_the_dtype_on_a_cpu_depends_on_its_units_and_the_width_alone(
    monkeypatch, amx, avx512, mkldnn, width, expected
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    monkeypatch.setattr("time.perf_counter", None)
    device = torch.device("cpu")
    assert choose_compute_dtype(device, width, seconds=1.0) == expected

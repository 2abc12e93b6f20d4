"""Adapters and packed moments on a GPU: as on the CPU, and nobody waits for the device."""

import pytest
import torch

from gendistill.anatomy.groups import ParamGroup
from gendistill.config.schema import StageConfig
from gendistill.testing import tiny_student
from gendistill.training.adamw8bit import AdamW8bit
from gendistill.training.adapters import insert_adapters, merge_adapters
from gendistill.training.freeze import apply_freeze

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merged_and_adapted_students_agree(family):
    pytest.importorskip("peft", reason="peft is not installed")
    student = tiny_student(family).cuda()
    config = StageConfig(
        data="d",
        steps=1,
        lr=1e-3,
        lora={"rank": 3, "groups": ["mixer", "attention", "mlp"], "only": [r"\.[qo]_proj\."]},
    )
    apply_freeze(student, config)
    insert_adapters(student, config)
    reference = tiny_student(family)
    apply_freeze(reference, config)
    insert_adapters(reference, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for (name, here), (_, there) in zip(
            student.named_parameters(), reference.named_parameters(), strict=True
        ):
            assert torch.equal(here.cpu(), there), name
            if ".lora_B." in name:
                here.normal_(std=0.3)
        ids = torch.arange(3, 43, device="cuda").view(2, 20)
        adapted = student(ids).logits
        merge_adapters(student)
        merged = student(ids).logits
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()


@pytest.fixture
def values():
    torch.manual_seed(0)
    shapes = [(512, 1024), (300, 77), (1024,)]
    return [torch.nn.Parameter(torch.randn(shape, device="cuda") * 0.1) for shape in shapes]


def make(values):
    groups = [{"params": values, "group": ParamGroup.MLP, "lr": 1e-3, "weight_decay": 0.1}]
    return AdamW8bit(groups, betas=(0.9, 0.95), eps=1e-8)


def test_packed_steps_are_close_to_those_of_adamw_and_a_bad_one_changes_nothing(values):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    theirs = [torch.nn.Parameter(value.detach().clone()) for value in values]
    start = [value.detach().clone() for value in values]
    packed = make(values)
    exact = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    packed.found_inf = torch.zeros((), device="cuda")
    for _ in range(20):
        for mine, other in zip(values, theirs, strict=True):
            mine.grad = torch.randn_like(mine) * 0.01
            other.grad = mine.grad.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        exact.step()
    for mine, other, first in zip(values, theirs, start, strict=True):
        assert (mine - other).norm() < 0.05 * (other - first).norm()
    before = [
        (value.detach().clone(), {key: one.clone() for key, one in packed.state[value].items()})
        for value in values
    ]
    packed.found_inf = torch.ones((), device="cuda")
    for value in values:
        value.grad.fill_(float("nan"))
    packed.step()
    for value, (weights, state) in zip(values, before, strict=True):
        assert torch.equal(value, weights)
        assert all(torch.equal(packed.state[value][key], one) for key, one in state.items())


def test_a_step_takes_the_memory_that_the_plan_names(values):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from gendistill.anatomy.moments import moment_bytes, work_bytes

    shapes = [tuple(value.shape) for value in values]
    torch.cuda.synchronize()
    empty = torch.cuda.memory_allocated()
    used = make(values)
    held = torch.cuda.memory_allocated() - empty
    planned = sum(moment_bytes("adamw8bit", ParamGroup.MLP, shape) for shape in shapes)
    assert planned <= held <= planned + 2**16
    for value in values:
        value.grad = torch.ones_like(value)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    used.step()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= work_bytes("adamw8bit", ParamGroup.MLP, shapes) + 2**20

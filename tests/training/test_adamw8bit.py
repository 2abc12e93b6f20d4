"""AdamW with packed moments: close to AdamW, exact where it claims to be, and without bitsandbytes a clear refusal."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gendistill.anatomy import moments
from gendistill.anatomy.groups import ParamGroup
from gendistill.anatomy.moments import BLOCK, moment_bytes
from gendistill.errors import CheckpointError, RecipeError
from gendistill.training import adamw8bit
from gendistill.training.adamw8bit import AdamW8bit, check_bitsandbytes
from gendistill.training.checkpoint import gather_tensors, load_checkpoint, save_checkpoint
from gendistill.training.parallel import Single

ALONE = Single(torch.device("cpu"))
CHECKPOINTS = Path("stages") / "tiny" / "checkpoints"


def fake_functional():
    """What is used of ``bitsandbytes.functional``; its codes too lie dense near the largest and reach far down."""

    def create_dynamic_map(*, signed):
        sizes = (27, 100) if signed else (56, 199)
        small, large = torch.logspace(-6, -2, sizes[0]), torch.linspace(0.01, 1, sizes[1] + 1)[1:]
        positive = torch.cat([torch.zeros(1), small, large])
        # as bitsandbytes has it, which has no code for -1
        return torch.cat([-0.993 * positive[1:].flip(0), positive]) if signed else positive

    def quantize_blockwise(values, *, code, blocksize):
        rows = values.view(-1, blocksize)
        absmax = rows.abs().amax(1)
        scaled = rows / absmax.clamp(min=1e-30)[:, None]
        codes = (scaled[..., None] - code).abs().argmin(-1).to(torch.uint8)
        return codes.flatten(), SimpleNamespace(absmax=absmax)

    def dequantize_blockwise(codes, *, absmax, code, blocksize):
        return (code[codes.int()].view(-1, blocksize) * absmax[:, None]).flatten()

    return SimpleNamespace(
        create_dynamic_map=create_dynamic_map,
        quantize_blockwise=quantize_blockwise,
        dequantize_blockwise=dequantize_blockwise,
    )


@pytest.fixture(params=["fake", "bitsandbytes"])
def backend(request, monkeypatch):
    """The real package where it is installed, and one of our own everywhere."""
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        return
    package = ModuleType("bitsandbytes")
    package.functional = fake_functional()
    package.__spec__ = importlib.util.spec_from_loader("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHAPES = {"wide": (70, 100), "odd": (41, 113), "small": (40, 100), "bias": (100,)}


def parameters(seed=0):
    torch.manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape) * 0.1) for name, shape in SHAPES.items()}


def optimizer(values, kind=AdamW8bit, *, group=ParamGroup.MLP, lr=1e-3, betas=(0.9, 0.95)):
    groups = [{"params": list(values.values()), "group": group, "lr": lr, "weight_decay": 0.1}]
    extra = {"fused": True} if kind is torch.optim.AdamW else {}
    return kind(groups, betas=betas, eps=1e-8, **extra)


def take_steps(values, used, steps, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for value in values.values():
            value.grad = torch.randn(value.shape, generator=generator) * 0.01
        used.step()


def snapshot(values, used):
    return {
        name: (value.detach().clone(), {key: one.clone() for key, one in used.state[value].items()})
        for name, value in values.items()
    }


def equal(one, other):
    return all(
        torch.equal(one[name][0], other[name][0])
        and one[name][1].keys() == other[name][1].keys()
        and all(torch.equal(value, other[name][1][key]) for key, value in one[name][1].items())
        for name in one
    )


def test_steps_are_close_to_those_of_adamw_and_equal_for_small_tensors(backend):
    mine, theirs, start = parameters(), parameters(), parameters()
    packed, exact = optimizer(mine), optimizer(theirs, torch.optim.AdamW)
    for seed in range(20):
        take_steps(mine, packed, 1, seed=seed)
        take_steps(theirs, exact, 1, seed=seed)
    for name in SHAPES:
        moved = (theirs[name] - start[name]).norm()
        assert moved > 0
        error = (mine[name] - theirs[name]).norm() / moved
        if name in ("small", "bias"):
            assert error == 0
        else:
            assert 0 < error < 0.05
            assert packed.state[mine[name]]["exp_avg"].dtype is torch.uint8


def test_embeddings_keep_float32_moments(backend):
    mine, theirs = parameters(), parameters()
    packed = optimizer(mine, group=ParamGroup.EMBED)
    exact = optimizer(theirs, torch.optim.AdamW, group=ParamGroup.EMBED)
    take_steps(mine, packed, 3)
    take_steps(theirs, exact, 3)
    assert all(torch.equal(mine[name], theirs[name]) for name in SHAPES)


def test_a_bad_step_changes_nothing(backend):
    values = parameters()
    used = optimizer(values)
    take_steps(values, used, 3)
    before = snapshot(values, used)
    for value in values.values():
        value.grad.fill_(math.nan)
    used.found_inf = torch.ones(())
    used.step()
    assert equal(before, snapshot(values, used))
    used.found_inf = torch.zeros(())
    take_steps(values, used, 1)
    assert not equal(before, snapshot(values, used))
    assert all(value.isfinite().all() for value in values.values())


def test_a_step_does_not_wait_for_the_device(backend, monkeypatch):
    values = parameters()
    used = optimizer(values)
    take_steps(values, used, 1)
    used.found_inf = torch.zeros(())
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waits"))
    for value in values.values():
        value.grad = torch.ones_like(value)
    # torch's fused optimizer on a CPU reads the step on the host; a GPU does not
    monkeypatch.setattr(adamw8bit, "adamw", lambda *_, **__: None)
    used.step()


@pytest.mark.parametrize("slab", [1, 7000, 2**24])
def test_slabs_are_no_part_of_the_result(backend, monkeypatch, slab):
    whole, split = parameters(), parameters()
    reference = optimizer(whole)
    monkeypatch.setattr(adamw8bit, "SLAB", slab)
    used = optimizer(split)
    take_steps(whole, reference, 3)
    take_steps(split, used, 3)
    assert equal(snapshot(whole, reference), snapshot(split, used))


def test_a_parameter_without_a_gradient_stays(backend):
    values = parameters()
    used = optimizer(values)
    take_steps(values, used, 2)
    before = snapshot(values, used)
    for name, value in values.items():
        value.grad = None if name == "odd" else torch.ones_like(value)
    used.step()
    after = snapshot(values, used)
    assert torch.equal(before["odd"][0], after["odd"][0])
    # packed again, moments would be rounded again
    assert before["odd"][1]["step"] == after["odd"][1]["step"] == 2
    assert all(torch.equal(value, after["odd"][1][key]) for key, value in before["odd"][1].items())
    assert not torch.equal(before["wide"][0], after["wide"][0])


def test_a_gradient_that_stops_does_not_throw_small_weights_away(backend):
    """The second moment of a small weight beside a large one is packed to zero before its first moment is."""
    values, rate = parameters(), 1e-3
    used = optimizer(values, lr=rate)
    for gradient in (torch.full((70, 100), 2e-5), torch.zeros(70, 100)):
        gradient[:, ::50] = 1.0 if gradient.any() else 0.0
        before = values["wide"].detach().clone()
        values["wide"].grad = gradient
        used.step()
    assert (values["wide"] - before).abs().max() < 2 * rate


def test_planned_bytes_are_those_of_the_state(backend):
    values = parameters()
    used = optimizer(values)
    for name, value in values.items():
        state = {key: one for key, one in used.state[value].items() if key != "step"}
        bytes_ = sum(one.numel() * one.element_size() for one in state.values())
        padding = 2 * (-value.numel() % BLOCK) if f"{name}" in ("wide", "odd") else 0
        assert moment_bytes("adamw8bit", ParamGroup.MLP, value.shape) == bytes_ + padding
        assert moment_bytes("adamw", ParamGroup.MLP, value.shape) == 8 * value.numel()


def test_a_checkpoint_restores_every_byte(backend, tmp_path):
    values, others = parameters(), parameters(seed=5)
    used, fresh = optimizer(values), optimizer(others)
    take_steps(values, used, 3)
    tensors = gather_tensors(values, used, ALONE)
    path = save_checkpoint(
        tmp_path, step=3, keep=1, tensors=tensors, state={"progress": PROGRESS, "stream": {}}
    )
    load_checkpoint(path, trained=others, optimizer=fresh, parallel=ALONE)
    assert equal(snapshot(values, used), snapshot(others, fresh))
    take_steps(values, used, 2, seed=9)
    take_steps(others, fresh, 2, seed=9)
    assert equal(snapshot(values, used), snapshot(others, fresh))


PROGRESS = {"step": 3, "tokens": 0, "seconds": 0.0, "loss_first": None, "loss_last": None, "window": []}


@pytest.mark.parametrize(
    ("saved", "loaded", "has_stepped"),
    [
        (torch.optim.AdamW, AdamW8bit, False),
        (AdamW8bit, torch.optim.AdamW, False),
        (AdamW8bit, torch.optim.AdamW, True),
    ],
)
def test_a_checkpoint_of_the_other_optimizer_is_refused_before_anything_is_changed(
    backend, tmp_path, saved, loaded, has_stepped
):
    values = parameters()
    before = optimizer(values, saved)
    take_steps(values, before, 1)
    tensors = gather_tensors(values, before, ALONE)
    path = save_checkpoint(
        tmp_path, step=3, keep=1, tensors=tensors, state={"progress": PROGRESS, "stream": {}}
    )
    others = parameters(seed=5)
    after = optimizer(others, loaded)
    if has_stepped:
        take_steps(others, after, 1)
    kept = snapshot(others, after)
    with pytest.raises(CheckpointError, match="another optimizer") as caught:
        load_checkpoint(path, trained=others, optimizer=after, parallel=ALONE)
    assert caught.value.where == str(path)
    assert equal(kept, snapshot(others, after))


def test_a_stage_resumes_to_the_same_bytes(backend, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "_FEWEST", 256)
    changes = {"optimizer": "adamw8bit", "save_every_steps": 2, "keep_checkpoints": 3, "lr": 1e-2}
    _, whole = tiny.run_stage(tmp_path / "whole", **changes)
    exact, _ = tiny.run_stage(tmp_path / "exact", lr=1e-2)
    resumed = tmp_path / "resumed"
    tiny.run_stage(resumed, **changes)
    for step in ("step-000004", "step-000006"):
        (resumed / CHECKPOINTS / step / "state.json").unlink()
    again, student = tiny.run_stage(resumed, **changes)
    assert tiny.rows(resumed) == tiny.rows(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name
    assert again.loss_last == pytest.approx(exact.loss_last, rel=0.02)
    assert again.loss_last != exact.loss_last
    with pytest.raises(CheckpointError, match="optimizer: adamw8bit -> "):
        tiny.run_stage(resumed, **{**changes, "optimizer": "adamw"})


def test_minutes_are_timed_with_the_stage_s_own_optimizer(backend, tiny, tmp_path):
    result, _ = tiny.run_stage(tmp_path, optimizer="adamw8bit", steps=None, minutes=0.1)
    assert result.steps > 1


def test_without_bitsandbytes_the_mend_is_named(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(adamw8bit.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="bitsandbytes, which is not installed") as caught:
        check_bitsandbytes("stages.distill.optimizer")
    assert caught.value.where == "stages.distill.optimizer"
    assert 'pip install "gendistill[adamw8bit]", or stages.distill.optimizer=adamw' in (
        caught.value.hint or ""
    )
    with pytest.raises(RecipeError, match="not installed"):
        tiny.run_stage(tmp_path, optimizer="adamw8bit")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes have trained with moments in 8 bits."""
    folder = tmp_path_factory.mktemp("packed")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("packed_run.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "codes.json").read_text()), done.stdout + done.stderr


@pytest.mark.parametrize("name", ["two", "resumed", "alone"])
def test_two_processes_keep_the_moments_that_one_would(tiny, shared, name):
    folder, codes, output = shared
    assert codes["one"] == codes[name] == 0, output[-3000:]
    one, two = tiny.rows(folder / "one"), tiny.rows(folder / name)
    assert len(one) == len(two) == 6
    for mine, theirs in zip(two, one, strict=True):
        # gradients are summed in another order, which moves single numbers to another code
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_packed_moments_are_the_same_bits_after_a_resume_on_two_processes(shared):
    folder, codes, output = shared
    assert codes["copy"] == 0, output[-3000:]
    for mine, theirs in (
        (folder / "copy" / "step-000004", folder / "two" / CHECKPOINTS / "step-000004"),
        (folder / "resumed" / CHECKPOINTS / "step-000006", folder / "two" / CHECKPOINTS / "step-000006"),
    ):
        found, wanted = (load_file(each / "optimizer.safetensors") for each in (mine, theirs))
        assert found.keys() == wanted.keys()
        assert any(value.dtype is torch.uint8 for value in found.values())
        for key, value in found.items():
            assert torch.equal(value, wanted[key]), key


def test_packed_moments_of_sharded_tensors_are_refused(shared):
    _, codes, output = shared
    assert codes["sharded"] == RecipeError.exit_code
    assert "adamw8bit packs the moments of whole tensors, and these are sharded" in output

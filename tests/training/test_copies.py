"""Whole copies of split parameters, on one process: what stands in the module, and where gradients end."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gendistill.config.engine import EngineConfig
from gendistill.engine.decoder import fuse, release
from gendistill.testing import tiny_student, tiny_teacher
from gendistill.training.parallel import copies as copies_of
from gendistill.training.parallel.copies import WholeCopies
from gendistill.training.parallel.fsdp2 import FullySharded


@pytest.fixture
def mesh(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def make(mesh):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    module[0].weight.requires_grad_(False)
    kept = {module[0].bias}
    copies = WholeCopies(
        module, kept=kept, dtype_of=lambda _: torch.bfloat16, mesh=mesh, device=torch.device("cpu")
    )
    copies.watch([module])
    return module, copies


def test_copies_stand_in_the_module_from_its_first_call_until_they_are_put_away(mesh):
    module, copies = make(mesh)
    part = module[1].weight
    assert isinstance(part, DTensor)
    assert not isinstance(module[0].bias, DTensor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.ones(2, 4))
    copy = module[1].weight
    assert copy.dtype == torch.bfloat16
    assert torch.equal(copy, part.to_local().bfloat16())
    copies.put_away()
    assert module[1].weight is part
    with torch.no_grad():
        part.to_local().add_(1.0)
    # what learns is copied anew, into the same memory
    copies.use()
    assert module[1].weight is copy
    assert torch.equal(copy, part.to_local().bfloat16())


def test_gradients_of_copies_add_up_without_rounding_and_end_in_the_parts(mesh):
    module, copies = make(mesh)
    part = module[1].weight
    found = []
    # bfloat16 would swallow the second one
    for scale in (1.0, 2.0**-12):
        copies.start()
        if scale < 1:
            copies.expect_gradients()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(torch.ones(2, 4)).float().sum() * scale
        copy = module[1].weight
        loss.backward()
        found.append(None if copy.grad is None else copy.grad.clone())
    # shared as soon as it was there
    assert found[1] is None
    copies.share_gradients()
    copies.put_away()
    assert torch.equal(part.grad.to_local(), found[0] * (1 + 2.0**-12))
    assert part.grad.to_local().dtype == torch.float32
    assert module[0].weight.grad is None
    copies.release()
    assert module[1].weight is part


def test_a_gradient_that_comes_after_it_was_shared_is_not_lost_in_silence(mesh):
    module, copies = make(mesh)
    copies.start()
    copies.expect_gradients()
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(torch.ones(2, 4)).float().sum().backward()
    with pytest.raises(RuntimeError, match="in two parts"):
        copies.share_gradients()


def test_fused_layers_see_that_copies_have_new_numbers(mesh):
    """Also where no optimizer has taken a step in between: a stage that goes back to a checkpoint."""
    student = tiny_student(seed=0, num_hidden_layers=2, mixers=["kda", "full"])
    copies = WholeCopies(
        student, kept=set(), dtype_of=lambda _: torch.float32, mesh=mesh, device=torch.device("cpu")
    )
    copies.use()
    fuse(student, torch.bfloat16, learns=False)
    fused = student.model._fused_decoder
    fused.refresh()
    copies.put_away()
    part = student.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        part.to_local().fill_(3.0)
    copies.use()
    fused.refresh()
    assert fused.packed[-1].matrix.eq(3.0).all()
    release(student)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_whole_copy_is_there_twice_only_while_it_is_awaited_beside_other_work(mesh, monkeypatch, ahead):
    monkeypatch.setattr(copies_of, "_BUCKET_BYTES", 1)
    flying, most = set(), []

    def gather(bucket, work=copies_of._Bucket.gather):
        flying.add(bucket)
        most.append(len(flying))
        return work(bucket)

    def spread(bucket, gathered, work=copies_of._Bucket.spread):
        flying.remove(bucket)
        work(bucket, gathered)

    monkeypatch.setattr(copies_of._Bucket, "gather", gather)
    monkeypatch.setattr(copies_of._Bucket, "spread", spread)
    module = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    copies = WholeCopies(
        module, kept=set(), dtype_of=lambda _: torch.float32, mesh=mesh, device=torch.device("cpu")
    )
    if ahead:
        copies.start()
    copies.use()
    assert len(most) == 8
    assert max(most) == (8 if ahead else 2)
    assert not flying
    for linear in module:
        assert torch.equal(linear.weight, copies._split[2 * list(module).index(linear)].local)


def test_a_pass_with_a_teacher_in_parts_is_not_captured_whoever_split_it(mesh):
    def stage(engine):
        process = object.__new__(FullySharded)
        process.engine, process.device, process.world = engine, torch.device("cpu"), 1
        process._mesh, process._teacher_is_split, process._copies = mesh, False, object()
        return process

    teacher = tiny_teacher(seed=4, num_hidden_layers=2)
    engine = EngineConfig(parallel="fsdp2", reshard="always")
    for _ in range(2):
        process = stage(engine)
        process.place_teacher(teacher)
        assert not process.captures
    whole = stage(EngineConfig(parallel="fsdp2", reshard="step"))
    whole.place_teacher(tiny_teacher(seed=4, num_hidden_layers=2))
    assert whole.captures

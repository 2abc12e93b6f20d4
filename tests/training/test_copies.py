"""Whole copies of split parameters, on one process: what stands in the module, and where gradients end."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gendistill.training.parallel.copies import WholeCopies


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

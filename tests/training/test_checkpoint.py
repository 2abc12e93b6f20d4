"""Checkpoints on a disk that is full, and for a student that is another."""

import pytest
import torch
from safetensors import SafetensorError

from gendistill.config.schema import StageConfig
from gendistill.errors import CheckpointError, OutputError
from gendistill.training import checkpoint
from gendistill.training.checkpoint import (
    checksums,
    find_checkpoint,
    gather_tensors,
    load_checkpoint,
    save_checkpoint,
    trained_parameters,
)
from gendistill.training.freeze import apply_freeze
from gendistill.training.optim import build_optimizer
from gendistill.training.parallel import Single

ALONE = Single(torch.device("cpu"))


@pytest.fixture
def trained(tiny):
    """A student and its optimizer after one step."""
    return make(tiny, ["mixer", "norm"])


def make(tiny, groups, seed=3):
    student = tiny.make_student(seed)
    stage = StageConfig(data="d", train=groups, steps=1, lr=1e-2)
    apply_freeze(student, stage)
    optimizer = build_optimizer(student, stage)
    student(torch.arange(10)[None]).logits.square().mean().backward()
    optimizer.step()
    return student, optimizer


def save(folder, student, optimizer, **changes):
    settings = {"step": 5, "keep": 1, "state": {"stream": {"row": 3}}, **changes}
    return save_checkpoint(
        folder, tensors=gather_tensors(trained_parameters(student), optimizer, ALONE), **settings
    )


def test_what_is_loaded_is_what_was_saved(tiny, trained, tmp_path):
    student, optimizer = trained
    path = save(tmp_path, student, optimizer)
    other, other_optimizer = make(tiny, ["mixer", "norm"], seed=9)
    state = load_checkpoint(
        path, trained=trained_parameters(other), optimizer=other_optimizer, parallel=ALONE
    )
    assert (state["step"], state["stream"]) == (5, {"row": 3})
    mine, theirs = dict(student.named_parameters()), dict(other.named_parameters())
    for name, value in mine.items():
        if value.requires_grad:
            assert torch.equal(value, theirs[name]), name
            for key, moment in optimizer.state[value].items():
                assert torch.equal(moment, other_optimizer.state[theirs[name]][key])


def test_a_full_disk_is_an_output_error_and_keeps_the_old_checkpoint(trained, tmp_path, monkeypatch):
    old = save(tmp_path, *trained)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError(
            'I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
        )

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OutputError, match="disk is full"):
        save(tmp_path, *trained, step=6)
    assert list(tmp_path.iterdir()) == [old]
    assert find_checkpoint(tmp_path, pytest.fail) == old


def test_a_checkpoint_of_other_parameters_is_refused(tiny, trained, tmp_path):
    path = save(tmp_path, *trained)
    student, optimizer = make(tiny, ["mixer"])
    with pytest.raises(CheckpointError, match="other parameters"):
        load_checkpoint(path, trained=trained_parameters(student), optimizer=optimizer, parallel=ALONE)


def test_rotation_keeps_the_newest_and_drops_what_was_damaged_ahead(trained, tmp_path):
    for step in (1, 2, 3, 9):
        save(tmp_path, *trained, step=step, keep=5)
    save(tmp_path, *trained, step=4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_checksums_see_a_single_bit():
    module = torch.nn.Linear(7, 5)
    before = checksums(module.named_parameters())
    module.weight.data.view(torch.int32)[3, 3] ^= 1
    after = checksums(module.named_parameters())
    assert after["weight"] != before["weight"]
    assert after["bias"] == before["bias"]

"""A checkpoint that is not what was written is passed over with a reason, or refused; it never breaks a resume."""

import json
import math
import os
import random
import subprocess
import sys
import zlib
from dataclasses import replace
from io import StringIO

import pytest
import torch
from safetensors.torch import load_file, save_file

from gendistill.config.schema import StageConfig
from gendistill.errors import CheckpointError, OutputError, TrainingError
from gendistill.training.checkpoint import (
    find_checkpoint,
    gather_tensors,
    load_checkpoint,
    save_checkpoint,
    trained_parameters,
)
from gendistill.training.freeze import apply_freeze
from gendistill.training.lock import existing_lock
from gendistill.training.meter import Meter
from gendistill.training.monitors import heldout as monitors
from gendistill.training.optim import build_optimizer
from gendistill.training.parallel import Single

PROGRESS = {"step": 5, "tokens": 9, "seconds": 1.5, "loss_first": 2.0, "loss_last": 1, "window": [1.0, 2.0]}
ALONE = Single(torch.device("cpu"))
FILES = ("trained.safetensors", "optimizer.safetensors")


def make(tiny, seed=3):
    student = tiny.make_student(seed)
    stage = StageConfig(data="d", train=["mixer", "norm"], steps=1, lr=1e-2)
    apply_freeze(student, stage)
    optimizer = build_optimizer(student, stage)
    student(torch.arange(10)[None]).logits.square().mean().backward()
    optimizer.step()
    return student, optimizer


@pytest.fixture(scope="module")
def trained(tiny):
    """A student and its optimizer after one step."""
    return make(tiny)


@pytest.fixture
def folder(trained, tmp_path):
    """Two checkpoints, of steps 4 and 5; tests break the newer one."""
    for step in (4, 5):
        save(tmp_path, trained, step)
    return tmp_path


def save(folder, trained, step, **changes):
    state = {"progress": {**PROGRESS, "step": step}, "stream": {"row": step}, **changes}
    student, optimizer = trained
    return save_checkpoint(
        folder,
        step=step,
        keep=9,
        tensors=gather_tensors(trained_parameters(student), optimizer, ALONE),
        state=state,
    )


def newest(folder):
    said = []
    found = find_checkpoint(folder, said.append)
    return found.name if found else None, said


def passed_over(folder, *words):
    found, said = newest(folder)
    assert found == "step-000004"
    assert len(said) == 1
    assert "step-000005" in said[0]
    for word in words:
        assert word in said[0]


def rewrite_state(folder, change, *, checksum):
    """Change ``state.json``; without its checksum it looks like one of an older version."""
    path = folder / "step-000005/state.json"
    content = json.loads(path.read_text())
    change(content)
    if not checksum and isinstance(content, dict):
        content.pop("crc32", None)
    path.write_text(json.dumps(content))


def rewrite_tensors(folder, name, change):
    """Change the tensors of a checkpoint as a program would that also writes the file's new checksum."""
    path = folder / "step-000005" / name
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    entry = {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
    rewrite_state(folder, lambda content: content["files"].update({name: entry}), checksum=False)


def test_whole_checkpoints_are_found_with_and_without_a_checksum_of_the_state(folder, trained):
    assert newest(folder) == ("step-000005", [])
    rewrite_state(folder, lambda content: None, checksum=False)
    assert newest(folder) == ("step-000005", [])
    state = load_checkpoint(
        folder / "step-000005", trained=trained_parameters(trained[0]), optimizer=trained[1], parallel=ALONE
    )
    assert (state["progress"], state["stream"]) == (PROGRESS, {"row": 5})


STATES = {
    "files a list": lambda content: content.update(files=list(FILES)),
    "files empty": lambda content: content.update(files={}),
    "files of one": lambda content: content["files"].pop(FILES[0]),
    "file entry text": lambda content: content["files"].update({FILES[0]: "ok"}),
    "file size text": lambda content: content["files"][FILES[0]].update(bytes="9"),
    "no files": lambda content: content.pop("files"),
    "step text": lambda content: content.update(step="5"),
    "step bool": lambda content: content.update(step=True),
    "step other": lambda content: content.update(step=6),
    "step negative": lambda content: content.update(step=-5),
    "no step": lambda content: content.pop("step"),
    "progress list": lambda content: content.update(progress=[1]),
    "progress null": lambda content: content.update(progress=None),
    "no progress": lambda content: content.pop("progress"),
    "progress lacks a key": lambda content: content["progress"].pop("tokens"),
    "progress has more": lambda content: content["progress"].update(extra=1),
    "progress step": lambda content: content["progress"].update(step=4),
    "progress text": lambda content: content["progress"].update(tokens="9"),
    "progress huge": lambda content: content["progress"].update(tokens=10**400),
    "progress nan": lambda content: content["progress"].update(seconds=math.nan),
    "window text": lambda content: content["progress"].update(window=["1"]),
    "window number": lambda content: content["progress"].update(window=3),
    "stream list": lambda content: content.update(stream=[]),
    "stream null": lambda content: content.update(stream=None),
    "no stream": lambda content: content.pop("stream"),
}


@pytest.mark.parametrize("checksum", [True, False], ids=["checksum", "older"])
@pytest.mark.parametrize("change", STATES.values(), ids=STATES.keys())
def test_a_changed_state_is_passed_over(folder, change, checksum):
    rewrite_state(folder, change, checksum=checksum)
    passed_over(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["stream"].update(row="five"),
        lambda content: content["stream"].pop("row"),
        lambda content: content["progress"].update(loss_last=1.25),
        lambda content: content.update(crc32=content["crc32"] ^ 1),
        lambda content: content.update(more=1),
    ],
)
def test_a_state_is_held_to_its_checksum(folder, change):
    rewrite_state(folder, change, checksum=True)
    passed_over(folder, "state.json is damaged")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", '"x"', "[" * 100_000, "\x00", "{}", '{"step": 5}'], ids=range(10)
)
def test_a_state_that_is_something_else_is_passed_over(folder, text):
    (folder / "step-000005/state.json").write_text(text)
    passed_over(folder, "state.json cannot be read")


def spoil(value):
    return lambda tensors: tensors[next(iter(tensors))].view(-1).__setitem__(0, value)


def retype(dtype):
    return lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()})


TENSORS = {
    "nan": spoil(math.nan),
    "inf": spoil(-math.inf),
    "bfloat16": retype(torch.bfloat16),
    "float64": retype(torch.float64),
    "int": retype(torch.int32),
    "renamed": lambda tensors: tensors.update(other=tensors.pop(next(iter(tensors)))),
    "one missing": lambda tensors: tensors.pop(next(iter(tensors))),
    "one more": lambda tensors: tensors.update(more=torch.zeros(2)),
    "empty": lambda tensors: tensors.clear(),
    "flat": lambda tensors: tensors.update({name: value.reshape(1, -1) for name, value in tensors.items()}),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_save_never_writes_are_passed_over_and_refused(folder, trained, name, change):
    rewrite_tensors(folder, name, change)
    passed_over(folder, "safetensors")
    student, optimizer = trained
    before = {key: value.clone() for key, value in student.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(
            folder / "step-000005", trained=trained_parameters(student), optimizer=optimizer, parallel=ALONE
        )
    assert caught.value.where == str(folder / "step-000005")
    assert caught.value.hint
    assert all(torch.equal(value, before[key]) for key, value in student.named_parameters())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_files_that_are_no_safetensors_are_passed_over(folder, name, content):
    path = folder / "step-000005" / name
    path.write_bytes(content)
    entry = {"bytes": len(content), "crc32": zlib.crc32(content)}
    rewrite_state(folder, lambda state: state["files"].update({name: entry}), checksum=False)
    passed_over(folder, "cannot be read")


def as_file(path):
    path.write_text("a file")


def as_empty_folder(path):
    path.mkdir()


def as_dangling_link(path):
    path.symlink_to("nowhere")


def as_loop(path):
    path.symlink_to(path.name)


def as_link_to_another_step(path):
    path.symlink_to("step-000004")


def as_folders_in_the_files_places(path):
    for name in (*FILES, "state.json"):
        (path / name).mkdir(parents=True)


@pytest.mark.parametrize(
    "put",
    [
        as_file,
        as_empty_folder,
        as_dangling_link,
        as_loop,
        as_link_to_another_step,
        as_folders_in_the_files_places,
    ],
)
@pytest.mark.parametrize("name", ["step-000005", "step-7", "step-999999999999999999999", "step-" + "9" * 200])
def test_what_is_not_a_checkpoint_is_passed_over_and_replaced(folder, trained, put, name):
    for path in (folder / "step-000005").iterdir():
        path.unlink()
    (folder / "step-000005").rmdir()
    put(folder / name)
    found, said = newest(folder)
    assert found == "step-000004"
    assert [name in line for line in said] == [True]
    save(folder, trained, 5)
    assert newest(folder) == ("step-000005", [])
    assert [path.name for path in folder.glob("step-*")].count(name) == (name == "step-000005")


@pytest.mark.parametrize(
    "name", ["step-", "step-x", "step--5", "step-5.bak", "Step-5", "step-\u0665", "notes.txt"]
)
def test_other_names_are_none_of_ours(folder, trained, name):
    (folder / name).mkdir()
    assert newest(folder) == ("step-000005", [])
    save(folder, trained, 6)
    assert (folder / name).is_dir()


def test_a_linked_folder_of_checkpoints_is_followed(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "checkpoints"
    link.symlink_to(folder)
    assert newest(link) == ("step-000005", [])


def test_a_file_in_the_place_of_the_checkpoints_is_an_output_error(trained, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    assert newest(tmp_path / "checkpoints") == (None, [])
    with pytest.raises(OutputError):
        save(tmp_path / "checkpoints", trained, 1)


def test_remains_are_removed_unless_their_process_still_runs(folder):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        kept = [f".step-000009.{other.pid}.partial", f".step-000009.{other.pid}.old"]
        gone = [
            f".step-000009.{os.getpid()}.partial",
            ".step-000005.99999999.old",
            f".step-000009.{10**18}.partial",
        ]
        for name in kept + gone:
            (folder / name).mkdir()
        (folder / ".step-000004.99999999.old").write_text("a file")
        (folder / ".step-000004.99999998.old").symlink_to("step-000004")
        assert newest(folder) == ("step-000005", [])
        assert sorted(path.name for path in folder.glob(".step*")) == sorted(kept)
        # what another process moved aside is put back once that process is gone: here it was nothing
        (folder / kept[1]).rmdir()
        other.communicate(b"\n")
    assert newest(folder) == ("step-000005", [])
    assert list(folder.glob(".step*")) == []


def test_a_folder_that_cannot_be_listed_is_an_error_with_a_next_step(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(folder), "iterdir", refuse)
    with pytest.raises(CheckpointError, match="cannot list") as caught:
        newest(folder)
    assert caught.value.hint


def test_a_parameter_that_no_gradient_has_reached_is_saved_and_restored(tiny, tmp_path):
    student, optimizer = make(tiny)
    name, untouched = next(each for each in student.named_parameters() if each[1].requires_grad)
    del optimizer.state[untouched]
    path = save(tmp_path, (student, optimizer), 5)
    assert newest(tmp_path) == ("step-000005", [])
    other, other_optimizer = make(tiny, seed=9)
    load_checkpoint(path, trained=trained_parameters(other), optimizer=other_optimizer, parallel=ALONE)
    restored = other_optimizer.state[dict(other.named_parameters())[name]]
    assert restored["step"] == 0
    assert not restored["exp_avg"].any()


def test_random_changes_of_the_state_never_break_a_search(folder):
    """Whatever is in the file: the checkpoint is as it was, or passed over."""
    path, chance = folder / "step-000005/state.json", random.Random(7)
    whole = path.read_text()
    values = [None, True, -1, 0, 1.5, 10**30, "", "x", [], {}, math.nan, [[]], {"a": 1}]
    for _ in range(60):
        content = json.loads(whole)
        parent = content
        while True:
            key = chance.choice(sorted(parent)) if isinstance(parent, dict) else chance.randrange(len(parent))
            if not parent[key] or not isinstance(parent[key], dict | list) or chance.random() < 0.3:
                break
            parent = parent[key]
        old, parent[key] = parent[key], chance.choice(values)
        path.write_text(json.dumps(content))
        found, said = newest(folder)
        same = parent[key] == old and type(parent[key]) is type(old)
        assert (found, len(said)) == (("step-000005", 0) if same else ("step-000004", 1)), content


def test_a_window_of_other_losses_is_refused():
    with pytest.raises(CheckpointError, match="3 sums, this stage's loss has 2"):
        Meter(1, torch.device("cpu"), window=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "4"},
        {"steps": True},
        {"steps": 0},
        {"compute_dtype": "int8"},
        {"compute_dtype": None},
        {"seconds_per_step": "1"},
        {"locked": []},
        {"locked": "all"},
        {"more": 1},
    ],
)
def test_a_plan_of_other_types_is_refused_only_if_there_is_something_to_lose(tmp_path, change):
    path = tmp_path / "plan.json"
    plan = {"steps": 4, "compute_dtype": "float32", "seconds_per_step": None, "locked": {"seed": 1}}
    path.write_text(json.dumps(plan))
    assert existing_lock(path, {"seed": 1}, tmp_path).steps == 4
    path.write_text(json.dumps({**plan, **change}))
    assert existing_lock(path, {"seed": 1}, None) is None
    with pytest.raises(CheckpointError, match="cannot read the stage's plan") as caught:
        existing_lock(path, {"seed": 1}, tmp_path)
    assert caught.value.where == str(path)


def test_a_stage_resumes_beside_broken_metrics_and_a_broken_checkpoint(tiny, tmp_path):
    changes = {"steps": 3, "save_every_steps": 1, "keep_checkpoints": 3}
    tiny.run_stage(tmp_path, **changes)
    whole = tiny.rows(tmp_path)
    stage = tmp_path / "stages/tiny"
    text = (stage / "metrics.jsonl").read_text()
    (stage / "metrics.jsonl").write_bytes(b'\xff\x00\n{"step": "1"}\n' + text.encode())
    (stage / "checkpoints/step-000003/state.json").write_text('{"step": 3, "files": []}')
    out = StringIO()
    tiny.run_stage(tmp_path, out=out, **changes)
    assert tiny.rows(tmp_path) == whole
    assert "2 lines cannot be read, moved to metrics.jsonl.broken" in out.getvalue()
    assert "step-000003: state.json cannot be read" in out.getvalue()
    assert (stage / "metrics.jsonl.broken").read_bytes() == b'\xff\x00\n{"step": "1"}\n'


def test_heldout_scores_that_are_not_finite_stop_the_stage_by_name(tiny, tmp_path, monkeypatch):
    real = monitors.measure_heldout

    def broken(*args, **more):
        measured = real(*args, **more)
        return replace(measured, scores={**measured.scores, "kl": math.nan})

    monkeypatch.setattr(monitors, "measure_heldout", broken)
    with pytest.raises(TrainingError, match="held-out kl is not finite at step 1 of 1") as caught:
        tiny.run_stage(tmp_path, steps=1)
    assert caught.value.hint
    assert not (tmp_path / "stages/tiny/result.json").exists()

"""What a run folder shows: finished work stays until other work has finished, and damage is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gendistill import pipeline
from gendistill.errors import OutputError, TrainingError
from gendistill.paths import RunDir, read_json
from gendistill.text import printable


def listing(run: RunDir) -> dict[str, bytes | str]:
    """Everything that a run folder shows: where links lead, what files hold. Locks and the report are left out."""
    shown: dict[str, bytes | str] = {}
    for path in sorted(run.root.rglob("*")):
        name = path.relative_to(run.root).as_posix()
        if path.is_symlink():
            shown[name] = str(path.readlink())
        elif path.is_file() and not name.startswith((".", "report")):
            shown[name] = path.read_bytes()
    return shown


def weights(run: RunDir) -> bytes:
    return (run.student / "model.safetensors").read_bytes()


def fail(*_, **__):
    raise TrainingError("this stage cannot be trained", where="stages.distill")


def test_a_command_that_fails_changes_nothing_that_is_finished(shared_place, monkeypatch):
    run = shared_place.run()
    before = listing(run)
    monkeypatch.setattr(pipeline, "train_stage", fail)
    with pytest.raises(TrainingError):
        shared_place.run("stages.distill.lr=9e-4", "stages.distill.log_every_steps=2")
    assert listing(run) == before
    monkeypatch.undo()
    with pytest.raises(Exception, match="nowhere"):
        shared_place.run("teacher.model=./nowhere")
    assert listing(run) == before


def test_another_recipe_and_the_first_one_again_each_end_as_in_a_folder_of_their_own(place, monkeypatch):
    other = ("stages.distill.lr=9e-4", "stages.block=null")
    alone = {name: place.run(*changes, name=name) for name, changes in (("a", ()), ("b", other))}
    a, b = (weights(alone[name]) for name in ("a", "b"))
    assert a != b
    both = place.run(name="both")
    # the second recipe stops half way; the folder still shows the first
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_stage", fail)
        with pytest.raises(TrainingError):
            place.run("stages.distill.lr=8e-4", name="both")
    assert weights(both) == a
    place.run(*other, name="both")
    assert weights(both) == b
    assert sorted(path.name for path in (both.root / "stages").iterdir()) == ["distill"]
    assert "block" not in both.recipe.read_text().split("stages:")[1].split("eval:")[0]
    place.run(name="both")
    assert weights(both) == a
    assert {path.name for path in (both.root / "stages").iterdir()} == {"block", "distill"}
    for name in ("plan.json", "probe.json"):
        assert (both.root / "convert" / name).read_bytes() == (
            alone["a"].root / "convert" / name
        ).read_bytes()


def test_two_processes_in_one_folder_the_second_is_refused(place):
    run = RunDir(place.root / "runs" / "tiny")
    hold = (
        "import sys\n"
        "from gendistill.config.load import load_recipe\n"
        "from gendistill.runs.workspace import Workspace\n"
        f"recipe = load_recipe('tiny', ['output={place.root / 'runs'}'])\n"
        "with Workspace(recipe, say=print).locked():\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(OutputError, match=rf"another process works in .* \(process {other.pid} on "):
        place.run()
    assert not run.manifest.exists()
    other.kill()
    other.communicate()
    assert place.run().manifest.is_file()


DAMAGE = {
    "convert/probe.json": "convert: probe.json",
    "student-init/model.safetensors": "convert: student/model.safetensors",
    "stages/block/student/model.safetensors": "stage block: student/model.safetensors",
    "stages/distill/student/config.json": "stage distill: student/config.json",
    "eval/student/samples.jsonl": "eval student: samples.jsonl",
    "eval/teacher/results.json": "eval teacher: results.json",
}


@pytest.mark.parametrize("how", ["deleted", "damaged"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_deleted_or_damaged_output_is_noticed_and_made_anew(shared_place, capsys, name, how):
    run = shared_place.run()
    before, keys = weights(run), read_json(run.manifest)["steps"]
    path = run.root / name
    if how == "deleted":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    capsys.readouterr()
    again = shared_place.run()
    said = capsys.readouterr().out
    assert f"{DAMAGE[name]} is {'missing' if how == 'deleted' else 'damaged'}" in said
    assert "made again" in said
    assert path.is_file()
    assert weights(again) == before
    assert read_json(run.manifest)["steps"] == keys
    assert any(DAMAGE[name] in warning for warning in read_json(run.manifest)["warnings"])


def test_the_story_of_a_stage_is_not_worth_training_again(shared_place, capsys, monkeypatch):
    run = shared_place.run()
    result = (run.stage("distill") / "result.json").read_bytes()
    (run.stage("distill") / "metrics.jsonl").unlink()
    (run.stage("distill") / "result.json").write_text("{}")
    monkeypatch.setattr(pipeline, "train_stage", fail)
    shared_place.run()
    assert "metrics.jsonl is missing since it finished; the report goes without" in capsys.readouterr().out
    assert (run.stage("distill") / "result.json").read_bytes() == result


def test_touched_and_copied_files_are_not_damage(shared_place, tmp_path, monkeypatch):
    run = shared_place.run()
    weights_file = run.stage("block") / "student" / "model.safetensors"
    content = weights_file.read_bytes()
    weights_file.unlink()
    weights_file.write_bytes(content)
    monkeypatch.setattr(pipeline, "train_stage", fail)
    assert shared_place.run().root == run.root


def test_a_student_that_was_edited_or_removed_is_shown_again(shared_place, monkeypatch):
    run = shared_place.run()
    before = listing(run)
    monkeypatch.setattr(pipeline, "train_stage", fail)
    (run.student / "config.json").write_text("{}")
    (run.student / "model.safetensors").unlink()
    shared_place.run()
    assert {**listing(run), "manifest.json": b""} == {**before, "manifest.json": b""}


def test_run_folders_can_be_moved_together(shared_place, tmp_path):
    run = shared_place.run()
    moved = tmp_path / "elsewhere"
    Path(run.root.parent).rename(moved)
    try:
        assert (
            json.loads((moved / "tiny" / "stages" / "block" / "result.json").read_text())["stage"] == "block"
        )
        assert load_file(moved / "tiny" / "student-init" / "model.safetensors")
    finally:
        moved.rename(run.root.parent)


def test_a_folder_where_a_link_belongs_is_not_removed(place):
    mine = place.root / "runs" / "tiny" / "stages" / "block"
    mine.mkdir(parents=True)
    (mine / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="is a folder, where a link to a step belongs"):
        place.run()
    assert (mine / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b'{"steps": 3}', b'{"steps": {}, "complete": "yes"}']
)
def test_a_broken_manifest_is_written_anew(shared_place, content):
    run = shared_place.run()
    good = read_json(run.manifest)
    run.manifest.write_bytes(content)
    shared_place.run()
    assert read_json(run.manifest)["steps"] == good["steps"]


@pytest.mark.parametrize(
    "changes",
    [
        {"found": {"warnings": 3}},
        {"found": {"warnings": [3]}},
        {"found": {"warnings": "x"}},
        {"found": {"result": []}},
        {"inputs": {"data": []}},
        {"inputs": {"data": {"text": 3}}},
        {"inputs": {"data": {"text": {"content": [1]}}}},
    ],
    ids=str,
)
def test_a_record_of_another_shape_is_a_step_to_be_made(shared_place, changes):
    run = shared_place.run()
    before = weights(run)
    path = run.root / "convert" / "step.json"
    path.write_text(json.dumps({**read_json(path), **changes}))
    shared_place.run()
    assert weights(run) == before
    assert "warnings" in read_json(path)["found"]


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null", "..", "nowhere", "pipe"])
@pytest.mark.parametrize(
    "name", ["convert/step.json", "stages/block/step.json", "recipe.yaml", "manifest.json"]
)
def test_what_is_no_file_in_place_of_one_is_made_anew(shared_place, name, target):
    run = shared_place.run()
    before = weights(run)
    path = run.root / name
    path.unlink()
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    shared_place.run()
    assert weights(run) == before
    assert path.is_file()
    assert not path.is_symlink()


@pytest.mark.parametrize("name", ["\x1b[31m", "\udcff", "a\nb", "\x9b", "[/]", "../../x", "/dev/zero", "\0"])
def test_odd_names_in_a_record_are_damage_that_is_said_in_letters(shared_place, capsys, name):
    run = shared_place.run()
    before = weights(run)
    path = run.root / "convert" / "step.json"
    record = read_json(path)
    record["files"][name] = {"stat": [1, 2, 3, 4], "crc32": 5}
    path.write_text(json.dumps(record))
    capsys.readouterr()
    shared_place.run()
    assert weights(run) == before
    lines = capsys.readouterr().out.split("\n")
    assert [printable(line, longest=10_000) for line in lines] == lines
    assert any("since it finished" in line for line in lines)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"step": 1, "inputs": [], "found": 0}'])
def test_a_broken_record_is_a_step_to_be_made(shared_place, content):
    run = shared_place.run()
    (run.root / "convert" / "step.json").write_bytes(content)
    before = weights(run)
    shared_place.run()
    assert weights(run) == before
    assert read_json(run.root / "convert" / "step.json")["step"] == "convert"

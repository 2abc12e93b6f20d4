"""Run folders and their store, with steps that take no work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from gendistill.errors import OutputError
from gendistill.runs.store import Store
from gendistill.runs.workspace import PENDING, Workspace

FAKE = run_path(str(Path(__file__).with_name("fake_runs.py")))
NAMES, HOLD, Killed, Run = (FAKE[name] for name in ("NAMES", "HOLD", "Killed", "Run"))
look, recipe_of, steps_of = (FAKE[name] for name in ("look", "recipe_of", "steps_of"))


def test_nothing_is_made_twice_and_each_recipe_finds_its_work_again(tmp_path):
    a = Run(tmp_path)
    first = look(a.run)
    assert tuple(a.made) == NAMES
    assert not Run(tmp_path).made
    b = Run(tmp_path, "stages.distill.lr=9e-4", distill=1)
    assert b.made == ["stage distill"]
    assert look(b.run) != first
    assert not Run(tmp_path).made
    assert look(a.run) == first
    assert not Run(tmp_path, "name=other", distill=1).made


@pytest.mark.parametrize("stop", NAMES)
def test_a_finished_run_is_shown_until_the_next_has_finished(tmp_path, stop):
    a = Run(tmp_path)
    first, manifest = look(a.run), a.run.manifest.read_bytes()
    other = {"convert": 1, "block": 1, "distill": 1, "teacher": 1, "student": 1}
    with pytest.raises(Killed):
        Run(tmp_path, "seed=3", stop=stop, **other)
    assert look(a.run) == first
    assert a.run.manifest.read_bytes() == manifest
    assert not Run(tmp_path).made
    with pytest.raises(Killed):
        Run(tmp_path, "seed=3", stop=stop, **other)
    b = Run(tmp_path, "seed=3", **other)
    assert b.made == list(NAMES[NAMES.index(stop) :])
    assert look(b.run) == look(Run(tmp_path, "seed=3", "name=alone", **other).run) | {
        "recipe.yaml": b.run.recipe.read_text()
    }
    assert not (b.run.root / PENDING).exists()


def test_what_a_failed_command_made_is_said_to_be_of_use(tmp_path):
    Run(tmp_path)
    with pytest.raises(Killed):
        Run(tmp_path, "seed=3", stop="stage distill", block=1)
    pending = json.loads((tmp_path / "tiny" / PENDING).read_text())
    assert pending == [step.slug for step in steps_of(block=1)]


DAMAGED = {
    "convert/student/config.json": ["convert"],
    "stages/block/student/model.safetensors": ["stage block"],
    "stages/distill/step.json": ["stage distill"],
    "eval/student/result.json": ["eval student"],
    "stages/distill/result.json": [],
    "stages/distill/metrics.jsonl": [],
    "student/model.safetensors": [],
    "student/config.json": [],
}


@pytest.mark.parametrize("how", ["deleted", "changed", "emptied"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_redoes_one_step_and_changes_nothing_else(tmp_path, name, how):
    a = Run(tmp_path)
    first, path = look(a.run), a.run.root / name
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "emptied" else b"x" + path.read_bytes()[1:])
    again = Run(tmp_path)
    assert again.made == DAMAGED[name]
    if name != "stages/distill/metrics.jsonl":
        assert look(a.run) == first
        assert not Run(tmp_path).said
    if DAMAGED[name] and not (path.name == "step.json" and how == "deleted"):
        assert any(f"{Path(name).name} is " in line and "made again" in line for line in again.said)


def test_what_people_do_with_the_student_reaches_no_step(tmp_path):
    one, other = Run(tmp_path), Run(tmp_path, "name=other")
    for name in ("model.safetensors", "config.json"):
        with (one.run.student / name).open("r+b") as file:
            file.write(b"mine")
        assert not (one.run.stage("distill") / "student" / name).read_bytes().startswith(b"mine")
        assert not (other.run.student / name).read_bytes().startswith(b"mine")


def test_damage_is_not_removed_by_asking(tmp_path):
    a = Run(tmp_path)
    weights = a.run.stage("distill") / "student" / "model.safetensors"
    (a.run.stage("distill") / "student" / "config.json").unlink()
    shown = Workspace(recipe_of(tmp_path), say=lambda *_: None)
    with shown.locked():
        shown.plan(steps_of())
        shown.sync()
        assert not shown.is_done("stage distill")
    assert weights.is_file()
    assert (a.run.student / "config.json").is_file()


def test_a_damaged_student_is_not_shown(tmp_path):
    a = Run(tmp_path)
    shutil.rmtree(a.run.student)
    (a.run.stage("distill") / "student" / "config.json").write_text("{}")
    with pytest.raises(Killed):
        Run(tmp_path, stop="stage distill")
    assert not a.run.student.exists()
    assert Run(tmp_path).made == ["stage distill"]
    assert json.loads((a.run.student / "config.json").read_text()) != {}


def test_an_intact_student_survives_damage_before_it(tmp_path):
    a = Run(tmp_path)
    (a.run.stage("block") / "student" / "config.json").write_text("{}")
    with pytest.raises(Killed):
        Run(tmp_path, stop="stage block")
    assert (a.run.student / "model.safetensors").is_file()


def older_layout(root: Path) -> None:
    for folder in ("convert", "student-init", "stages/block/student", "stages/distill/student", "student"):
        (root / folder).mkdir(parents=True)
        (root / folder / "weights").write_text("hours of work")
    (root / "manifest.json").write_text('{"name": "tiny"}')


def copied_through_links(root: Path) -> None:
    made = Run(root.parent / "made").run.root
    shutil.copytree(made, root)


def own_student(root: Path) -> None:
    (root / "student").mkdir(parents=True)
    (root / "student" / "weights").write_text("mine")


@pytest.mark.parametrize("fill_folder", [older_layout, copied_through_links, own_student])
def test_folders_that_are_not_links_are_refused_before_anything_changes(tmp_path, fill_folder):
    root = tmp_path / "runs" / "tiny"
    fill_folder(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(
        OutputError, match="where a link to a step or a copy of the student belongs"
    ) as caught:
        Run(tmp_path / "runs")
    assert "move the run folder away" in (caught.value.hint or "")
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_links_lead_into_the_store_wherever_folders_really_are(tmp_path):
    (tmp_path / "disk" / "far").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "runs" / "tiny").symlink_to(tmp_path / "disk" / "far")
    (tmp_path / "big" / "store").mkdir(parents=True)
    (tmp_path / "runs" / ".store").symlink_to(tmp_path / "big" / "store")
    run = Run(tmp_path / "runs").run
    for link in ("convert", "student-init", "stages/block", "stages/distill", "eval/teacher", "eval/student"):
        assert (run.root / link).is_symlink()
        assert (run.root / link).exists(), link
    assert not Run(tmp_path / "runs").made


def test_a_relative_output_folder_and_the_whole_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Run(Path("runs"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert not Run(tmp_path / "moved").made
    shutil.copytree(tmp_path / "moved", tmp_path / "copy", symlinks=True)
    assert not Run(tmp_path / "copy").made


def test_an_owner_that_has_died_is_not_named(tmp_path):
    a = Run(tmp_path)
    (a.run.root / ".owner.json").write_text('{"pid": 1, "host": "gone"}')
    with a.workspace.locked():
        assert json.loads((a.run.root / ".owner.json").read_text())["pid"] == os.getpid()
        with pytest.raises(OutputError, match=f"process {os.getpid()} on"):
            Run(tmp_path)
    assert not (a.run.root / ".owner.json").exists()


@pytest.mark.parametrize("ends", ["finish", "die"])
def test_a_step_that_another_process_makes_is_waited_for(tmp_path, monkeypatch, ends):
    monkeypatch.setattr("gendistill.runs.store._PATIENCE_SECONDS", 0.01)
    store = Store(tmp_path / ".store")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "holding\n"
    step = steps_of(convert=1)[0]
    (store.folder(step) / ".large.1.partial").write_text("half")
    said: list[str] = []

    def say(title: str, line: str) -> None:
        said.append(line)
        assert other.stdin is not None
        other.stdin.write(f"{ends}\n")
        other.stdin.flush()

    workspace = Workspace(recipe_of(tmp_path), say=say)
    workspace.plan([step])
    assert not workspace.is_done("convert")
    with workspace.making("convert") as folder:
        assert (folder is None) == (ends == "finish")
    assert said == ["convert: another process works on the same step; waiting for it"]
    assert other.wait(10) == 0
    other.stdout.close()


def test_remains_go_with_the_next_run_except_where_another_process_works(tmp_path):
    a = Run(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    store, step = a.workspace.store, a.workspace.steps["convert"]
    remains = [
        a.run.root / f".recipe.yaml.{gone.pid}.partial",
        a.run.root / "stages" / f".block.{gone.pid}.partial",
        a.run.report / f".index.html.{gone.pid}.partial",
        store.folder(step) / f".student.{gone.pid}.partial",
        store.folder(step) / "student" / f".modeling.py.{gone.pid}.partial",
        store.root / "scores" / f".model.{gone.pid}.partial",
    ]
    for path in remains:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    other = Store(store.root)
    with other.holding(step, say=print):
        with a.workspace.locked():
            pass
        assert [path for path in remains if path.exists()] == remains[3:5]
    with a.workspace.locked():
        pass
    assert not any(path.exists() for path in remains)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"crc32": 0}'])
def test_a_broken_seal_of_the_student_copies_it_again(tmp_path, content):
    a = Run(tmp_path)
    first = look(a.run)
    (a.run.root / ".student.json").write_bytes(content)
    assert not Run(tmp_path).made
    assert look(a.run) == first


def test_a_record_that_was_edited_is_not_believed(tmp_path):
    a = Run(tmp_path)
    path = a.run.stage("distill") / "step.json"
    content = json.loads(path.read_text())
    content["found"]["result"]["of"] = "another"
    path.write_text(json.dumps(content))
    again = Run(tmp_path)
    assert again.made == ["stage distill"]
    assert (
        "warning: stage distill: step.json is damaged since it finished; it has to be made again"
        in again.said
    )


def test_a_full_disk_while_the_student_is_copied_changes_nothing(tmp_path, monkeypatch):
    a = Run(tmp_path)
    first = look(a.run)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OutputError, match="the disk is full"):
        Run(tmp_path, "seed=3", convert=1, block=1, distill=1)
    assert look(a.run) == first


@pytest.mark.parametrize(
    ("overrides", "changes", "forgotten"),
    [((), {}, False), (("seed=3",), {}, True), ((), {"asked": 1}, True)],
)
def test_a_report_is_forgotten_once_the_folder_shows_something_else(tmp_path, overrides, changes, forgotten):
    Run(tmp_path)
    roots = Run(tmp_path, *overrides, **changes).forgotten
    assert bool(roots) == forgotten


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b'{"steps": 3}', b'{"steps": {}, "complete": "yes"}']
)
def test_a_broken_manifest_is_written_anew(tmp_path, content):
    run = Run(tmp_path).run
    good = look(run)
    run.manifest.write_bytes(content)
    assert not Run(tmp_path).made
    assert look(run) == good


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"step": 1, "inputs": [], "found": 0}'])
def test_a_broken_record_is_a_step_to_be_made(tmp_path, content):
    run = Run(tmp_path).run
    (run.root / "convert" / "step.json").write_bytes(content)
    assert Run(tmp_path).made == ["convert"]


def test_touched_and_copied_files_are_not_damage(tmp_path):
    run = Run(tmp_path).run
    path = run.stage("block") / "student" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.utime(run.root / "convert" / "metrics.jsonl", (1, 1))
    again = Run(tmp_path)
    assert not again.made
    assert not again.said


LOCK = """
import sys
from gendistill.config.load import load_recipe
from gendistill.runs.workspace import Workspace
with Workspace(load_recipe("tiny", [f"output={sys.argv[1]}"]), say=print).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_processes_in_one_folder_the_second_is_refused(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    (tmp_path / "linked").symlink_to(tmp_path)
    for root in (tmp_path, tmp_path / "linked"):
        with pytest.raises(OutputError, match=rf"another process works in .* \(process {other.pid} on "):
            Run(root)
    assert not (tmp_path / "tiny" / "manifest.json").exists()
    other.kill()
    other.communicate()
    assert tuple(Run(tmp_path).made) == NAMES

"""Pruning removes what no run folder shows, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from gendistill.cli.main import main
from gendistill.errors import OutputError
from gendistill.runs.prune import prune
from gendistill.runs.store import Store
from gendistill.runs.workspace import PENDING

FAKE = run_path(str(Path(__file__).with_name("fake_runs.py")))
HOLD, Killed, Run, steps_of = (FAKE[name] for name in ("HOLD", "Killed", "Run", "steps_of"))


def everything(root: Path) -> list[str]:
    """Every path but locks."""
    return sorted(str(path) for path in root.rglob("*") if path.suffix != ".lock")


def slugs(**changes: int) -> set[str]:
    return {step.slug for step in steps_of(**changes)}


def names(root: Path) -> set[str]:
    return {path.name for path in Store(root / ".store").folders()}


def test_what_run_folders_show_stays(tmp_path):
    Run(tmp_path)
    Run(tmp_path, "name=other", distill=1)
    before = everything(tmp_path)
    assert prune(tmp_path, dry_run=False) == ([], 6)
    assert everything(tmp_path) == before


def test_what_nothing_shows_goes(tmp_path):
    Run(tmp_path)
    Run(tmp_path, "seed=3", distill=1)
    Run(tmp_path, "name=other")
    with pytest.raises(Killed):
        Run(tmp_path, "name=gone", stop="stage block", block=1)
    shutil.rmtree(tmp_path / "gone")
    shutil.rmtree(tmp_path / "other")
    unused, num_kept = prune(tmp_path, dry_run=True)
    assert {each.folder.name for each in unused} == (slugs() | slugs(block=1)) & names(tmp_path) - slugs(
        distill=1
    )
    assert names(tmp_path) == slugs() | slugs(distill=1) | {steps_of(block=1)[1].slug}
    assert {(each.name, each.finished) for each in unused} == {
        ("stage distill", True),
        ("stage block", False),
    }
    assert all(each.num_bytes > 20 and each.key in each.folder.name for each in unused)
    assert prune(tmp_path, dry_run=False) == (unused, num_kept)
    assert names(tmp_path) == slugs(distill=1)
    assert not [path for path in (tmp_path / ".store").glob(".*") if path.name[1:-5] not in slugs(distill=1)]
    assert Run(tmp_path).made == ["stage distill"]


def test_work_of_an_interrupted_command_stays(tmp_path):
    Run(tmp_path)
    with pytest.raises(Killed):
        Run(tmp_path, "seed=3", stop="stage distill", convert=1)
    assert prune(tmp_path, dry_run=False)[0] == []
    assert Run(tmp_path, "seed=3", convert=1).made == ["stage distill"]
    assert {each.name for each in prune(tmp_path, dry_run=False)[0]} == {
        "convert",
        "stage block",
        "stage distill",
    }


@pytest.mark.parametrize("place", ["eval", "stages", "convert"])
def test_a_command_that_completes_meanwhile_keeps_its_steps(tmp_path, monkeypatch, place):
    Run(tmp_path)
    made = Run(tmp_path, "seed=3", completes=False, convert=1, block=1, distill=1).workspace
    look_up, left = os.path.realpath, [made]

    def completing(path, **settings):
        found = look_up(path, **settings)
        if place in Path(path).parts and left:
            left.pop().complete()
        return found

    monkeypatch.setattr(os.path, "realpath", completing)
    prune(tmp_path, dry_run=False)
    assert {step.slug for step in made.steps.values()} <= names(tmp_path)


def test_steps_that_others_make_after_a_command_has_begun_stay(tmp_path):
    def meanwhile():
        Run(tmp_path, "name=other")
        shutil.rmtree(tmp_path / "other")

    begun = Run(tmp_path, opened=meanwhile, completes=False)
    assert not begun.made
    assert prune(tmp_path, dry_run=False)[0] == []


def test_a_step_that_another_process_works_on_stays(tmp_path):
    Run(tmp_path)
    step, store = steps_of(convert=1)[0], tmp_path / ".store"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "holding\n"
    assert prune(tmp_path, dry_run=False)[0] == []
    other.kill()
    other.communicate()
    assert [each.folder.name for each in prune(tmp_path, dry_run=False)[0]] == [step.slug]


def test_scores_go_with_the_last_step_of_their_model(tmp_path):
    run = Run(tmp_path)
    teacher, student = (run.workspace.steps[f"eval {role}"] for role in ("teacher", "student"))
    for step in (teacher, student):
        path = run.workspace.store.scores(step) / "generate-0123456789abcdef-1-2.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("{}\n")
    Run(tmp_path, asked=1, student=1)
    unused, _ = prune(tmp_path, dry_run=False)
    assert student.model in {each.key for each in unused if each.name == "scores"}
    assert not run.workspace.store.scores(student).exists()
    assert run.workspace.store.scores(teacher).exists()


def test_folders_that_are_not_steps_stay(tmp_path):
    Run(tmp_path)
    for name in ("notes", "convert-1", "stage-x-0123456789ABCDEF"):
        (tmp_path / ".store" / name).mkdir()
    assert prune(tmp_path, dry_run=False)[0] == []
    (tmp_path / ".store" / "stage-a-b-c-0123456789abcdef").mkdir()
    assert [each.name for each in prune(tmp_path, dry_run=False)[0]] == ["stage a-b-c"]


def test_nothing_is_removed_while_it_is_unknown_what_is_shown(tmp_path):
    run = Run(tmp_path)
    Run(tmp_path, "seed=3", distill=1)
    (run.run.root / PENDING).write_text("{")
    before = everything(tmp_path)
    with pytest.raises(OutputError, match="this is not JSON") as caught:
        prune(tmp_path, dry_run=False)
    assert caught.value.hint
    assert everything(tmp_path) == before


def test_run_folders_behind_links_count(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tmp_path / "far")
    Run(tmp_path / "runs")
    (tmp_path / "linked").symlink_to(tmp_path / "runs")
    assert prune(tmp_path / "linked", dry_run=False) == ([], 5)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Run(Path("runs"))
    Run(Path("runs"), "seed=3", distill=1)
    assert main(["prune", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("stage distill ")
    assert "finished" in said[0]
    assert said[-1].startswith("ok        to remove: 1, ")
    assert "next: gendistill prune runs" in said[-1]
    assert main(["prune", "runs", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in content["removed"]] == ["stage distill"]
    assert content["bytes"] == content["removed"][0]["bytes"] > 0
    assert content["kept"] == 5
    assert not content["dry_run"]
    assert main(["prune"]) == 0
    assert capsys.readouterr().out == "ok        removed: 0, 0 B; kept: 5 that runs show\n"


@pytest.mark.parametrize(
    ("folder", "message", "hint"),
    [
        ("nowhere", 'there is no folder "nowhere"', "gendistill prune FOLDER"),
        ("x" * 5000, "there is no folder", "gendistill prune FOLDER"),
        ("runs/tiny/manifest.json", "there is no folder", "gendistill prune FOLDER"),
        ("runs/tiny", "runs/tiny is a run folder", "gendistill prune runs"),
    ],
)
def test_folders_without_runs_are_refused(tmp_path, capsys, monkeypatch, folder, message, hint):
    monkeypatch.chdir(tmp_path)
    Run(Path("runs"))
    assert main(["prune", folder]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert hint in said


def test_a_folder_without_a_store_has_nothing_to_remove(tmp_path):
    before = everything(tmp_path)
    assert prune(tmp_path, dry_run=False) == ([], 0)
    assert everything(tmp_path) == before

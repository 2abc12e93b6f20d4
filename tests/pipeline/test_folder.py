"""What the pipeline does with a run folder: finished work stays, and damage is noticed. The rest: test_workspace.py."""

from __future__ import annotations

import re

import pytest

from gendistill.errors import OutputError, RecipeError, TrainingError
from gendistill.models.card import front_matter
from gendistill.paths import RunDir, read_json
from gendistill.runs import pipeline


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
    with pytest.raises(Exception, match="nowhere"):
        shared_place.run("teacher.model=./nowhere")
    assert listing(run) == before
    with pytest.raises(RecipeError, match="no finished student of this recipe to score: stage distill"):
        pipeline.evaluate(shared_place.recipe("stages.distill.lr=9e-4"), command="test")
    assert listing(run) == before


def test_another_recipe_and_the_first_one_again(shared_place):
    run = shared_place.run()
    first = weights(run)
    pipeline.distill(shared_place.recipe("stages.distill.lr=9e-4", "stages.block=null"), command="test")
    assert weights(run) != first
    assert [path.name for path in (run.root / "stages").iterdir()] == ["distill"]
    assert "block:" not in run.recipe.read_text()
    # it was of the first recipe
    assert not list(run.report.iterdir())
    shared_place.run()
    assert weights(run) == first
    assert {path.name for path in (run.root / "stages").iterdir()} == {"block", "distill"}
    assert (run.report / "gap.json").is_file()


def test_damage_is_noticed_and_made_anew(shared_place, capsys):
    run = shared_place.run()
    before, keys = weights(run), read_json(run.manifest)["steps"]
    damaged = {
        "student-init/model.safetensors": "convert: student/model.safetensors is damaged",
        "stages/block/student/config.json": "stage block: student/config.json is missing",
        "stages/distill/student/model.safetensors": "stage distill: student/model.safetensors is damaged",
        "eval/student/samples.jsonl": "eval student: samples.jsonl is missing",
    }
    for name, line in damaged.items():
        if "missing" in line:
            (run.root / name).unlink()
        else:
            content = bytearray((run.root / name).read_bytes())
            content[len(content) // 2] ^= 255
            (run.root / name).write_bytes(content)
    with pytest.raises(RecipeError, match="no finished student"):
        pipeline.evaluate(shared_place.recipe(), command="test")
    capsys.readouterr()
    shared_place.run()
    said = capsys.readouterr().out
    for name, line in damaged.items():
        assert f"{line} since it finished; it has to be made again" in said
        assert any(line in warning for warning in read_json(run.manifest)["warnings"])
        assert (run.root / name).is_file()
    assert weights(run) == before
    assert read_json(run.manifest)["steps"] == keys


@pytest.mark.parametrize("inside", ["teacher", "student"])
def test_a_run_folder_and_a_model_in_one_another_are_refused(place, inside):
    override = (
        f"output={place.teacher}" if inside == "teacher" else f"student.from={place.root}/runs/tiny/student"
    )
    if inside == "student":
        (place.root / "runs" / "tiny").mkdir(parents=True)
        place.teacher.rename(place.root / "runs" / "tiny" / "student")
        (place.root / "teacher").symlink_to(place.root / "runs" / "tiny" / "student")
    before = sorted(place.root.rglob("*"))
    with pytest.raises(OutputError, match="lie in one another"):
        place.run(override)
    assert sorted(path for path in place.root.rglob("*") if "cache" not in path.parts) == before


@pytest.mark.parametrize("kind", ["the run folder", "the folder of all runs"])
def test_links_that_lead_in_a_circle_are_an_output_error(place, kind):
    loop = place.root / ("runs/tiny" if kind == "the run folder" else "runs")
    loop.parent.mkdir(exist_ok=True)
    loop.symlink_to(loop)
    with pytest.raises(OutputError, match=re.escape(str(loop))) as caught:
        place.run()
    assert caught.value.hint


def test_the_card_of_the_student_says_what_it_scored_and_the_copy_stays(place):
    run = place.run()
    results = front_matter(run.student / "README.md")["model-index"][0]["results"]
    scored = read_json(run.eval("student") / "results.json")["tasks"]
    assert [entry["dataset"]["name"] for entry in results] == [task["task"] for task in scored]
    for entry, task in zip(results, scored, strict=True):
        for metric in entry["metrics"]:
            score = task[metric["args"]["protocol"]]
            assert metric["value"] == pytest.approx(100 * score["value"], abs=0.006)
            assert metric["args"]["n"] == score["n"]
    inode, text = run.student.stat().st_ino, (run.student / "README.md").read_text()
    place.run()
    assert (run.student.stat().st_ino, (run.student / "README.md").read_text()) == (inode, text)

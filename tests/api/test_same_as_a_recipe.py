"""Python and recipes do the same: equal settings give the same weights and the same scores, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file

import gendistill as gd
from gendistill.cli.main import main
from gendistill.errors import CheckpointError

STAGE = {
    "train": ["mixer", "norm"],
    "mask": "all",
    "steps": 3,
    "seq_len": 32,
    "batch_size": 4,
    "micro_batch_size": 2,
    "lr": 1e-3,
}
TIMES = ("date", "seconds", "commit")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"row {index}: " + "abc " * (3 + index % 7)} for index in range(60)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    items = [
        {"id": str(i), "question": f"{i} + 1 =", "options": [f"{i + 1}", f"{i}"], "gold": 0} for i in range(4)
    ]
    Path("items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    Path("sums.yaml").write_text(
        "name: sums\nkind: multiple_choice\nitems: items.jsonl\nprompt: '{question}'\ngold: index\nmax_new_tokens: 4\n"
    )
    Path("ask.jsonl").write_text(json.dumps({"id": "a", "question": "Why?"}) + "\n")
    return tmp_path


def write_recipe(objective):
    """The recipe of what ``in_python`` does."""
    recipe = {
        "schema": 1,
        "name": "same",
        "seed": 7,
        "teacher": {"model": "builtin:tiny", "dtype": "float32"},
        "student": {"placement": "kda full", "impl": "reference", "mixers": {"kda": {"half_life": [4, 64]}}},
        "data": {"dataset": {"path": "rows.jsonl"}},
        "heldout": {"data": "dataset", "rows": 4, "seq_len": 32},
        "stages": {"distill": {**STAGE, "objective": {"kind": objective}, "data": "dataset"}},
        "eval": {
            "tasks": ["./sums.yaml"],
            "questions": "./ask.jsonl",
            "question_tokens": 4,
        },
    }
    Path("same.yaml").write_text(yaml.safe_dump(recipe))
    return Path("same.yaml")


def in_python(objective):
    """A teacher, and a student that was trained from it."""
    teacher = gd.load("builtin:tiny", dtype="float32")
    student = gd.convert(teacher, "kda full", impl="reference", seed=7, kda={"half_life": (4, 64)})
    data = gd.dataset("rows.jsonl", seq_len=32, heldout_rows=4, heldout_seq_len=32)
    settings = {name: value for name, value in STAGE.items() if name not in ("seq_len", "mask")}
    return (
        teacher,
        student,
        data,
        gd.distill(student, teacher, data, objective=objective, seed=7, quiet=True, **settings),
    )


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def timeless(value):
    """Leave out what no two runs share."""
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if name not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("objective", ["kl", "block_output"])
def test_the_same_settings_give_the_same_student_and_scores(objective):
    done = gd.run(write_recipe(objective))
    teacher, student, _, result = in_python(objective)
    mine, theirs = weights(student.save("student")), weights(done.folder / "student")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    stage = done.folder / "stages" / "distill"
    recorded = json.loads((stage / "result.json").read_text())
    for name in ("steps", "tokens", "loss_first", "loss_last", "tensors_changed", "heldout"):
        assert getattr(result, name) == recorded[name]

    scores = gd.evaluate(
        student, teacher=teacher, tasks=["sums.yaml"], questions="ask.jsonl", question_tokens=4, folder="mine",
    )  # fmt: skip
    for role in ("teacher", "student"):
        there = done.folder / "eval" / role
        for name in ("samples.jsonl", "transcripts.jsonl"):
            assert (Path("mine/eval") / role / name).read_text() == (there / name).read_text()
        kept = json.loads((there / "results.json").read_text())
        kept["model"] = scores.results[role]["model"]
        assert timeless(scores.results[role]) == timeless(kept)
    there = done.gap()
    assert [timeless(task) for task in scores.gap.to_json()["tasks"]] == [
        timeless(task) for task in there.to_json()["tasks"]
    ]


def test_the_probe_is_that_of_a_conversion():
    done = gd.run(write_recipe("kl"), "eval.tasks=[]", "eval.questions=null")
    teacher = gd.load("builtin:tiny", dtype="float32")
    student = gd.convert(teacher, "kda full", impl="reference", seed=7, kda={"half_life": (4, 64)})
    data = gd.dataset("rows.jsonl", seq_len=32, heldout_rows=4, heldout_seq_len=32)
    kept = json.loads((done.folder / "convert" / "probe.json").read_text())
    assert json.loads(json.dumps(gd.probe(student, teacher, data))) == kept


def test_a_saved_student_scores_as_on_the_command_line(capsys):
    *_, student = in_python("kl")[:2]
    student.save("student")
    assert main(["eval", "student", "--tasks", "sums.yaml", "--out", "shell", "--json"]) == 0
    capsys.readouterr()
    scores = gd.evaluate(gd.load("student"), tasks=["sums.yaml"], folder="python")
    shell = json.loads(Path("shell/results.json").read_text())
    assert shell["role"] == "model"
    assert timeless({**scores.results["student"], "role": "model"}) == timeless(shell)
    assert Path("python/eval/student/samples.jsonl").read_text() == Path("shell/samples.jsonl").read_text()


def test_a_stage_does_not_go_on_with_other_rows_or_another_teacher():
    def train(steps=2, rows="rows.jsonl", dtype: Literal["float32", "bfloat16"] = "float32"):
        teacher = gd.load("builtin:tiny", dtype=dtype)
        student = gd.convert(gd.load("builtin:tiny", dtype="float32"), "kda", impl="reference")
        data = gd.dataset(rows, seq_len=32, heldout_rows=4)
        return gd.distill(
            student,
            teacher,
            data,
            lr=1e-3,
            steps=steps,
            batch_size=2,
            micro_batch_size=2,
            folder="stage",
            quiet=True,
        )

    first = train()
    lines = Path("rows.jsonl").read_text().splitlines()
    Path("others.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    Path("moved.jsonl").write_text(Path("rows.jsonl").read_text())
    assert train(rows="moved.jsonl").heldout == first.heldout
    with pytest.raises(CheckpointError, match=r"the recipe has changed since this stage began: data\."):
        train(rows="others.jsonl")
    with pytest.raises(CheckpointError, match=r"the recipe has changed since this stage began: teacher\."):
        train(dtype="bfloat16")

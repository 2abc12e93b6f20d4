"""A run with an adapted stage: its students are plain ones, and the next stage starts from them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from gendistill.errors import RecipeError

ADAPTED = (
    "stages.block=null",
    "stages.distill.train=[mixer]",
    "stages.distill.lora={rank: 2, groups: [attention, mlp]}",
    "stages.distill.lr={mixer: 1e-2, attention: 1e-2, mlp: 1e-2}",
    "stages.after={data: text, train: [norm], steps: 1, seq_len: 32, batch_size: 4, micro_batch_size: 2, lr: 1e-3}",
    "eval.tasks=[]",
    "eval.questions=null",
)


def test_students_of_an_adapted_stage_are_plain_and_the_next_stage_starts_there(place):
    run = place.run(*ADAPTED)
    students = {
        "convert": run.student_init,
        "distill": run.stage("distill") / "student",
        "after": run.stage("after") / "student",
    }
    files = {name: sorted(path.name for path in folder.iterdir()) for name, folder in students.items()}
    assert files["convert"] == files["distill"] == files["after"]
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in students.items()}
    assert configs["distill"] == configs["after"]
    assert configs["convert"].items() <= configs["after"].items()
    before, adapted, after = (load_file(students[name] / "model.safetensors") for name in students)
    assert before.keys() == adapted.keys() == after.keys()
    for name, value in adapted.items():
        learns = ".layers.0.self_attn." in name or "_proj.weight" in name
        assert torch.equal(value.float(), before[name].float()) != learns, name
        assert torch.equal(value, after[name]) != name.endswith(("layernorm.weight", "model.norm.weight")), (
            name
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.distill.lora.rank=12", "an adapter of rank 12 is at least as large as"),
        ("stages.distill.lora.only=[no_such_layer]", "matches none of the"),
        ("stages.after.only=[no_such_norm]", "matches none of the"),
    ],
)
def test_a_stage_that_could_not_train_is_refused_before_anything_is_made(place, override, message):
    with pytest.raises(RecipeError, match=message):
        place.run(*ADAPTED, override)
    run = place.recipe(*ADAPTED).run_folder
    assert not (run / "convert").exists()
    assert not list(place.root.glob("runs/*/convert*"))


def test_a_finished_stage_needs_its_packages_no_more(place, monkeypatch):
    place.run(*ADAPTED)
    monkeypatch.setattr("gendistill.training.adapters.importlib.util.find_spec", lambda name: None)
    place.run(*ADAPTED, "eval.allow_code=true")
    with pytest.raises(RecipeError, match="peft, which is not installed"):
        place.run(*ADAPTED, "stages.distill.steps=2")

"""A run with an adapted stage: its students are plain ones, and the next stage starts from them."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

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

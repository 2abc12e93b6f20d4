"""A step's key changes with everything that it depends on, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.resolve import resolve_checkpoint
from gendistill.runs.inputs import recipe_steps

ALL = ("convert", "stage block", "stage distill", "eval teacher", "eval student")
AFTER_CONVERSION = ("convert", "stage block", "stage distill", "eval student")


def keys_of(recipe):
    """Map the steps of a recipe to their keys."""
    teacher = resolve_checkpoint(recipe.teacher.model)
    placement = Placement.parse(recipe.student.placement, num_layers=2)
    steps = recipe_steps(recipe, teacher=teacher, source=teacher, placement=placement)
    return {step.name: step.key for step in steps}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(place):
    path = place.teacher / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def edit_text(place):
    place.write_texts("pebbles")


def same_name_size_and_time(place):
    """Replace the rows by others of the same length, and put the time of change back."""
    stat = place.texts.stat()
    place.write_texts("shells")
    assert place.texts.stat().st_size == stat.st_size
    os.utime(place.texts, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def own_rows_for_the_second_stage(place):
    shutil.copyfile(place.texts, place.root / "second.jsonl")


SECOND = ("data.second={path: %s/second.jsonl}", "stages.distill.data=second")
CONTENT = {
    "a row of the data": (edit_text, AFTER_CONVERSION),
    "data of equal size and time": (same_name_size_and_time, AFTER_CONVERSION),
    "a number of the teacher's weights": (edit_weights, ALL),
    "its chat template": (
        lambda place: (place.teacher / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        ALL,
    ),
    "its tokenizer": (
        lambda place: edit_json(place.teacher / "tokenizer_config.json", add_bos_token=True),
        ALL,
    ),
    "its generation settings": (
        lambda place: edit_json(place.teacher / "generation_config.json", eos_token_id=[2, 7]),
        ALL,
    ),
    "the items of a task": (lambda place: place.write_items(5, "blue"), ("eval teacher", "eval student")),
    "the prompt of a task": (
        lambda place: edit_json(place.root / "colours.yaml", prompt="Say: {question}"),
        ("eval teacher", "eval student"),
    ),
    "a question": (
        lambda place: (place.root / "open.jsonl").write_text('{"question": "When?"}\n'),
        ("eval teacher", "eval student"),
    ),
    "nothing but the time of the data": (lambda place: os.utime(place.texts), ()),
}


@pytest.mark.parametrize("change", CONTENT)
def test_a_change_of_what_a_recipe_names_redoes_what_depends_on_it(place, change):
    edit, expected = CONTENT[change]
    before = keys_of(place.recipe())
    assert tuple(before) == ALL
    edit(place)
    after = keys_of(place.recipe())
    assert tuple(name for name in ALL if before[name] != after[name]) == expected


SETTINGS = {
    "seed=7": AFTER_CONVERSION,
    "teacher.dtype=bfloat16": ALL,
    "student.placement=full kda": AFTER_CONVERSION,
    "student.mixers.kda.conv_size=3": AFTER_CONVERSION,
    "student.mixers.sink.window=9": (),  # no layer has one
    "heldout.rows=5": AFTER_CONVERSION,
    "stages.block.lr=2e-3": ("stage block", "stage distill", "eval student"),
    "stages.distill.steps=2": ("stage distill", "eval student"),
    "data.text.shuffle=false": AFTER_CONVERSION,
    "eval.limit=2": ("eval teacher", "eval student"),
    "eval.protocols=[generation]": ("eval teacher", "eval student"),
    "stages.distill.log_every_steps=2": (),
    "stages.distill.save_every_steps=2": (),
    "stages.distill.keep_checkpoints=2": (),
    "stages.distill.micro_batch_size=1": (),
    "stages.distill.gradient_checkpointing=true": (),
    "stages.distill.non_finite.rewinds=0": ("stage distill", "eval student"),
    "stages.distill.stop_early={every_steps: 2}": ("stage distill", "eval student"),
    "watch.layers_every_steps=1": (),
    "watch.answers_every_steps=1": (),
    "trackers=[tensorboard]": (),
    "heldout.every_steps=1": (),
    "eval.batch_size=1": (),
    "eval.allow_code=true": (),
    "eval.bootstrap=200": (),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_change_of_a_setting_redoes_what_depends_on_it(place, setting):
    before, after = keys_of(place.recipe()), keys_of(place.recipe(setting))
    assert tuple(name for name in ALL if before[name] != after[name]) == SETTINGS[setting]


def test_the_items_of_a_task_that_ends_a_stage_are_part_of_its_key(place):
    setting = f"stages.distill.stop_early={{every_steps: 2, task: {place.root / 'colours.yaml'}}}"
    before = keys_of(place.recipe(setting))
    place.write_items(5, "blue")
    after = keys_of(place.recipe(setting))
    assert before["stage distill"] != after["stage distill"]
    assert before["stage block"] == after["stage block"]


def test_data_of_a_later_stage_leaves_the_earlier_one(place):
    own_rows_for_the_second_stage(place)
    overrides = [SECOND[0] % place.root, SECOND[1]]
    before = keys_of(place.recipe(*overrides))
    (place.root / "second.jsonl").write_text("\n".join(json.dumps({"text": f"other {i}"}) for i in range(40)))
    after = keys_of(place.recipe(*overrides))
    changed = [name for name in ALL if before[name] != after[name]]
    assert changed == ["stage distill", "eval student"]

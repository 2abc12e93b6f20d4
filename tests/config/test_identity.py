"""What changes the identity of a recipe: every field of the schema, exactly as it is marked."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import pytest

from gendistill.anatomy.mixers import MIXERS
from gendistill.config.base import Affects, Section, affects, identity
from gendistill.config.engine import EngineConfig
from gendistill.config.load import load_recipe
from gendistill.config.lora import LoRAConfig
from gendistill.config.mixers import MixersConfig, MixerSection, mixer_section, mixers_section
from gendistill.config.objectives import (
    BlockOutputConfig,
    CEConfig,
    JSDConfig,
    KLConfig,
    MixConfig,
    MixerOutputConfig,
)
from gendistill.config.schema import (
    EvalConfig,
    HeldOutConfig,
    MixtureConfig,
    Recipe,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)
from gendistill.config.watch import NonFiniteConfig, StopEarlyConfig, WatchConfig
from gendistill.runs.steps import fingerprint

KDAConfig, SWAConfig, SinkConfig = (mixer_section(MIXERS[kind].settings) for kind in ("kda", "swa", "sink"))
TEACHER = {"model": "a"}
STUDENT = {"placement": "kda full"}
SOURCE = {"path": "a.jsonl"}
HELDOUT = {"data": "text"}
STAGE = {"data": "text", "train": ["mixer"], "steps": 3, "lr": 1e-3}
RECIPE = {
    "schema": 1,
    "name": "a",
    "teacher": TEACHER,
    "student": STUDENT,
    "data": {"text": SOURCE, "other": {"path": "b.jsonl", "format": "messages"}},
    "heldout": HELDOUT,
    "stages": {"distill": STAGE},
}

# section: (a valid one, another value of every field)
FLIPS: dict[type[Section], tuple[dict[str, Any], dict[str, Any]]] = {
    TeacherConfig: (TEACHER, {"model": "b", "revision": "v2", "dtype": "float32"}),
    KDAConfig: (
        {"gate": "softplus"},
        {
            "conv_size": 3,
            "conv_activation": "silu",
            "conv_bias": False,
            "gate": "bounded",
            "gate_lower_bound": -4.0,
            "gate_rank": 8,
            "decay_init": "mamba",
            "half_life": (2.0, 64.0),
            "output_gate": "none",
            "output_gate_rank": 8,
            "output_norm": True,
            "rope": True,
            "qk_norm": "drop",
            "init": "random",
        },
    ),
    SWAConfig: ({}, {"window": 64}),
    SinkConfig: ({}, {"window": 64, "sinks": 1}),
    mixers_section(): ({}, {"kda": {"conv_size": 3}, "swa": {"window": 64}, "sink": {"sinks": 1}}),
    StudentConfig: (
        STUDENT,
        {"from": "b", "placement": "kda", "mixers": {"swa": {"window": 64}}, "impl": "reference"},
    ),
    SourceConfig: (
        SOURCE,
        {
            "path": "b.jsonl",
            "subset": "small",
            "split": "test",
            "revision": "v2",
            "format": "messages",
            "column": "words",
            "prompt": "question",
            "completion": "answer",
            "streaming": True,
            "limit": 7,
            "shuffle": False,
        },
    ),
    MixtureConfig: ({"mix": {"text": 1.0}}, {"mix": {"text": 2.0}}),
    HeldOutConfig: (HELDOUT, {"data": "other", "rows": 7, "seq_len": 64, "every_steps": 5}),
    ScheduleConfig: ({}, {"kind": "cosine", "warmup": 0.2, "decay": 0.3, "min_ratio": 0.5}),
    StageConfig: (
        STAGE,
        {
            "objective": {"kind": "ce"},
            "data": "other",
            "mask": "completion",
            "train": ["mixer", "mlp"],
            "only": ["q_proj"],
            "lora": {"rank": 4, "groups": ["attention"]},
            "optimizer": "adamw8bit",
            "tokens": {"steps": None, "tokens": 100_000},
            "steps": 4,
            "minutes": {"steps": None, "minutes": 2.0},
            "seq_len": 512,
            "batch_size": 128,
            "micro_batch_size": 2,
            "compute_dtype": "float32",
            "lr": 2e-3,
            "betas": (0.8, 0.95),
            "weight_decay": 0.0,
            "grad_clip": 0.5,
            "schedule": {"kind": "linear"},
            "gradient_checkpointing": 3,
            "log_every_steps": 5,
            "save_every_steps": 5,
            "save_every_minutes": 1.0,
            "keep_checkpoints": 2,
            "non_finite": {"in_a_row": 1},
            "stop_early": {"every_steps": 5},
        },
    ),
    EvalConfig: (
        {},
        {
            "tasks": ["copy"],
            "suite": ["smoke"],
            "lengths": [512],
            "protocols": ["generation"],
            "limit": 5,
            "batch_size": 2,
            "questions": "demo",
            "question_tokens": 9,
            "chat_template": "off",
            "system": "Be short.",
            "reasoning": True,
            "few_shot": 3,
            "permutations": 2,
            "allow_code": True,
            "bootstrap": 500,
        },
    ),
    LoRAConfig: (
        {"rank": 4, "groups": ["attention"]},
        {"rank": 8, "alpha": 32.0, "dropout": 0.1, "groups": ["mlp"], "only": ["q_proj"]},
    ),
    EngineConfig: (
        {},
        {
            "parallel": "fsdp2",
            "gather": "float32",
            "reshard": "step",
            "capture": "never",
            "patience_s": 30.0,
            "loss": "reference",
            "prefetch": 0,
            "blocks": "family",
        },
    ),
    WatchConfig: (
        {},
        {
            "speed": False,
            "groups": False,
            "layers_every_steps": 5,
            "answers_every_steps": 5,
            "questions": "mine.jsonl",
            "answer_tokens": 9,
            "score_every_steps": 5,
            "task": "copy",
            "task_limit": None,
        },
    ),
    NonFiniteConfig: ({}, {"in_a_row": 1, "rewinds": 0}),
    StopEarlyConfig: (
        {"every_steps": 5},
        {"task": "copy", "limit": None, "every_steps": 6, "patience": 1, "gain": 0.0, "min_steps": 5},
    ),
    KLConfig: ({}, {"direction": "reverse", "temperature": 2.0, "weight": 2.0}),
    JSDConfig: ({}, {"beta": 0.3, "temperature": 2.0, "weight": 2.0}),
    CEConfig: ({}, {"weight": 2.0}),
    MixConfig: ({"terms": [{"kind": "ce"}]}, {"terms": [{"kind": "kl"}]}),
    MixerOutputConfig: ({}, {"norm": "mse"}),
    BlockOutputConfig: ({}, {"norm": "mse"}),
    Recipe: (
        RECIPE,
        {
            "name": "b",
            "seed": 7,
            "output": "elsewhere",
            "teacher": {"model": "a", "dtype": "float32"},
            "student": {"placement": "kda", "impl": "reference"},
            "data": {"text": {"path": "a.jsonl", "limit": 3}, "other": {"path": "b.jsonl"}},
            "heldout": {"data": "other"},
            "stages": {},
            "eval": {"limit": 3},
            "engine": {"loss": "reference"},
            "watch": {"speed": False},
            "trackers": ["wandb"],
        },
    ),
}
# what holds sections is judged by their fields
SECTIONS = {
    *((mixers_section(), kind) for kind in ("kda", "swa", "sink")),
    (StudentConfig, "mixers"),
    (StageConfig, "lora"),
    (StageConfig, "objective"),
    (StageConfig, "schedule"),
    (MixConfig, "terms"),
    *((Recipe, name) for name in ("teacher", "student", "data", "heldout", "stages", "eval")),
}


def sections(section: type[Section] = Section) -> list[type[Section]]:
    found = [one for child in section.__subclasses__() for one in (child, *sections(child))]
    # the results files have sections of their own, once tests of the report are imported too
    # what these stand for is made from the catalogue, also from that of other tests
    made = {mixers_section(), KDAConfig, SWAConfig, SinkConfig}
    return [
        one
        for one in found
        if one.__module__.startswith("gendistill.config.")
        and (one in made or not issubclass(one, MixersConfig | MixerSection))
    ]


def names(section: type[Section]) -> dict[str, str]:
    """Map fields as written to their names; those with a single value, such as ``kind``, cannot be flipped."""
    return {
        field.alias or name: name
        for name, field in section.model_fields.items()
        if not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1)
    }


CASES = [
    pytest.param(section, written, at_least, id=f"{section.__name__}.{written}, {at_least.name}")
    for section in sections()
    for written, name in names(section).items()
    for at_least in (Affects.ARITHMETIC, Affects.RESULT)
    if at_least is Affects.ARITHMETIC or (section, name) not in SECTIONS
]


@pytest.mark.parametrize(("section", "written", "at_least"), CASES)
def test_flipping_a_field_changes_the_identity_exactly_if_it_is_marked_so(section, written, at_least):
    valid, flips = FLIPS[section]
    assert set(flips) == set(names(section)), "every field needs another value here"
    other, name = flips[written], names(section)[written]
    changes = other if isinstance(other, dict) and written in ("tokens", "minutes") else {written: other}
    before = section.model_validate(valid)
    after = section.model_validate({**valid, **changes})
    assert before != after, "this is the same value"
    marked = (section, name) in SECTIONS or affects(section, name) >= at_least
    assert (identity(before, at_least=at_least) != identity(after, at_least=at_least)) == marked


def test_what_only_logs_saves_or_splits_work_affects_nothing():
    free = {
        StageConfig: {
            *("micro_batch_size", "gradient_checkpointing", "log_every_steps", "save_every_steps"),
            *("save_every_minutes", "keep_checkpoints"),
        },
        HeldOutConfig: {"every_steps"},
        EvalConfig: {"batch_size", "allow_code", "bootstrap"},
        EngineConfig: set(EngineConfig.model_fields),
        WatchConfig: set(WatchConfig.model_fields),
        Recipe: {"version", "name", "output", "engine", "watch", "trackers"},
    }
    found = {
        section: {name for name in section.model_fields if affects(section, name) is Affects.NOTHING}
        for section in sections()
    }
    assert {section: fields for section, fields in found.items() if fields} == free


# of the stages of the shipped recipes, as of 4d0bcb6: before adapters, optimizers, trackers and what is watched
FINISHED = {
    "chat-kda": "fce0683d8ff338c7",
    "qwen2.5-0.5b-kda": "603c206d73ef2491",
    "qwen3-0.6b-kda": "603c206d73ef2491",
    "smollm2-135m-kda": "8de097f5e7c0db96",
    "smollm2-135m-kda-cpu": "ab163e3968273f94",
    "tiny": "80984b06edf6e523",
}


@pytest.mark.parametrize("name", FINISHED)
def test_what_older_versions_have_finished_stays_finished(name):
    """A change of a recipe is a reason to write another number here; a change of the schema is none."""
    stages = load_recipe(name).stages
    assert fingerprint({stage: identity(each) for stage, each in stages.items()}) == FINISHED[name]


def test_settings_that_came_later_leave_identities_as_they_were_until_they_are_used():
    plain = StageConfig.model_validate(STAGE)
    assert {"non_finite", "stop_early"}.isdisjoint(identity(plain))
    used = StageConfig.model_validate(
        {**STAGE, "non_finite": {"rewinds": 0}, "stop_early": {"every_steps": 5}}
    )
    assert identity(used)["non_finite"] == {"in_a_row": 3, "rewinds": 0}
    # its name alone says nothing: the step's key has what the task holds
    assert "task" not in identity(used)["stop_early"]
    same = StageConfig.model_validate({**STAGE, "non_finite": {"in_a_row": 3, "rewinds": 2}})
    assert identity(same) == identity(plain)


def test_a_setting_deep_inside_counts_and_its_neighbour_does_not():
    recipe = ["stages.distill.schedule.warmup=0.5"], ["stages.distill.log_every_steps=7"]
    base, result, nothing = (identity(load_recipe("tiny", change)) for change in ([], *recipe))
    assert base != result
    assert base == nothing


def test_settings_that_came_later_leave_what_was_finished_without_them():
    stage = StageConfig(**STAGE)
    assert not {"lora", "optimizer"} & identity(stage).keys()
    assert identity(stage) == identity(StageConfig(**STAGE, optimizer="adamw", lora=None))

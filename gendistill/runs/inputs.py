"""List the steps of a recipe, each with everything that its output depends on. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.resolve import Checkpoint
from gendistill.config.base import identity
from gendistill.config.schema import MixtureConfig, Recipe, SourceConfig
from gendistill.data.identity import source_identity
from gendistill.errors import DataError
from gendistill.runs.steps import ASKED, BEFORE, CONVERT, Step, eval_step, stage_step
from gendistill_evals import questions_identity, task_identity
from gendistill_evals.protocols import RULES

# given the name of a step, what the run folder's step of that name was made from
Recorded = Callable[[str], Mapping[str, Any] | None]


def recipe_steps(
    recipe: Recipe,
    *,
    teacher: Checkpoint,
    source: Checkpoint,
    placement: Placement,
    shown: Recipe | None = None,
    recorded: Recorded = lambda step: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Step]:
    """List conversion, stages and scores in order; every step depends on those before it.

    Args:
        recipe: The recipe.
        teacher, source: What ``teacher`` and ``student.from`` name.
        placement: What ``student.placement`` means for the source.
        shown: The recipe that the run folder shows.
        recorded: Inputs of the steps that it shows. Where data has gone since, and the recipe still names the same
            place, they say what it held.
        say: Receives a line for each such case.
    Raises:
        DataError: Data that cannot be read, and that no step was made from before.
        EvalError: A task or a set of questions that does not exist or cannot be read.
    """

    def data(name: str, step: str) -> dict[str, Any]:
        return _data(recipe, name, shown=shown, before=recorded(step) or {}, say=say)

    held = recipe.heldout.data
    convert = Step(
        CONVERT,
        {
            "seed": recipe.seed,
            "teacher": {**_model(teacher), **identity(recipe.teacher)},
            "student": {
                "from": _model(source),
                "placement": list(placement.kinds),
                **_student(recipe, placement),
            },
            "heldout": identity(recipe.heldout),
            "data": data(held, CONVERT),
        },
    )
    steps = [convert]
    for name, stage in recipe.stages.items():
        step = stage_step(name)
        inputs = {BEFORE: steps[-1].key, "stages": {name: identity(stage)}, "data": data(stage.data, step)}
        if stage.stop_early is not None:
            inputs["stop_early"] = task_identity(stage.stop_early.task)
        steps.append(Step(step, inputs))
    trained = {BEFORE: steps[-1].key}
    if recipe.eval.asks:
        asked = _asked(recipe)
        steps.append(
            Step(
                eval_step("teacher"),
                {"teacher": {**_model(teacher), **identity(recipe.teacher)}, ASKED: asked},
            )
        )
        steps.append(Step(eval_step("student"), {**trained, ASKED: asked}))
    return steps


def data_inputs(recipe: Recipe, name: str) -> dict[str, Any]:
    """Describe the rows that a stage trains on and those that it is scored on, by settings and content."""
    return {
        "heldout": identity(recipe.heldout),
        "data": {
            **_data(recipe, recipe.heldout.data, shown=None, before={}, say=_say_nothing),
            **_data(recipe, recipe.stages[name].data, shown=None, before={}, say=_say_nothing),
        },
    }


def _say_nothing(line: str) -> None:
    """Where nothing was recorded before, there is nothing to say."""


def _student(recipe: Recipe, placement: Placement) -> dict[str, Any]:
    """Describe the student's section: of the mixers, those that are placed, and those that every key has held."""
    found = identity(recipe.student)
    found["mixers"] = {
        kind: settings
        for kind, settings in found["mixers"].items()
        if kind in placement.kinds or MIXERS[kind].in_every_key
    }
    return found


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"weights": checkpoint.fingerprint, "tokenizer and settings": checkpoint.companions_fingerprint}


def _asked(recipe: Recipe) -> dict[str, Any]:
    questions = recipe.eval.questions
    return {
        **identity(recipe.eval),
        "rules": RULES,
        "tasks": [task.identity() for task in recipe.eval.load_tasks()],
        "questions": None if questions is None else questions_identity(questions),
    }


def _data(
    recipe: Recipe,
    name: str,
    *,
    shown: Recipe | None,
    before: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Describe a source or mixture with the sources that it draws from, settings and content."""
    entry = recipe.data[name]
    parts = tuple(entry.mix) if isinstance(entry, MixtureConfig) else ()
    described: dict[str, Any] = {}
    for part in (name, *parts):
        section = recipe.data[part]
        described[part] = {"settings": identity(section)}
        if isinstance(section, SourceConfig):
            same = shown is not None and part in shown.data and _place(shown.data[part]) == _place(section)
            old = before.get("data", {}).get(part, {}).get("content") if same else None
            described[part]["content"] = _content(section, where=f"data.{part}", before=old, say=say)
    return described


def _place(source: SourceConfig | MixtureConfig) -> tuple[str, str | None] | None:
    return (source.path, source.revision) if isinstance(source, SourceConfig) else None


def _content(
    source: SourceConfig, *, where: str, before: dict[str, Any] | None, say: Callable[[str], None]
) -> dict[str, Any]:
    try:
        return source_identity(source, where=where)
    except DataError as error:
        if before is None:
            raise
        say(f"{where} cannot be read any more ({error.message}); what was made from it counts as finished")
        return before

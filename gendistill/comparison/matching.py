"""Decide what of several models can be compared; whatever cannot is refused with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

from gendistill.comparison.load import Scores, TaskScores
from gendistill.errors import RecipeError, ReportError
from gendistill.text import printable
from gendistill_evals import ProtocolFamily

_SHOWN = 8
_SAME = "score both models on the same items: the same task version and --limit"
OTHER_PROMPTS = "--other-prompts"


def common_tasks(models: Sequence[Scores], wanted: Collection[str] | None) -> tuple[list[str], list[str]]:
    """List the tasks to compare, and notes on those left out.

    Raises:
        ReportError: The models have no task in common.
        RecipeError: A wanted task is not there.
    """
    shared = [task for task in models[0].tasks if all(task in model.tasks for model in models)]
    if wanted is not None:
        for task in wanted:
            lacking = [model for model in models if task not in model.tasks]
            if lacking:
                raise RecipeError(
                    f"{_name(lacking[0])} has no task {printable(task)}; it has {_list(lacking[0].tasks)}",
                    where="--tasks",
                    hint=f"tasks that all models have: {_list(shared)}",
                )
        return [task for task in shared if task in wanted], []
    if not shared:
        raise ReportError(
            "the models have no task in common: "
            + "; ".join(f"{_name(model)} has {_list(model.tasks)}" for model in models),
            hint="score them on the same tasks",
        )
    notes = [
        f"left out, because not every model has it: {_list(extra)} (of {_name(model)})"
        for model in models
        if (extra := [task for task in model.tasks if task not in shared])
    ]
    return shared, notes


def check_comparable(
    models: Sequence[Scores], task: str, wanted: Collection[str] | None, *, other_prompts: bool
) -> tuple[dict[str, ProtocolFamily], list[str]]:
    """Refuse a task unless its models answered the same items, asked in the same way, under the same measures.

    Args:
        models: Two or more that have the task.
        task: Its name.
        wanted: Measures to compare; None for all.
        other_prompts: Whether models may have been asked differently.
    Returns: The measures to compare with their family, none if no model has a wanted one or any; and notes.
    Raises:
        ReportError: Says what differs, between whom and how to go on.
        RecipeError: A wanted measure is not there.
    """
    notes: list[str] = []
    for left, right in combinations(models, 2):
        one, other = left.tasks[task], right.tasks[task]
        pair = f"task {printable(task)}, {_name(left)} and {_name(right)}"
        _check_items(one, other, left, right, pair)
        asked = _asked_differently(one, other)
        if asked and not other_prompts:
            raise ReportError(
                f"the same items were asked differently: {asked}",
                where=pair,
                hint="score both with the same prompts and settings; or, if each model has to be asked in its own way, "
                f"compare with {OTHER_PROMPTS}",
            )
        if asked:
            who = f"{_name(left)} and {_name(right)}"
            notes.append(f"{who} were asked differently ({asked}), so part of the gap may be the prompts'")
    if not any(model.tasks[task].measures for model in models):
        return {}, [
            *notes,
            f"left out, because nothing of {printable(task)} is a score of single items"
            f"{_unusable(models[0], task)}",
        ]
    return _common_measures(models, task, wanted), notes


def _check_items(one: TaskScores, other: TaskScores, left: Scores, right: Scores, pair: str) -> None:
    if one.ids != other.ids:
        lacking = [
            f"{_name(model)} lacks {len(absent):,} of {len(theirs):,} items: {_list(absent)}"
            for model, absent, theirs in (
                (right, sorted(set(one.ids) - set(other.ids)), one.ids),
                (left, sorted(set(other.ids) - set(one.ids)), other.ids),
            )
            if absent
        ]
        raise ReportError("; ".join(lacking), where=pair, hint=_SAME)
    different = [
        one_id for one_id, mine, theirs in zip(one.ids, one.items, other.items, strict=True) if mine != theirs
    ]
    if different:
        raise ReportError(
            f"{len(different):,} of {len(one.ids):,} items have one id and are not the same item: {_list(different)}",
            where=pair,
            hint=_SAME,
        )


def _asked_differently(one: TaskScores, other: TaskScores) -> str:
    mine, theirs = _leaves(one.settings), _leaves(other.settings)
    shared = [key for key in mine if key.split(".")[0] in other.settings]
    shared += [key for key in theirs if key not in mine and key.split(".")[0] in one.settings]
    found = [
        f"{printable(key)} {mine.get(key)!r:.60} / {theirs.get(key)!r:.60}"
        for key in shared
        if mine.get(key) != theirs.get(key)
    ]
    prompts = sum(mine != theirs for mine, theirs in zip(one.prompts, other.prompts, strict=True))
    if prompts:
        found.append(f"{prompts:,} of {len(one.prompts):,} prompts differ")
    return printable(", ".join(found), longest=1000)


def _leaves(settings: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Name what settings hold by dotted names, so that only what differs is shown."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{under}{key}.")
        else:
            found[f"{under}{key}"] = value
    return found


def _common_measures(
    models: Sequence[Scores], task: str, wanted: Collection[str] | None
) -> dict[str, ProtocolFamily]:
    by_model = [model.tasks[task].measures for model in models]
    shared = [name for name in by_model[0] if all(name in measures for measures in by_model)]
    if wanted is not None:
        chosen = [name for name in shared if name in wanted]
        some = [name for name in wanted if any(name in measures for measures in by_model)]
        for model, measures in zip(models, by_model, strict=True):
            if lacking := [name for name in some if name not in measures]:
                raise RecipeError(
                    f"{_name(model)} has no {_list(lacking)} on {printable(task)}; it has "
                    f"{_list(measures)}{_unusable(model, task)}",
                    where="--protocol",
                    hint=f"what all models have: {_list(shared)}"
                    if shared
                    else "score them under the same protocols",
                )
        return {name: by_model[0][name].family for name in chosen}
    for model, measures in zip(models, by_model, strict=True):
        absent = list(dict.fromkeys(name for other in by_model for name in other if name not in measures))
        if absent:
            raise ReportError(
                f"{_name(model)} lacks {_list(absent)}{_unusable(model, task)}",
                where=f"task {printable(task)}",
                hint=f"--protocol {' '.join(shared)} compares what all models have"
                if shared
                else "score them under the same protocols or metrics",
            )
    return {name: by_model[0][name].family for name in shared}


def _unusable(model: Scores, task: str) -> str:
    found = [f"{printable(name)}: {printable(reason)}" for name, reason in model.tasks[task].unusable.items()]
    return f" ({'; '.join(found[:_SHOWN])})" if found else ""


def _name(model: Scores) -> str:
    return printable(model.name)


def _list(names: Collection[str]) -> str:
    shown = ", ".join(printable(name, longest=60) for name in list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else shown or "none"

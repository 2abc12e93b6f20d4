"""Which parameters learn in a stage: six groups, narrowed by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gendistill.anatomy.groups import ParamGroup, param_group
from gendistill.anatomy.placement import placed_kinds
from gendistill.config.schema import StageConfig
from gendistill.errors import RecipeError
from gendistill.types import short_count


def param_group_of(name: str, config: Any) -> ParamGroup:
    """Say which group a parameter of a model belongs to, given its configuration.

    Raises:
        RecipeError: The name fits no group.
    """
    return param_group(name, placed_kinds(config), tied_head=config.tie_word_embeddings)


@dataclass(frozen=True, slots=True)
class FreezeReport:
    """What learns and what does not.

    Attributes:
        names: Trained parameters, in model order.
        trained: Numbers that learn, per group.
        frozen: Numbers that do not, per group.
        notes: What the reader of the recipe would not expect.
    """

    names: tuple[str, ...]
    trained: dict[ParamGroup, int]
    frozen: dict[ParamGroup, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        def listed(counts: dict[ParamGroup, int]) -> str:
            return ", ".join(f"{group} {short_count(count)}" for group, count in counts.items()) or "nothing"

        total = sum(self.trained.values())
        lines = [
            f"trains {short_count(total)} parameters: {listed(self.trained)}; frozen: {listed(self.frozen)}"
        ]
        return "\n".join([*lines, *self.notes])


def apply_freeze(
    student: nn.Module,
    stage: StageConfig,
    *,
    name: str = "<name>",
    reaches: Callable[[str], bool] = lambda parameter: True,
) -> FreezeReport:
    """Set ``requires_grad`` as the stage asks.

    Args:
        student: Model whose parameters are switched.
        stage: Its ``train`` and ``only`` decide.
        name: Name of the stage, for errors.
        reaches: Whether the objective can train a parameter; those it cannot stay frozen and are reported.
    Raises:
        RecipeError: A pattern under ``only`` matches nothing, or a named group cannot learn.
    """
    parameters = dict(student.named_parameters())
    groups = {parameter: param_group_of(parameter, student.config) for parameter in parameters}
    config: Any = student.config
    chosen, notes = choose_trained(groups, stage, name=name, tied=config.tie_word_embeddings, reaches=reaches)
    trained, frozen = Counter[ParamGroup](), Counter[ParamGroup]()
    for parameter, tensor in parameters.items():
        tensor.requires_grad_(parameter in chosen)
        (trained if parameter in chosen else frozen)[groups[parameter]] += tensor.numel()
    names = tuple(parameter for parameter in parameters if parameter in chosen)
    return FreezeReport(names, dict(trained), dict(frozen), tuple(notes))


def choose_trained(
    groups: Mapping[str, ParamGroup],
    stage: StageConfig,
    *,
    name: str,
    tied: bool,
    reaches: Callable[[str], bool],
) -> tuple[set[str], list[str]]:
    """Say which parameters learn in a stage, and what the reader of the recipe would not expect.

    Args:
        groups: Group of every parameter of the student, by its name.
        stage: Its ``train`` and ``only`` decide.
        name: Name of the stage, for errors.
        tied: Whether the head is the embedding.
        reaches: Whether the objective can train a parameter.
    Raises:
        RecipeError: As for ``apply_freeze``.
    """
    where = f"stages.{name}"
    present = set(groups.values())
    asked = [parameter for parameter, group in groups.items() if group in stage.train]
    notes = _check_groups(stage, present, tied, where)
    asked = narrow(asked, stage.only, f"{where}.only", what="parameters in the trained groups")
    chosen = {parameter for parameter in asked if reaches(parameter)}
    lost = {groups[parameter] for parameter in asked} - {groups[parameter] for parameter in chosen}
    if lost:
        raise RecipeError(
            f"the objective {stage.objective.kind} gives no gradient to {', '.join(sorted(lost))}",
            where=f"{where}.train",
            hint=f"remove {', '.join(sorted(lost))} from train, or train end to end with objective: {{kind: kl}}",
        )
    notes += check_rates(stage, stage.train, {groups[each] for each in chosen}, present, name=name)
    if len(chosen) < len(asked):
        notes.append(
            f"{len(asked) - len(chosen)} tensors outside the converted layers stay frozen: "
            f"{stage.objective.kind} does not reach them"
        )
    return chosen, notes


def check_rates(
    stage: StageConfig,
    named: Collection[ParamGroup],
    learning: Collection[ParamGroup],
    present: Collection[ParamGroup],
    *,
    name: str,
) -> list[str]:
    """Refuse a rate of a group of which the patterns leave nothing; without one, only note it.

    Args:
        stage: Its ``lr`` may name rates.
        named: Groups under ``train``, or under ``lora.groups``.
        learning: Those of which something learns.
        present: Those that the student has.
        name: Name of the stage, for errors.
    Raises:
        RecipeError: ``lr`` names a rate that nothing would use.
    """
    emptied = [group for group in named if group in present and group not in learning]
    if emptied and isinstance(stage.lr, dict):
        raise RecipeError(
            f"lr gives a rate to {', '.join(emptied)}, of which the patterns under only leave nothing to learn",
            where=f"stages.{name}.lr",
            hint=f"remove {', '.join(emptied)} from lr and from the groups that learn, or widen only",
        )
    return [f"the patterns under only leave nothing of {group} to learn" for group in emptied]


def narrow(names: list[str], patterns: tuple[str, ...], where: str, *, what: str) -> list[str]:
    """Keep the names in which a pattern is found; all of them without patterns.

    Args:
        where: Setting that holds the patterns, for errors.
        what: What the names are, for errors.
    Raises:
        RecipeError: A pattern matches none.
    """
    kept: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if re.search(pattern, name)]
        if not matched:
            raise RecipeError(
                f'"{pattern}" matches none of the {len(names)} {what}',
                where=where,
                hint=f'names look like "{names[0]}"' if names else None,
            )
        kept.update(matched)
    return [name for name in names if name in kept] if patterns else names


def _check_groups(stage: StageConfig, present: set[ParamGroup], is_tied: bool, where: str) -> list[str]:
    if is_tied:
        _check_tied(stage, where)
    # a tied head is the embedding
    absent = [
        group for group in stage.train if group not in present and not (is_tied and group is ParamGroup.HEAD)
    ]
    if absent and len(absent) == len(stage.learning):
        raise RecipeError(
            f"nothing would learn: the student has no parameters in {', '.join(absent)}",
            where=f"{where}.train",
        )
    notes = (
        ["head is tied to the embedding and learns as embed"]
        if is_tied and ParamGroup.HEAD in stage.train
        else []
    )
    return notes + [f"this placement has no parameters in {group}" for group in absent]


def _check_tied(stage: StageConfig, where: str) -> None:
    """Refuse a tied head that would be frozen on one side only, or have two rates."""
    both = (ParamGroup.EMBED, ParamGroup.HEAD)
    named = [group for group in both if group in stage.train]
    if len(named) == 1:
        other = both[1 - both.index(named[0])]
        raise RecipeError(
            f"this model's head is tied to its embedding: train names {named[0]} and not {other}, but they are one "
            "tensor, which learns or is frozen on both sides",
            where=f"{where}.train",
            hint=f"add {other} to train, or remove {named[0]}",
        )
    if named and isinstance(stage.lr, dict) and len({stage.lr[group] for group in both}) > 1:
        raise RecipeError(
            f"this model's head is tied to its embedding: they are one tensor, but lr gives embed "
            f"{stage.lr[both[0]]:g} and head {stage.lr[both[1]]:g}",
            where=f"{where}.lr",
            hint="give both the same rate",
        )

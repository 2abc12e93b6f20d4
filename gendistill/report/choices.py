"""What several runs chose differently, and what each choice did under both protocols. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from gendistill.report.gap import Estimate, GapReport
from gendistill.report.run_files import RunFiles
from gendistill_evals import ProtocolFamily, stats

# they name a run and change nothing in it
_FREE = frozenset({"name", "output", "schema"})
_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """Something that the runs do not share.

    Attributes:
        name: Its key in a recipe, such as ``stages.distill.lr``.
        values: By run, for people.
    """

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Effect:
    """Two runs that differ in one setting alone.

    Attributes:
        setting: Its name.
        before, after: Names of the runs.
        change: The two values.
        by_family: Score of the second student minus that of the first, in percentage points, in the mean over the
            tasks that both have; None was not measured.
    """

    setting: str
    before: str
    after: str
    change: tuple[str, str]
    by_family: dict[ProtocolFamily, Estimate | None]


def differing_settings(runs: Sequence[RunFiles]) -> list[Setting]:
    """List what the recipes of runs set differently; stages that not all have count as one setting."""
    recipes = [run.recipe for run in runs]
    stages = [tuple(recipe.get("stages") or {}) for recipe in recipes]
    shared = set.intersection(*(set(names) for names in stages)) if stages else set()
    flat = [
        {
            key: value
            for key, value in _flatten(recipe).items()
            if key.split(".")[0] not in _FREE
            and not (key.startswith("stages.") and key.split(".")[1] not in shared)
        }
        for recipe in recipes
    ]
    found = (
        [Setting("stages", tuple(", ".join(names) or "none" for names in stages))]
        if len(set(stages)) > 1
        else []
    )
    for key in dict.fromkeys(key for each in flat for key in each):
        values = tuple(each.get(key, _DEFAULT) for each in flat)
        if len(set(values)) > 1:
            found.append(Setting(key, values))
    return found


def _flatten(content: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(content, Mapping) and content:
        found: dict[str, str] = {}
        for key, value in content.items():
            found |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    shown = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    return {prefix: shown} if prefix else {}


def single_effects(
    runs: Sequence[RunFiles], reports: Sequence[GapReport], settings: Sequence[Setting]
) -> list[Effect]:
    """Compare the students of all pairs of runs that differ in one setting alone, item by item."""
    found = []
    for one, other in combinations(range(len(runs)), 2):
        apart = [setting for setting in settings if setting.values[one] != setting.values[other]]
        if len(apart) == 1:
            (setting,) = apart
            change = (setting.values[one], setting.values[other])
            names = (reports[one].name, reports[other].name)
            found.append(
                Effect(setting.name, *names, change, mean_differences(runs[one], runs[other], reports))
            )
    return sorted(found, key=lambda effect: effect.setting)


def mean_differences(
    before: RunFiles, after: RunFiles, reports: Sequence[GapReport]
) -> dict[ProtocolFamily, Estimate | None]:
    """Average the differences of two students' scores over their common tasks, under the leading protocols."""
    leads = reports[0].leads
    return {
        family: _mean([each for each in student_differences(before, after, protocol).values()])
        for family, protocol in leads.items()
    }


def student_differences(before: RunFiles, after: RunFiles, protocol: str) -> dict[str, stats.Interval]:
    """Compare the students of two runs on the items that both answered, in shares.

    Returns: Second minus first, by task.
    """
    first, second = (
        {
            (row["task"], str(row["id"])): (float(row[protocol]["correct"]), str(row.get("group", row["id"])))
            for row in run.samples["student"]
            if row.get(protocol)
        }
        for run in (before, after)
    )
    pairs: dict[str, list[tuple[float, float, str]]] = {}
    for key in sorted(first.keys() & second.keys()):
        score, group = first[key]
        pairs.setdefault(key[0], []).append((score, second[key][0], group))
    found = {}
    for task, rows in pairs.items():
        earlier, later, groups = zip(*rows, strict=True)
        shared = groups if len(set(groups)) < len(groups) else None
        found[task] = stats.gap(earlier, later, groups=shared)
    return found


def _mean(intervals: Sequence[stats.Interval]) -> Estimate | None:
    if not intervals:
        return None
    mean = stats.mean_of(intervals)
    return Estimate(100 * mean.value, 100 * mean.low, 100 * mean.high, mean.n)

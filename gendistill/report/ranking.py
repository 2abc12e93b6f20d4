"""Runs that log-likelihood orders one way and generation the other way. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

from gendistill.errors import ReportError
from gendistill.report.gap import (
    TASK_FIELDS,
    GapReport,
    choose_leads,
    name_differences,
    setting_differences,
)
from gendistill.text import printable
from gendistill_evals import PROTOCOLS, ProtocolFamily


@dataclass(frozen=True, slots=True)
class Inversion:
    """Two runs that log-likelihood ranks one way and generation the other way.

    Attributes:
        task: Where; ``mean`` is over all tasks.
        best: The run that is better, by the family of the protocol.
        margin: By how many percentage points, by family.
        protocols: The protocols that disagree, by family.
    """

    task: str
    best: dict[ProtocolFamily, str]
    margin: dict[ProtocolFamily, float]
    protocols: dict[ProtocolFamily, str]


def rank_inversions(reports: Sequence[GapReport]) -> list[Inversion]:
    """List the pairs of runs that log-likelihood orders differently from generation.

    Compares the students' scores per task, and their mean over the tasks that every run has under both leading
    protocols, the first of each family that a student was scored under. Ties invert nothing.

    Raises:
        ReportError: The runs were not scored on the same items, prompts and settings.
    """
    for left, right in combinations(reports, 2):
        check_rankable(left, right)
    students = [task.student for report in reports for task in report.tasks]
    leads = choose_leads(name for name in PROTOCOLS if any(scores.get(name) for scores in students))
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    for report in reports:
        for task in report.tasks:
            ranked, written = (task.student.get(leads[family]) for family in ProtocolFamily)
            if ranked and written:
                scores.setdefault(task.task, {})[report.name] = (ranked.value, written.value)
    shared = [by_run for by_run in scores.values() if len(by_run) == len(reports)]
    if len(shared) > 1:
        scores["mean"] = {
            report.name: (
                math.fsum(by_run[report.name][0] for by_run in shared) / len(shared),
                math.fsum(by_run[report.name][1] for by_run in shared) / len(shared),
            )
            for report in reports
        }
    found = []
    for task, by_run in scores.items():
        for a, b in combinations(by_run, 2):
            ahead = dict(
                zip(ProtocolFamily, (by_run[a][0] - by_run[b][0], by_run[a][1] - by_run[b][1]), strict=True)
            )
            if math.prod(ahead.values()) < 0:
                best = {family: a if points > 0 else b for family, points in ahead.items()}
                margin = {family: abs(points) for family, points in ahead.items()}
                found.append(Inversion(task, best, margin, leads))
    return found


def check_rankable(left: GapReport, right: GapReport) -> None:
    """Refuse runs that were not scored on the same items, prompts and settings.

    Raises:
        ReportError: They were not.
    """
    others = {task.task: asdict(task) for task in right.tasks}
    different = [
        f"task {printable(task.task)}: {found}"
        for task in left.tasks
        if task.task in others and (found := name_differences(asdict(task), others[task.task], TASK_FIELDS))
    ]
    both_scored = left.tasks and right.tasks
    if both_scored and (settings := setting_differences(left.settings, right.settings)):
        different.append(f"settings: {settings}")
    # They would stand in one column, as if they were one protocol.
    different += [
        f"{family} by {mine} / {theirs}"
        for family in ProtocolFamily
        if (mine := _measured(left, family)) and (theirs := _measured(right, family)) and mine != theirs
    ]
    if different:
        raise ReportError(
            f"{printable(left.name)} and {printable(right.name)} were not scored alike: {'; '.join(different)}",
            hint="score both runs on the same items, prompts and settings",
        )


def _measured(report: GapReport, family: ProtocolFamily) -> str | None:
    """Return the leading protocol of a family if the student was scored under it."""
    name = report.leads[family]
    return name if any(task.student.get(name) for task in report.tasks) else None

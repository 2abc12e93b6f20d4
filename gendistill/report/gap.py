"""The gap between teacher and student under both protocols, and how much of it log-likelihood hides."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gendistill.errors import ReportError
from gendistill.report.run_files import PROTOCOLS, ROLES
from gendistill.text import printable
from gendistill_evals import stats

SCHEMA = 1
_TASK_FIELDS = ("kind", "metric", "items_sha256", "prompt_sha256", "limit", "n")
# Neither changes what is asked: the batch size is a matter of memory, and `overrode` lists what each model's
# own generation defaults would have been.
_FREE_SETTINGS = frozenset({"batch_size", "overrode"})

_SCORE_AGAIN = "score both models again with the same gendistill eval command"

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score in percent, or a difference of scores in percentage points, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class ByProtocol:
    """The same quantity under both protocols; None was not measured."""

    likelihood: Estimate | None = None
    generation: Estimate | None = None


@dataclass(frozen=True, slots=True)
class TaskGap:
    """Scores of one task. ``gap`` is student minus teacher; ``hidden`` is generation gap minus likelihood gap."""

    task: str
    kind: str
    metric: str
    n: int
    limit: int | None
    items_sha256: str
    prompt_sha256: str
    likelihood_reason: str | None
    teacher: ByProtocol
    student: ByProtocol
    gap: ByProtocol
    hidden: Estimate | None


@dataclass(frozen=True, slots=True)
class GapReport:
    """All tasks of one run."""

    name: str
    teacher: str | None
    student: str | None
    placement: str | None
    settings: dict[str, Any]
    tasks: tuple[TaskGap, ...]

    def mean_gap(self, protocol: str) -> Estimate | None:
        """Average the gap over the tasks measured under one protocol."""
        return _mean([getattr(task.gap, protocol) for task in self.tasks])

    @property
    def mean_hidden(self) -> Estimate | None:
        """Average the hidden gap over the tasks measured under both protocols."""
        return _mean([task.hidden for task in self.tasks])

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``gap.json``."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> GapReport:
        """Rebuild a report from ``gap.json``.

        Raises:
            ReportError: Another schema version, or fields that do not belong to it.
        """
        place, hint = "gap.json", "write it again with gendistill report <run>"
        found = content.get("schema") if isinstance(content, Mapping) else None
        if found != SCHEMA:
            raise ReportError(
                f"gap.json has schema {found!r:.80}, this version reads {SCHEMA}", where=place, hint=hint
            )
        fields = {key: value for key, value in content.items() if key != "schema"}
        try:
            report = TypeAdapter(cls).validate_json(json.dumps(fields), strict=True)
            same = json.loads(json.dumps(report.to_json())) == content
        except (ValidationError, RecursionError, TypeError, ValueError) as error:
            raise ReportError(
                f"gap.json does not fit schema {SCHEMA}: {error}", where=place, hint=hint
            ) from error
        if not same:
            raise ReportError(
                f"gap.json holds fields that do not belong to schema {SCHEMA}", where=place, hint=hint
            )
        return report


@dataclass(frozen=True, slots=True)
class Inversion:
    """Two runs that one protocol ranks one way and the other protocol the other way."""

    task: str
    best_by_likelihood: str
    best_by_generation: str
    likelihood_margin: float
    generation_margin: float


def compute_gap(
    teacher_results: Mapping[str, Any] | None,
    student_results: Mapping[str, Any] | None,
    samples: Mapping[str, Rows],
    *,
    name: str = "run",
    placement: str | None = None,
    resamples: int = 2000,
) -> GapReport:
    """Compare teacher and student item by item.

    Args:
        teacher_results: Content of ``eval/teacher/results.json``, or None if the teacher was not scored.
        student_results: The same for the student.
        samples: Rows of ``samples.jsonl`` by role, ``teacher`` and ``student``.
        name: Name of the run.
        placement: Placement of the student, for people.
        resamples: Bootstrap resamples behind every interval.
    Returns: One ``TaskGap`` per task that either model was scored on.
    Raises:
        ReportError: The two were scored on different items, prompts or settings, or the samples are not those
            that the results were computed from.
    """
    both = {"teacher": teacher_results, "student": student_results}
    results = {role: content for role, content in both.items() if content}
    if len(results) == 2:
        settings = (content.get("settings") or {} for content in results.values())
        if different := _setting_differences(*settings):
            raise ReportError(
                f"teacher and student were scored with different settings: {different} (teacher / student)",
                where="eval/teacher/results.json, eval/student/results.json",
                hint=_SCORE_AGAIN,
            )
    tasks = {
        role: {task["task"]: {**task, "limit": _limit(task)} for task in content["tasks"]}
        for role, content in results.items()
    }
    names = list(dict.fromkeys(task for found in tasks.values() for task in found))
    return GapReport(
        name=name,
        teacher=(teacher_results or {}).get("model"),
        student=(student_results or {}).get("model"),
        placement=placement,
        settings=dict(next(iter(results.values()), {}).get("settings") or {}),
        tasks=tuple(
            _task_gap(task, {role: by[task] for role, by in tasks.items() if task in by}, samples, resamples)
            for task in names
        ),
    )


def rank_inversions(reports: Sequence[GapReport]) -> list[Inversion]:
    """List the pairs of runs that log-likelihood orders differently from generation.

    Compares the students' scores per task, and their mean over the tasks that every run has under both
    protocols. Ties invert nothing.

    Raises:
        ReportError: The runs were not scored on the same items, prompts and settings.
    """
    for left, right in combinations(reports, 2):
        _check_rankable(left, right)
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    for report in reports:
        for task in report.tasks:
            if task.student.likelihood and task.student.generation:
                pair = (task.student.likelihood.value, task.student.generation.value)
                scores.setdefault(task.task, {})[report.name] = pair
    shared = [by_run for by_run in scores.values() if len(by_run) == len(reports)]
    if len(shared) > 1:
        scores["mean"] = {
            report.name: (
                math.fsum(by_run[report.name][0] for by_run in shared) / len(shared),
                math.fsum(by_run[report.name][1] for by_run in shared) / len(shared),
            )
            for report in reports
        }
    return [
        Inversion(task, *((a, b) if by_likelihood > 0 else (b, a)), abs(by_likelihood), abs(by_generation))
        for task, by_run in scores.items()
        for a, b in combinations(by_run, 2)
        if (by_likelihood := by_run[a][0] - by_run[b][0]) * (by_generation := by_run[a][1] - by_run[b][1]) < 0
    ]


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(
        f"{printable(key)} {left.get(key)!r:.80} / {right.get(key)!r:.80}"
        for key in keys
        if left.get(key) != right.get(key)
    )


def _setting_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    return _differences(left, right, sorted((left.keys() | right.keys()) - _FREE_SETTINGS))


def _check_rankable(left: GapReport, right: GapReport) -> None:
    theirs = {task.task: asdict(task) for task in right.tasks}
    different = [
        f"task {printable(task.task)}: {found}"
        for task in left.tasks
        if task.task in theirs and (found := _differences(asdict(task), theirs[task.task], _TASK_FIELDS))
    ]
    both_scored = left.tasks and right.tasks
    if both_scored and (settings := _setting_differences(left.settings, right.settings)):
        different.append(f"settings: {settings}")
    if different:
        raise ReportError(
            f"{printable(left.name)} and {printable(right.name)} were not scored alike: {'; '.join(different)}",
            hint="score both runs on the same items, prompts and settings",
        )


def _limit(task: Mapping[str, Any]) -> int | None:
    """Return the limit of a task's items if it left any out: with fewer items than that, it did not."""
    limit = task.get("limit")
    return limit if limit is not None and task["n"] >= limit else None


def _task_gap(task: str, found: Mapping[str, Any], samples: Mapping[str, Rows], resamples: int) -> TaskGap:
    if len(found) == 2 and (different := _differences(found["teacher"], found["student"], _TASK_FIELDS)):
        raise ReportError(
            f"teacher and student were not scored on the same items: {different} (teacher / student)",
            where=f"task {printable(task)}",
            hint=_SCORE_AGAIN,
        )
    correct = {
        (role, protocol): _correct(task, role, protocol, entry[protocol], samples.get(role, ()))
        for role, entry in found.items()
        for protocol in PROTOCOLS
        if entry.get(protocol)
    }
    vectors = _align(task, correct)
    entry = next(iter(found.values()))
    teacher_ll, teacher_gen, student_ll, student_gen = (
        vectors.get((role, protocol)) for role in ROLES for protocol in PROTOCOLS
    )

    def score(correct: list[float] | None) -> Estimate | None:
        return _points(stats.accuracy(correct, resamples=resamples)) if correct else None

    def gap(teacher: list[float] | None, student: list[float] | None) -> Estimate | None:
        return _points(stats.gap(teacher, student, resamples=resamples)) if teacher and student else None

    hidden = None
    if teacher_ll and teacher_gen and student_ll and student_gen:
        hidden = stats.hidden_gap(
            teacher_likelihood=teacher_ll,
            student_likelihood=student_ll,
            teacher_generation=teacher_gen,
            student_generation=student_gen,
            resamples=resamples,
        )
    return TaskGap(
        task=task,
        **{field: entry.get(field) for field in _TASK_FIELDS},
        likelihood_reason=entry.get("likelihood_reason"),
        teacher=ByProtocol(score(teacher_ll), score(teacher_gen)),
        student=ByProtocol(score(student_ll), score(student_gen)),
        gap=ByProtocol(gap(teacher_ll, student_ll), gap(teacher_gen, student_gen)),
        hidden=_points(hidden) if hidden else None,
    )


def _correct(task: str, role: str, protocol: str, score: Mapping[str, Any], rows: Rows) -> dict[str, float]:
    """Map item id to whether it was answered correctly, checked against the score in results.json."""
    scored = [row for row in rows if row["task"] == task and row.get(protocol)]
    correct = {str(row["id"]): float(row[protocol]["correct"]) for row in scored}
    mean = math.fsum(correct.values()) / max(len(correct), 1)
    if (
        len(correct) != score["n"]
        or len(scored) != len(correct)
        or not math.isclose(mean, score["value"], abs_tol=1e-6)
    ):
        given = f"{mean:.4f} over {len(correct)} items ({len(scored)} rows)" if scored else "no such score"
        raise ReportError(
            f"{protocol}: results.json says {score['value']:.4f} over {score['n']} items, samples.jsonl gives {given}",
            where=f"eval/{role}, task {printable(task)}",
            hint="score this model again: the two files are from different evaluations",
        )
    return correct


def _align(
    task: str, correct: Mapping[tuple[str, str], Mapping[str, float]]
) -> dict[tuple[str, str], list[float]]:
    """Order every vector by the same item ids, so that row i is one item everywhere."""
    if not correct:
        return {}
    ids = sorted(next(iter(correct.values())))
    for key, by_item in correct.items():
        if by_item.keys() != set(ids):
            raise ReportError(
                f"{' '.join(key)} covers other items than the rest of the scores",
                where=f"task {printable(task)}",
                hint=_SCORE_AGAIN,
            )
    return {key: [by_item[item] for item in ids] for key, by_item in correct.items()}


def _points(interval: stats.Interval) -> Estimate:
    return Estimate(100 * interval.value, 100 * interval.low, 100 * interval.high, interval.n)


def _mean(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Average over tasks, each counting once; tasks share no items, so their errors add in quadrature."""
    found = [estimate for estimate in estimates if estimate]
    if not found:
        return None
    value = math.fsum(each.value for each in found) / len(found)
    below = math.hypot(*(each.value - each.low for each in found)) / len(found)
    above = math.hypot(*(each.high - each.value for each in found)) / len(found)
    return Estimate(value, value - below, value + above, sum(each.n for each in found))

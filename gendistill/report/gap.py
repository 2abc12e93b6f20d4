"""The gap between teacher and student under every protocol, and how much of it log-likelihood hides."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gendistill.errors import ReportError
from gendistill.report.run_files import ROLES
from gendistill.text import printable
from gendistill_evals import PROTOCOLS, ProtocolFamily, stats
from gendistill_evals.protocols import lead_protocols

SCHEMA = 2
_TASK_FIELDS = ("kind", "metric", "items_sha256", "prompt_sha256", "limit", "n")
# Neither changes what is asked: the batch size is a matter of memory, and `overrode` lists what each model's
# own generation defaults would have been.
FREE_SETTINGS = frozenset({"batch_size", "overrode"})

_SCORE_AGAIN = "score both models again with the same gendistill eval command"

SampleRows = Sequence[Mapping[str, Any]]


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


# The same quantity under every protocol; None was not measured.
ByProtocol = dict[str, Estimate | None]


@dataclass(frozen=True, slots=True)
class TaskGap:
    """Scores of one task.

    Attributes:
        task, kind, metric, n, limit, items_sha256, prompt_sha256: As in ``results.json``.
        reasons: Why a protocol has no score, where that is known.
        teacher, student: Their scores.
        gap: Student minus teacher.
        hidden: The gap under the report's leading generation protocol minus that under its leading likelihood
            protocol.
    """

    task: str
    kind: str
    metric: str
    n: int
    limit: int | None
    items_sha256: str
    prompt_sha256: str
    reasons: dict[str, str]
    teacher: ByProtocol
    student: ByProtocol
    gap: ByProtocol
    hidden: Estimate | None


@dataclass(frozen=True, slots=True)
class GapReport:
    """All tasks of one run.

    Attributes:
        name: Of the run.
        teacher, student: What was scored; None was not.
        placement: Of the student, for people.
        settings: How both were scored.
        leads: The protocols that the hidden gap compares: by family, the first that anything was scored under.
        tasks: Their scores.
    """

    name: str
    teacher: str | None
    student: str | None
    placement: str | None
    settings: dict[str, Any]
    leads: dict[ProtocolFamily, str]
    tasks: tuple[TaskGap, ...]

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols that tables show: the leading ones, and others that a model was scored under."""
        return tuple(
            name
            for name in PROTOCOLS
            if name in self.leads.values()
            or any(scores.get(name) for task in self.tasks for scores in (task.teacher, task.student))
        )

    def mean_gap(self, protocol: str) -> Estimate | None:
        """Average the gap over the tasks measured under one protocol."""
        return _mean([task.gap.get(protocol) for task in self.tasks])

    @property
    def mean_hidden(self) -> Estimate | None:
        """Average the hidden gap over the tasks measured under both leading protocols."""
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


def compute_gap(
    teacher_results: Mapping[str, Any] | None,
    student_results: Mapping[str, Any] | None,
    samples: Mapping[str, SampleRows],
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
    entries = [entry for found in tasks.values() for entry in found.values()]
    leads = _leads(name for name in PROTOCOLS if any(entry.get(name) for entry in entries))
    return GapReport(
        name=name,
        teacher=(teacher_results or {}).get("model"),
        student=(student_results or {}).get("model"),
        placement=placement,
        settings=dict(next(iter(results.values()), {}).get("settings") or {}),
        leads=leads,
        tasks=tuple(
            _task_gap(
                task,
                {role: by[task] for role, by in tasks.items() if task in by},
                samples,
                leads=leads,
                resamples=resamples,
            )
            for task in names
        ),
    )


def rank_inversions(reports: Sequence[GapReport]) -> list[Inversion]:
    """List the pairs of runs that log-likelihood orders differently from generation.

    Compares the students' scores per task, and their mean over the tasks that every run has under both leading
    protocols, the first of each family that a student was scored under. Ties invert nothing.

    Raises:
        ReportError: The runs were not scored on the same items, prompts and settings.
    """
    for left, right in combinations(reports, 2):
        _check_rankable(left, right)
    students = [task.student for report in reports for task in report.tasks]
    leads = _leads(name for name in PROTOCOLS if any(scores.get(name) for scores in students))
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


def _leads(measured: Iterable[str]) -> dict[ProtocolFamily, str]:
    """Choose the protocols that a hidden gap compares: those measured first, else the first there are."""
    return lead_protocols() | lead_protocols(measured)


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(
        f"{printable(key)} {left.get(key)!r:.80} / {right.get(key)!r:.80}"
        for key in keys
        if left.get(key) != right.get(key)
    )


def _setting_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    return _differences(left, right, sorted((left.keys() | right.keys()) - FREE_SETTINGS))


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


def _task_gap(
    task: str,
    found: Mapping[str, Any],
    samples: Mapping[str, SampleRows],
    *,
    leads: Mapping[ProtocolFamily, str],
    resamples: int,
) -> TaskGap:
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

    def score(correct: list[float] | None) -> Estimate | None:
        return _points(stats.accuracy(correct)) if correct else None

    def gap(teacher: list[float] | None, student: list[float] | None) -> Estimate | None:
        return _points(stats.gap(teacher, student)) if teacher and student else None

    by_role = {role: {name: vectors.get((role, name)) for name in PROTOCOLS} for role in ROLES}
    teacher, student = (by_role[role] for role in ROLES)
    return TaskGap(
        task=task,
        **{field: entry.get(field) for field in _TASK_FIELDS},
        reasons={name: reason for name in PROTOCOLS if (reason := entry.get(f"{name}_reason"))},
        teacher={name: score(correct) for name, correct in teacher.items()},
        student={name: score(correct) for name, correct in student.items()},
        gap={name: gap(teacher[name], student[name]) for name in PROTOCOLS},
        hidden=_hidden(teacher, student, leads, resamples),
    )


def _hidden(
    teacher: Mapping[str, list[float] | None],
    student: Mapping[str, list[float] | None],
    leads: Mapping[ProtocolFamily, str],
    resamples: int,
) -> Estimate | None:
    ranked, written = leads[ProtocolFamily.LIKELIHOOD], leads[ProtocolFamily.GENERATION]
    teacher_ranked, student_ranked = teacher[ranked], student[ranked]
    teacher_written, student_written = teacher[written], student[written]
    if not (teacher_ranked and student_ranked and teacher_written and student_written):
        return None
    return _points(
        stats.hidden_gap(
            teacher_likelihood=teacher_ranked,
            student_likelihood=student_ranked,
            teacher_generation=teacher_written,
            student_generation=student_written,
        )
    )


def _correct(
    task: str, role: str, protocol: str, score: Mapping[str, Any], rows: SampleRows
) -> dict[str, float]:
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

"""The gap between teacher and student under every protocol, and how much of it log-likelihood hides."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gendistill.errors import ReportError
from gendistill.report.retention import PairedMeans, Ratio, bootstrapped, paired_means, retention
from gendistill.report.run_files import ROLES
from gendistill.text import printable
from gendistill_evals import PROTOCOLS, ProtocolFamily, stats
from gendistill_evals.protocols import lead_protocols

SCHEMA = 4
TASK_FIELDS = ("kind", "metric", "items_sha256", "prompt_sha256", "limit", "n")
# Neither changes what is asked: the batch size is a matter of memory, and `overrode` lists what each model's
# own generation defaults would have been.
FREE_SETTINGS = frozenset({"batch_size", "overrode"})

_SCORE_AGAIN = "score both models again with the same gendistill eval command"

SampleRows = Sequence[Mapping[str, Any]]
# above zero, and above a guess
_Means = tuple[PairedMeans, PairedMeans]


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
class Flips:
    """Items that one model gets right and the other does not.

    Attributes:
        lost: The teacher has them, the student does not.
        won: The student has them, the teacher does not.
    """

    lost: int
    won: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Student over teacher in percent: 100 keeps everything.

    Attributes:
        plain: Of the scores as they are.
        above_chance: Of what the scores have above a guess among the options; None without options.
        plain_bootstrap, above_chance_bootstrap: The same with the percentile interval of the paired bootstrap; None
            where the teacher is at chance in some resample.
    """

    plain: Estimate
    above_chance: Estimate | None
    plain_bootstrap: Estimate | None
    above_chance_bootstrap: Estimate | None


@dataclass(frozen=True, slots=True)
class TaskGap:
    """Scores of one task.

    Attributes:
        task, kind, metric, n, limit, items_sha256, prompt_sha256: As in ``results.json``.
        reasons: Why a protocol has no score, where that is known.
        teacher, student: Their scores.
        gap: Student minus teacher.
        flips: By protocol, items that the two do not share; None was not measured.
        chance: What a guess among the options scores in percent, 0 without options.
        kept: By protocol, student over teacher; None was not measured, or the teacher is no better than a guess.
        at_chance: The protocols under which the teacher is not told from a guess.
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
    flips: dict[str, Flips | None]
    chance: float
    kept: dict[str, Kept | None]
    at_chance: tuple[str, ...]
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
        kept: By protocol, student over teacher in the mean over the tasks that have a ``kept`` of their own.
    """

    name: str
    teacher: str | None
    student: str | None
    placement: str | None
    settings: dict[str, Any]
    leads: dict[ProtocolFamily, str]
    tasks: tuple[TaskGap, ...]
    kept: dict[str, Kept | None]

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


def compute_gap(
    teacher_results: Mapping[str, Any] | None,
    student_results: Mapping[str, Any] | None,
    samples: Mapping[str, SampleRows],
    *,
    name: str = "run",
    placement: str | None = None,
    resamples: int = stats.RESAMPLES,
) -> GapReport:
    """Compare teacher and student item by item.

    Args:
        teacher_results: Content of ``eval/teacher/results.json``, or None if the teacher was not scored.
        student_results: The same for the student.
        samples: Rows of ``samples.jsonl`` by role, ``teacher`` and ``student``.
        name: Name of the run.
        placement: Placement of the student, for people.
        resamples: Of the paired bootstrap.
    Returns: One ``TaskGap`` per task that either model was scored on.
    Raises:
        ReportError: The two were scored on different items, prompts or settings, or the samples are not those
            that the results were computed from.
    """
    both = {"teacher": teacher_results, "student": student_results}
    results = {role: content for role, content in both.items() if content}
    if len(results) == 2:
        settings = (content.get("settings") or {} for content in results.values())
        if different := setting_differences(*settings):
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
    leads = choose_leads(name for name in PROTOCOLS if any(entry.get(name) for entry in entries))
    found = [
        _task_gap(
            task,
            {role: by[task] for role, by in tasks.items() if task in by},
            samples,
            leads=leads,
            resamples=resamples,
        )
        for task in names
    ]
    return GapReport(
        name=name,
        teacher=(teacher_results or {}).get("model"),
        student=(student_results or {}).get("model"),
        placement=placement,
        settings=dict(next(iter(results.values()), {}).get("settings") or {}),
        leads=leads,
        tasks=tuple(task for task, _ in found),
        kept={
            name: _kept([means[name] for _, means in found if name in means], resamples) for name in PROTOCOLS
        },
    )


def choose_leads(measured: Iterable[str]) -> dict[ProtocolFamily, str]:
    """Choose the protocols that a hidden gap compares: those measured first, else the first there are."""
    return lead_protocols() | lead_protocols(measured)


def name_differences(left: Mapping[str, Any], right: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(
        f"{printable(key)} {left.get(key)!r:.80} / {right.get(key)!r:.80}"
        for key in keys
        if left.get(key) != right.get(key)
    )


def setting_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    return name_differences(left, right, sorted((left.keys() | right.keys()) - FREE_SETTINGS))


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
) -> tuple[TaskGap, dict[str, _Means]]:
    """Compare the two on one task; the means are those of the protocols under which the teacher beats a guess."""
    if len(found) == 2 and (different := name_differences(found["teacher"], found["student"], TASK_FIELDS)):
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
    ids, vectors = _align(task, correct)
    entry = next(iter(found.values()))
    rows = {str(row["id"]): row for role in ROLES for row in samples.get(role, ()) if row["task"] == task}
    groups = [str(rows[item].get("group", item)) for item in ids]
    if len(set(groups)) == 1 < len(groups):
        raise ReportError(
            f"all {len(groups):,} items share one question, from which nothing can be said about others",
            where=f"task {printable(task)}",
            hint="score items of more questions, with a greater --limit",
        )
    # None: every item stands for itself
    shared = groups if len(set(groups)) < len(groups) else None
    guesses = [_guess(rows[item]) for item in ids]
    by_role = {role: {name: vectors.get((role, name)) for name in PROTOCOLS} for role in ROLES}
    teacher, student = (by_role[role] for role in ROLES)
    both = {
        name: (right, other)
        for name in PROTOCOLS
        if (right := teacher[name]) is not None and (other := student[name]) is not None
    }
    means = {
        name: (paired_means(*pair, groups=groups), paired_means(*pair, floor=guesses, groups=groups))
        for name, pair in both.items()
    }
    kept = {name: _kept([means[name]], resamples) if name in means else None for name in PROTOCOLS}

    def score(correct: list[float] | None) -> Estimate | None:
        return _points(stats.accuracy(correct, groups=shared)) if correct else None

    gap = TaskGap(
        task=task,
        **{field: entry.get(field) for field in TASK_FIELDS},
        reasons={name: reason for name in PROTOCOLS if (reason := entry.get(f"{name}_reason"))},
        teacher={name: score(correct) for name, correct in teacher.items()},
        student={name: score(correct) for name, correct in student.items()},
        gap={
            name: _points(stats.gap(*both[name], groups=shared)) if name in both else None
            for name in PROTOCOLS
        },
        flips={name: _flips(*both[name]) if name in both else None for name in PROTOCOLS},
        chance=100 * math.fsum(guesses) / max(len(guesses), 1),
        kept=kept,
        at_chance=tuple(name for name in means if kept[name] is None),
        hidden=_hidden(teacher, student, leads, shared),
    )
    return gap, {name: pair for name, pair in means.items() if kept[name] is not None}


def _kept(parts: Sequence[_Means], resamples: int) -> Kept | None:
    """Divide student by teacher; None without parts, or if the teacher's mean is not told from a guess."""
    if not parts:
        return None
    plain_parts, above_parts = [zero for zero, _ in parts], [guess for _, guess in parts]
    plain, above = retention(plain_parts), retention(above_parts)
    if plain is None or above is None:
        return None
    corrected = any(zero.teacher != guess.teacher for zero, guess in parts)
    drawn = bootstrapped(plain_parts, resamples=resamples)
    drawn_above = bootstrapped(above_parts, resamples=resamples) if corrected else None
    return Kept(
        plain=_points(plain),
        above_chance=_points(above) if corrected else None,
        plain_bootstrap=_points(drawn) if drawn else None,
        above_chance_bootstrap=_points(drawn_above) if drawn_above else None,
    )


def _guess(row: Mapping[str, Any]) -> float:
    """Share of the items like this one that a guess among its options gets right."""
    options = row.get("options")
    return 1 / len(options) if options else 0.0


def _flips(teacher: Sequence[float], student: Sequence[float]) -> Flips:
    pairs = list(zip(teacher, student, strict=True))
    return Flips(
        sum(before > after for before, after in pairs), sum(before < after for before, after in pairs)
    )


def _hidden(
    teacher: Mapping[str, list[float] | None],
    student: Mapping[str, list[float] | None],
    leads: Mapping[ProtocolFamily, str],
    groups: Sequence[str] | None,
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
            groups=groups,
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
) -> tuple[list[str], dict[tuple[str, str], list[float]]]:
    """Order every vector by the same item ids, which are returned too: row i is one item everywhere."""
    if not correct:
        return [], {}
    ids = sorted(next(iter(correct.values())))
    for key, by_item in correct.items():
        if by_item.keys() != set(ids):
            raise ReportError(
                f"{' '.join(key)} covers other items than the rest of the scores",
                where=f"task {printable(task)}",
                hint=_SCORE_AGAIN,
            )
    return ids, {key: [by_item[item] for item in ids] for key, by_item in correct.items()}


def _points(interval: stats.Interval | Ratio) -> Estimate:
    return Estimate(100 * interval.value, 100 * interval.low, 100 * interval.high, interval.n)


def _mean(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Average over tasks, each counting once; tasks share no items, so their errors add in quadrature."""
    found = [estimate for estimate in estimates if estimate]
    if not found:
        return None
    mean = stats.mean_of([stats.Interval(each.value, each.low, each.high, each.n) for each in found])
    return Estimate(mean.value, mean.low, mean.high, mean.n)

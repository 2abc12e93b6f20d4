"""What lies behind the scores: choices that follow places, unread answers, loops, lengths, subjects. Imports no torch.

Evaluations describe themselves under ``diagnostics`` in ``results.json``. What is absent there is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gendistill.report.gap import GapReport
from gendistill.report.run_files import ROLES, RunFiles
from gendistill_evals import PROTOCOLS, ProtocolFamily, stats

_SHOWN_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class OrderRow:
    """What a model chose where the same options stood in other orders; shares from 0 to 1, None is not measured.

    Attributes:
        task, protocol, role: Of whom.
        n: Items that were seen in several orders.
        stickiness: Share whose chosen place never changed: 1 for a model that always chooses the first.
        content_changes: Share of pairs whose chosen option changed.
        flips: Share of pairs whose correctness changed: two models that differ by less may not differ.
    """

    task: str
    protocol: str
    role: str
    n: int
    stickiness: float | None
    content_changes: float | None
    flips: float | None


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """How the answers of one model to one task ended; shares from 0 to 1, lengths in tokens, None is not measured.

    Attributes:
        task, protocol, role: Of whom.
        n: Answers.
        unread: Answers that nothing could be read from.
        truncated: Answers that were cut off.
        ended: Share that the model ended by itself.
        looping: Share that end in a loop.
        mean, middle, long: Mean, median and 95th percentile of the lengths.
        examples: Answers that nothing could be read from, as id and text.
    """

    task: str
    protocol: str
    role: str
    n: int
    unread: int
    truncated: int
    ended: float
    looping: float | None
    mean: float
    middle: float | None
    long: float | None
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SubjectRow:
    """One subject of a task: scores in percent, the gap in percentage points with its interval."""

    subject: str
    n: int
    teacher: float
    student: float
    gap: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LengthTable:
    """Scores of one task by the length of its texts and the depth of what is asked for.

    Attributes:
        task, protocol: Of what.
        depths: In percent of the text, or None where depth is not chosen.
        rows: Length in tokens, and for each depth the share from 0 to 1 that teacher and student get right; None was
            not measured.
    """

    task: str
    protocol: str
    depths: tuple[float | None, ...]
    rows: tuple[tuple[int, tuple[tuple[float | None, float | None], ...]], ...]


def order_rows(run: RunFiles) -> list[OrderRow]:
    """List what is known of choices in other orders of the options."""
    rows = []
    for role in ROLES:
        for task, protocol, entry in _entries(run, role):
            order = _dict(entry.get("order"))
            if (count := _number(order.get("n"))) is not None:
                names = ("stickiness", "content_changes", "flips")
                shares = {name: _number(order.get(name)) for name in names}
                rows.append(OrderRow(task, protocol, role, int(count), **shares))
    return rows


def answer_rows(run: RunFiles, report: GapReport) -> list[AnswerRow]:
    """List how generation ended, per task, protocol and model."""
    rows = []
    for role in ROLES:
        described = {(task, protocol): entry for task, protocol, entry in _entries(run, role)}
        for task in run.results.get(role, {}).get("tasks", []):
            for name in report.protocols:
                score = task.get(name)
                if PROTOCOLS[name].family is not ProtocolFamily.GENERATION or not score:
                    continue
                found = _dict(_dict(described.get((task["task"], name))).get("answers"))
                lengths = _dict(found.get("num_tokens"))
                rows.append(
                    AnswerRow(
                        task["task"],
                        name,
                        role,
                        n=score["n"],
                        unread=score["extraction_failures"],
                        truncated=score["truncated"],
                        ended=score["eos_rate"],
                        looping=_number(found.get("looping")),
                        mean=score["mean_new_tokens"],
                        middle=_number(lengths.get("p50")),
                        long=_number(lengths.get("p95")),
                        examples=_examples(found.get("unread_examples")),
                    )
                )
    return rows


def subject_tables(run: RunFiles, report: GapReport) -> list[tuple[str, str, list[SubjectRow]]]:
    """Score every subject by itself, from the items that both models were scored on.

    Returns: Task, protocol and rows, the greatest losses first; for the report's leading protocols.
    """
    tables = []
    teacher = {(row["task"], str(row["id"])): row for row in run.samples["teacher"]}
    for task in report.tasks:
        rows = [
            row
            for row in run.samples["student"]
            if row["task"] == task.task and row.get("subject") is not None
        ]
        for protocol in report.leads.values():
            pairs: dict[str, list[tuple[float, float, str]]] = {}
            for row in rows:
                right = teacher.get((row["task"], str(row["id"])))
                if right and right.get(protocol) and row.get(protocol):
                    both = (float(right[protocol]["correct"]), float(row[protocol]["correct"]))
                    scores = (*both, str(row.get("group", row["id"])))
                    pairs.setdefault(str(row["subject"]), []).append(scores)
            if pairs:
                found = [_subject(subject, *zip(*scores, strict=True)) for subject, scores in pairs.items()]
                tables.append((task.task, protocol, sorted(found, key=lambda row: (row.gap, row.subject))))
    return tables


def length_tables(run: RunFiles) -> list[LengthTable]:
    """Set teacher beside student by length and depth, where texts of chosen lengths were asked about."""
    cells: dict[tuple[str, str], dict[tuple[int, float | None], dict[str, float]]] = {}
    for role in ROLES:
        for task, protocol, entry in _entries(run, role):
            for place, value in _heat(_dict(entry.get("lengths"))):
                cells.setdefault((task, protocol), {}).setdefault(place, {})[role] = value
    tables = []
    for (task, protocol), found in cells.items():
        depths = sorted({depth for _, depth in found}, key=lambda depth: (depth is not None, depth or 0.0))
        lengths = sorted({length for length, _ in found})
        rows = [
            (length, tuple(_both(found.get((length, depth), {})) for depth in depths)) for length in lengths
        ]
        tables.append(LengthTable(task, protocol, tuple(depths), tuple(rows)))
    return tables


def _both(shares: Mapping[str, float]) -> tuple[float | None, float | None]:
    return shares.get("teacher"), shares.get("student")


def _heat(table: Mapping[str, Any]) -> Iterator[tuple[tuple[int, float | None], float]]:
    """Walk through a table of lengths and depths, as far as it is one."""
    lengths, depths, values = (table.get(key) for key in ("lengths", "depths", "values"))
    if not (isinstance(lengths, list) and isinstance(depths, list) and isinstance(values, list)):
        return
    for length, row in zip(lengths, values, strict=False):
        if (tokens := _number(length)) is None or not isinstance(row, list):
            continue
        for depth, value in zip(depths, row, strict=False):
            if (share := _number(value)) is not None:
                yield (int(tokens), _number(depth)), share


def _subject(
    subject: str, teacher: tuple[float, ...], student: tuple[float, ...], groups: tuple[str, ...]
) -> SubjectRow:
    if len(set(groups)) == 1 < len(groups):
        # of one question nothing follows for others
        value = math.fsum(student) / len(student) - math.fsum(teacher) / len(teacher)
        gap = stats.Interval(value, -1.0, 1.0, len(teacher))
    else:
        gap = stats.gap(teacher, student, groups=groups)
    before, after = (100 * math.fsum(scores) / len(scores) for scores in (teacher, student))
    return SubjectRow(subject, len(teacher), before, after, 100 * gap.value, 100 * gap.low, 100 * gap.high)


def _entries(run: RunFiles, role: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Walk through what an evaluation says about itself, by task and protocol."""
    described = _dict(run.results.get(role, {}).get("diagnostics"))
    for task, protocols in _dict(described.get("tasks")).items():
        for protocol, entry in _dict(protocols).items():
            if protocol in PROTOCOLS:
                yield task, protocol, _dict(entry)


def _examples(found: Any) -> tuple[tuple[str, str], ...]:
    rows = [_dict(row) for row in found] if isinstance(found, list) else []
    shown = [(str(row["id"]), str(row["text"])) for row in rows if "id" in row and "text" in row]
    return tuple(shown[:_SHOWN_EXAMPLES])


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None

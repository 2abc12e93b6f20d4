"""The one place that lays out the gap table: terminal, markdown, CSV and HTML come from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from gendistill.report.gap import ByProtocol, Estimate, GapReport, Inversion
from gendistill.report.run_files import ROLES
from gendistill.text import printable
from gendistill_evals import PROTOCOLS, ProtocolFamily

NOT_MEASURED = "–"  # noqa: RUF001 an en dash is what tables use for an empty cell
# How a model is scored, as the verdict says it, most important first.
_HOW = {ProtocolFamily.GENERATION: "Writing its answers", ProtocolFamily.LIKELIHOOD: "By log-likelihood"}


class Cell(NamedTuple):
    """A value and the smaller text under it."""

    main: str
    detail: str = ""


def shown_protocols(reports: Sequence[GapReport]) -> tuple[str, ...]:
    """List the protocols that a table of several reports shows, in the order of ``PROTOCOLS``."""
    wanted = {name for report in reports for name in report.protocols}
    return tuple(name for name in PROTOCOLS if name in wanted)


def headers(protocols: Sequence[str]) -> list[str]:
    """List the heads of the columns of ``cell_rows``."""
    labels = [PROTOCOLS[name].label for name in protocols]
    scores = " / ".join(labels)
    roles = [f"{role} {scores}" for role in ROLES]
    return ["task", *roles, *(f"gap {label}" for label in labels), "hidden gap", "n"]


def raw_rows(report: GapReport, protocols: Sequence[str]) -> list[dict[str, Any]]:
    """List one flat row per task; percent and percentage points, None where not measured."""
    rows = []
    for task in report.tasks:
        row: dict[str, Any] = {"run": report.name, "task": task.task, "metric": task.metric}
        row |= {"n": task.n, "limit": task.limit}
        for name, pair in (("teacher", task.teacher), ("student", task.student), ("gap", task.gap)):
            for protocol in protocols:
                row |= _flat(f"{name}_{protocol}", pair.get(protocol))
        rows.append(row | _flat("hidden_gap", task.hidden))
    return rows


def _flat(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def cell_rows(report: GapReport, protocols: Sequence[str]) -> list[list[Cell]]:
    """Lay out the table for people: one list of cells per task, in the order of ``headers``."""
    return [
        [
            Cell(
                printable(task.task),
                ", ".join([printable(task.metric), *([f"LIMIT {task.limit}"] if task.limit else [])]),
            ),
            _scores(task.teacher, protocols),
            _scores(task.student, protocols),
            *(_difference(task.gap.get(protocol)) for protocol in protocols),
            _difference(task.hidden, mark=" !!"),
            Cell(f"{task.n:,}"),
        ]
        for task in report.tasks
    ]


def _scores(scores: ByProtocol, protocols: Sequence[str]) -> Cell:
    found = [scores.get(protocol) for protocol in protocols]
    return Cell(" / ".join(f"{score.value:.1f}" if score else NOT_MEASURED for score in found))


def _difference(estimate: Estimate | None, *, mark: str = "") -> Cell:
    if estimate is None:
        return Cell(NOT_MEASURED)
    flag = mark if estimate.excludes_zero else ""
    return Cell(signed(estimate.value) + flag, f"[{signed(estimate.low)}, {signed(estimate.high)}]")


def signed(points: float) -> str:
    """Write percentage points with one decimal and a sign; exact and rounded zero are both ``0.0``."""
    rounded = round(points, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def render_rich(report: GapReport) -> Table:
    """Lay out the table for a terminal, intervals under their values so that it fits 80 columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers(report.protocols)):
        table.add_column(header, justify="right" if index else "left")
    for cells in cell_rows(report, report.protocols):
        details = [("\n" + cell.detail, "dim") if cell.detail else "" for cell in cells]
        table.add_row(
            *(Text.assemble(cell.main, detail) for cell, detail in zip(cells, details, strict=True))
        )
    return table


def render_markdown(reports: Sequence[GapReport]) -> str:
    """Lay out one markdown table; with several runs, each row begins with its run."""
    several = len(reports) > 1
    protocols = shown_protocols(reports)
    heads = (["run"] if several else []) + headers(protocols)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for report in reports:
        for cells in cell_rows(report, protocols):
            texts = ([report.name] if several else []) + [" ".join(filter(None, cell)) for cell in cells]
            lines.append("| " + " | ".join(markdown_cell(text) for text in texts) + " |")
    return "\n".join(lines) + "\n"


def markdown_cell(text: str) -> str:
    """Write a text so that it stays inside its cell and is not HTML."""
    shown = printable(text, longest=1000)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def render_csv(reports: Sequence[GapReport]) -> str:
    """Write every number unrounded, one line per run and task; empty where not measured."""
    protocols = shown_protocols(reports)
    rows = [row for report in reports for row in raw_rows(report, protocols)]
    if not rows:
        return ""
    out = io.StringIO()
    # all text in quotes: a name may begin like a formula or hold a line end of any kind
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def verdict(report: GapReport) -> str:
    """Say in two sentences what the conversion cost, by generation and by log-likelihood."""
    sentences = []
    for family, how in _HOW.items():
        protocol = report.leads[family]
        gap = report.mean_gap(protocol)
        if gap is None:
            sentences.append(f"The {protocol} gap is not measured.")
            continue
        num_tasks = sum(task.gap.get(protocol) is not None for task in report.tasks)
        over = "1 task" if num_tasks == 1 else f"mean of {num_tasks} tasks"
        side = "below" if gap.value < 0 else "above"
        same = not round(gap.value, 1)
        change = "the same as its teacher" if same else f"{abs(gap.value):.1f} points {side} its teacher"
        noise = "" if same or gap.excludes_zero else "; within noise"
        interval = f"95% interval {signed(gap.low)} to {signed(gap.high)}"
        sentences.append(f"{how}, the student scores {change} ({interval}, {over}{noise}).")
    return " ".join(sentences)


def warnings(report: GapReport, *, roles: Sequence[str] = ROLES) -> list[str]:
    """List what a reader of the table must not miss, most important first.

    Args:
        report: Behind the table.
        roles: What should have been measured.
    """
    found = []
    ranked, written = report.leads[ProtocolFamily.LIKELIHOOD], report.leads[ProtocolFamily.GENERATION]
    for task in report.tasks:
        if task.hidden and task.hidden.high < 0:
            found.append(
                f"{printable(task.task)}: {ranked} hides {-task.hidden.value:.1f} pp of the {written} gap; "
                f'rank runs by "gap {PROTOCOLS[written].label}"'
            )
        elif task.hidden and task.hidden.low > 0:
            found.append(
                f"{printable(task.task)}: {ranked} overstates the {written} gap by {task.hidden.value:.1f} pp"
            )
    found += [
        f"{printable(task.task)}: the teacher writes no correct answer, so the {name} gap says nothing about "
        "the student"
        for task in report.tasks
        for name in report.protocols
        if PROTOCOLS[name].family is ProtocolFamily.GENERATION
        and (score := task.teacher.get(name))
        and not score.value
    ]
    limits = sorted({task.limit for task in report.tasks if task.limit})
    if limits:
        shown = ", ".join(str(limit) for limit in limits)
        found.append(f"LIMIT {shown}: scored on the first items only; not comparable with published numbers")
    found += [
        f"{printable(task.task)}: no {name} score ({printable(task.reasons[name])})"
        for task in report.tasks
        for name in report.protocols
        if name in task.reasons
    ]
    absent = [role for role in roles if getattr(report, role) is None]
    found += [f"{role}: not measured; score it with gendistill eval" for role in absent]
    return found


def inversion_lines(inversions: Sequence[Inversion]) -> list[str]:
    """Say every rank inversion in one line."""
    return [
        f"{printable(found.task)}: "
        + ", ".join(
            f"{found.protocols[family]} prefers {printable(found.best[family])} (by {found.margin[family]:.1f} pp)"
            for family in ProtocolFamily
        )
        for found in inversions
    ]

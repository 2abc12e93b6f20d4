"""The one place that lays out the gap table: terminal, markdown, CSV and HTML come from the same rows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from gendistill.report.gap import ByProtocol, Estimate, GapReport
from gendistill.report.ranking import Inversion
from gendistill.report.run_files import ROLES
from gendistill.text import printable
from gendistill_evals import PROTOCOLS, ProtocolFamily

NOT_MEASURED = "–"  # noqa: RUF001 an en dash is what tables use for an empty cell
# more do not fit beside one another
_MOST_PROTOCOLS = 4


class Cell(NamedTuple):
    """A value and the smaller text under it."""

    main: str
    detail: str = ""


def shown_protocols(reports: Sequence[GapReport]) -> tuple[str, ...]:
    """List the protocols that a table of several reports shows, in the order of ``PROTOCOLS``."""
    wanted = {name for report in reports for name in report.protocols}
    return tuple(name for name in PROTOCOLS if name in wanted)


def main_protocols(*reports: GapReport) -> tuple[str, ...]:
    """List the protocols of the first table: all of a few, else those that the hidden gaps compare."""
    shown = shown_protocols(reports)
    leads = {name for report in reports for name in report.leads.values()}
    return shown if len(shown) <= _MOST_PROTOCOLS else tuple(name for name in shown if name in leads)


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
        for protocol in protocols:
            kept, flips = task.kept.get(protocol), task.flips.get(protocol)
            row |= _flat(f"kept_{protocol}", kept.plain if kept else None)
            row |= _flat(f"kept_above_chance_{protocol}", kept.above_chance if kept else None)
            row |= _flat(f"kept_bootstrap_{protocol}", kept.plain_bootstrap if kept else None)
            row |= {f"lost_{protocol}": flips and flips.lost, f"won_{protocol}": flips and flips.won}
        rows.append(row | {"chance": task.chance} | _flat("hidden_gap", task.hidden))
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
            *(difference_cell(task.gap.get(protocol)) for protocol in protocols),
            difference_cell(task.hidden, mark=" !!"),
            Cell(f"{task.n:,}"),
        ]
        for task in report.tasks
    ]


PROTOCOL_HEADERS = (
    "task",
    "protocol",
    "teacher",
    "student",
    "gap",
    "kept",
    "above chance",
    "lost / won",
    "n",
)


def protocol_rows(report: GapReport) -> list[list[Cell]]:
    """Lay out every protocol side by side: one list of cells per task and protocol, under ``PROTOCOL_HEADERS``."""
    rows = []
    for task in report.tasks:
        for name in report.protocols:
            teacher, student = task.teacher.get(name), task.student.get(name)
            if teacher is None and student is None:
                continue
            kept, flips = task.kept.get(name), task.flips.get(name)
            at_chance = (
                Cell(NOT_MEASURED, "teacher at chance") if name in task.at_chance else Cell(NOT_MEASURED)
            )
            rows.append(
                [
                    Cell(printable(task.task)),
                    Cell(name),
                    _score(teacher),
                    _score(student),
                    difference_cell(task.gap.get(name)),
                    percent_cell(kept.plain) if kept else at_chance,
                    percent_cell(kept.above_chance if kept else None),
                    Cell(f"{flips.lost:,}\u202f/\u202f{flips.won:,}" if flips else NOT_MEASURED),
                    Cell(f"{(student or teacher or task).n:,}"),
                ]
            )
    return rows


def _score(score: Estimate | None) -> Cell:
    if score is None:
        return Cell(NOT_MEASURED)
    return Cell(f"{score.value:.1f}", f"[{score.low:.1f}, {score.high:.1f}]")


def percent_cell(kept: Estimate | None) -> Cell:
    """Write what is kept with its interval under it."""
    if kept is None:
        return Cell(NOT_MEASURED)
    return Cell(f"{kept.value:.0f}%", f"[{kept.low:.0f}, {kept.high:.0f}]")


def _scores(scores: ByProtocol, protocols: Sequence[str]) -> Cell:
    found = [scores.get(protocol) for protocol in protocols]
    return Cell(" / ".join(f"{score.value:.1f}" if score else NOT_MEASURED for score in found))


def difference_cell(estimate: Estimate | None, *, mark: str = "") -> Cell:
    """Write percentage points with their interval under them; ``mark`` follows those that exclude zero."""
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
    protocols = main_protocols(report)
    for index, header in enumerate(headers(protocols)):
        table.add_column(header, justify="right" if index else "left")
    for cells in cell_rows(report, protocols):
        details = [("\n" + cell.detail, "dim") if cell.detail else "" for cell in cells]
        table.add_row(
            *(Text.assemble(cell.main, detail) for cell, detail in zip(cells, details, strict=True))
        )
    return table


def render_protocols(report: GapReport) -> Table | None:
    """Lay out every protocol for a terminal; None if the first table shows them all."""
    if main_protocols(report) == report.protocols:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(PROTOCOL_HEADERS):
        table.add_column(header, justify="right" if index > 1 else "left")
    for cells in protocol_rows(report):
        table.add_row(*(Text(cell.main) for cell in cells))
    return table


def render_markdown(reports: Sequence[GapReport]) -> str:
    """Lay out one markdown table, and a second one of protocols that it has no room for; with several runs, each row
    begins with its run."""
    protocols = main_protocols(*reports)
    text = _markdown(headers(protocols), [(report, cell_rows(report, protocols)) for report in reports])
    if protocols != shown_protocols(reports):
        rows = [(report, protocol_rows(report)) for report in reports]
        text += "\n" + _markdown(PROTOCOL_HEADERS, rows)
    return text


def _markdown(heads: Sequence[str], rows: Sequence[tuple[GapReport, list[list[Cell]]]]) -> str:
    several = len(rows) > 1
    heads = [*(["run"] if several else []), *heads]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for report, laid_out in rows:
        for cells in laid_out:
            texts = ([report.name] if several else []) + [" ".join(filter(None, cell)) for cell in cells]
            lines.append("| " + " | ".join(markdown_cell(text) for text in texts) + " |")
    return "\n".join(lines) + "\n"


def render_latex(reports: Sequence[GapReport]) -> str:
    """Lay out one booktabs table; with several runs, each row begins with its run. Needs ``\\usepackage{booktabs}``."""
    several = len(reports) > 1
    protocols = main_protocols(*reports)
    heads = (["run"] if several else []) + headers(protocols)
    rows = [
        ([Cell(report.name)] if several else []) + cells
        for report in reports
        for cells in cell_rows(report, protocols)
    ]
    return latex_table(heads, rows, num_text=2 if several else 1)


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], *, num_text: int) -> str:
    """Write a booktabs table.

    Args:
        heads: Of the columns.
        rows: Details of cells stand behind their values, smaller.
        num_text: Columns of text, from the first; the others are numbers.
    """
    lines = [
        f"\\begin{{tabular}}{{{'l' * num_text}{'r' * (len(heads) - num_text)}}}",
        "\\toprule",
        " & ".join(map(latex_text, heads)) + r" \\",
        "\\midrule",
    ]
    for row in rows:
        cells = [
            latex_text(cell.main) + (f" {{\\scriptsize {latex_text(cell.detail)}}}" if cell.detail else "")
            for cell in row
        ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    # rows may begin with what an optional argument of the line end before them would begin with
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "`": r"\textasciigrave{}",
    "×": r"$\times$",  # noqa: RUF001
    NOT_MEASURED: "--",
}


def latex_text(text: str) -> str:
    """Write a text so that LaTeX sets it as it is; a minus before a number is set as one."""
    # two hyphens in a row would become a dash
    shown = "".join(_LATEX.get(sign, sign) for sign in printable(text, longest=1000)).replace("--", "{-}{-}")
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", shown)


def markdown_cell(text: str) -> str:
    """Write a text so that it stays inside its cell and is not HTML."""
    shown = printable(text, longest=1000)
    for sign, written in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("](", "]\\("),
        ("`", "\\`"),
    ):
        shown = shown.replace(sign, written)
    return shown


def render_csv(reports: Sequence[GapReport]) -> str:
    """Write every number unrounded, one line per run and task; empty where not measured."""
    protocols = shown_protocols(reports)
    rows = [row for report in reports for row in raw_rows(report, protocols)]
    return csv_text(rows)


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


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows with the same columns as CSV, names as they are; empty without rows."""
    if not rows:
        return ""
    out = io.StringIO()
    # all text in quotes: a name may hold a line end of any kind
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()

"""The one place that lays out a comparison: terminal, Markdown, CSV, LaTeX and HTML come from the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from gendistill.comparison.values import Comparison, Estimate, PairScore
from gendistill.comparison.wording import p_text
from gendistill.report.tables import NOT_MEASURED, Cell, csv_text, latex_text, markdown_cell, signed
from gendistill.text import printable

HEADERS = ("task", "first", "second", "gap", "McNemar", "flips", "verdict", "n")


def title(row: PairScore) -> str:
    """Name the pair and the measure of a row."""
    return f"{printable(row.second)} against {printable(row.first)}, {printable(row.measure)}"


def cells(row: PairScore) -> list[Cell]:
    """Lay out one row for people, in the order of ``HEADERS``."""
    groups = f"{row.num_groups:,} questions" if row.num_groups < row.n else ""
    floor = "" if row.flips_floor is None else f"floor {row.flips_floor:.1f}%"
    return [
        Cell(printable(row.task), ""),
        Cell(f"{row.first_score.value:.1f}", _interval(row.first_score)),
        Cell(f"{row.second_score.value:.1f}", _interval(row.second_score)),
        Cell(signed(row.gap.value), f"[{signed(row.gap.low)}, {signed(row.gap.high)}]"),
        Cell(NOT_MEASURED)
        if row.p is None
        else Cell(p_text(row.p).removeprefix("p = ").removeprefix("p "), _holm(row)),
        Cell(f"-{row.lost:,} +{row.gained:,}", floor),
        Cell(str(row.verdict), ""),
        Cell(f"{row.n:,}", groups),
    ]


def _holm(row: PairScore) -> str:
    if row.p_holm is None or row.p_holm == row.p:
        return ""
    return f"Holm {p_text(row.p_holm).removeprefix('p = ').removeprefix('p ')}"


def _interval(score: Estimate) -> str:
    return f"[{score.low:.1f}, {score.high:.1f}]"


def sections(comparison: Comparison) -> list[tuple[str, list[PairScore]]]:
    """Group the rows by pair and measure, each with its title."""
    found: dict[tuple[str, str, str], list[PairScore]] = {}
    for row in comparison.pairs:
        found.setdefault((row.first, row.second, row.measure), []).append(row)
    return [(title(rows[0]), rows) for rows in found.values()]


def render_rich(rows: Sequence[PairScore]) -> Table:
    """Lay out one section for a terminal, intervals under their values so that it fits 100 columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in HEADERS:
        table.add_column(
            header, justify="left" if header in ("task", "verdict") else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(
            *(
                Text.assemble(cell.main, ("\n" + cell.detail, "dim") if cell.detail else "")
                for cell in cells(row)
            )
        )
    return table


def render_markdown(comparison: Comparison) -> str:
    """Lay out one Markdown table with a row per pair, measure and task."""
    heads = ["pair", *HEADERS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, rows in sections(comparison):
        for row in rows:
            texts = [name, *(" ".join(filter(None, cell)) for cell in cells(row))]
            lines.append("| " + " | ".join(markdown_cell(text) for text in texts) + " |")
    return "\n".join(lines) + "\n"


def flat_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """List one flat row per pair, measure and task; percent and points, None where not measured."""
    return [_flat(row) for row in comparison.pairs]


def _flat(row: PairScore) -> dict[str, Any]:
    found: dict[str, Any] = {
        "first": row.first, "second": row.second, "task": row.task, "measure": row.measure, "family": str(row.family),
        "n": row.n, "num_groups": row.num_groups,
    }  # fmt: skip
    for name, score in (
        ("first_score", row.first_score),
        ("second_score", row.second_score),
        ("gap", row.gap),
    ):
        found |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    low, high = row.bootstrap or (None, None)
    return found | {
        "gap_bootstrap_low": low, "gap_bootstrap_high": high, "gained": row.gained, "lost": row.lost,
        "mcnemar_p": row.p, "mcnemar_mid_p": row.mid_p, "mcnemar_p_holm": row.p_holm, "flips": row.flips,
        "flips_floor": row.flips_floor, "margin": row.margin, "not_inferior_p": row.not_inferior_p,
        "equivalent_p": row.equivalent_p, "detectable": row.detectable, "power": row.power,
        "items_needed": row.items_needed, "verdict": str(row.verdict),
    }  # fmt: skip


def render_csv(comparison: Comparison) -> str:
    """Write every number unrounded, one line per pair, measure and task; empty where not measured."""
    return csv_text(flat_rows(comparison))


def render_latex(comparison: Comparison) -> str:
    """Lay out a table for a paper; it needs the package booktabs, and ``\\usepackage[T1]{fontenc}`` for odd names."""
    lines = [r"\begin{tabular}{llrrrrrl}", r"\toprule"]
    lines.append(r"Task & Pair & First & Second & Gap [95\% CI] & $p$ & $n$ & Verdict \\")
    for name, rows in sections(comparison):
        lines.append(r"\midrule")
        for row in rows:
            gap = f"{_tex_number(row.gap.value)} [{_tex_number(row.gap.low)}, {_tex_number(row.gap.high)}]"
            p = (
                "--"
                if row.p_holm is None
                else f"${p_text(row.p_holm).removeprefix('p = ').removeprefix('p ')}$"
            )
            scores = f"{row.first_score.value:.1f} & {row.second_score.value:.1f}"
            lines.append(
                f"{latex_text(row.task)} & {latex_text(name)} & {scores} & {gap} & {p} & {row.n} & "
                rf"{latex_text(str(row.verdict))} \\"
            )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex_number(points: float) -> str:
    return f"${signed(points)}$"

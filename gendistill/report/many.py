"""One page for many students: what they chose differently, and where log-likelihood and generation disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gendistill.errors import ReportError
from gendistill.report import tables
from gendistill.report.choices import (
    Effect,
    Setting,
    differing_settings,
    mean_differences,
    single_effects,
    student_differences,
)
from gendistill.report.gap import GapReport
from gendistill.report.html import page_environment, perplexity
from gendistill.report.plots import Drawing, Look, plot_effects, plot_scatter
from gendistill.report.ranking import Inversion
from gendistill.report.run_files import RunFiles
from gendistill.report.tables import Cell
from gendistill.report.write import ReportPaths, RunComparison, replace_files
from gendistill.text import printable
from gendistill_evals import PROTOCOLS, ProtocolFamily

_MOST_SETTINGS = 6
_FILES = ("index.html", "table.md", "table.csv", "table.tex")
FIGURES = ("scatter.", "effects.")


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two runs that change places between the protocols, and whether both orders are told from noise."""

    inversion: Inversion
    sure: bool


def write_comparison(
    comparison: RunComparison, folder: Path, *, serif: bool = False, width: float | None = None
) -> ReportPaths:
    """Write the page of several runs, their table as markdown, CSV and LaTeX, and the figures.

    Args:
        comparison: The runs.
        folder: Where; made if missing.
        serif, width: How figures are set, as ``plots.Look`` says.
    Returns: Paths of everything written; ``gap`` is the CSV, which holds every number.
    Raises:
        ReportError: The folder is a run's.
        OutputError: It cannot be written.
    """
    if any((folder / name).exists() for name in ("manifest.json", "recipe.yaml")):
        raise ReportError(
            "the folder is a run's own, and a comparison would be taken for a part of it",
            where=str(folder),
            hint="choose another folder with --out",
        )
    runs, reports = comparison.runs, comparison.reports
    settings = differing_settings(runs)
    effects = single_effects(runs, reports, settings)
    found = disagreements(comparison)
    figures = _figures(comparison, effects, Look(serif, width))
    heads, rows = run_table(runs, reports, settings)
    protocols = tables.main_protocols(*reports)
    texts = {
        "index.html": page_environment()
        .get_template("many.html.j2")
        .render(
            reports=reports,
            headline=headline(comparison, found),
            headers=heads,
            table=rows,
            num_words=1 + min(len(settings), _MOST_SETTINGS),
            left_out=[setting.name for setting in settings[_MOST_SETTINGS:]],
            effects=effects,
            families={"likelihood": ProtocolFamily.LIKELIHOOD, "generation": ProtocolFamily.GENERATION},
            settings=settings,
            disagreements=found,
            figures=figures,
            tasks=[(report, tables.cell_rows(report, protocols)) for report in reports],
            task_headers=tables.headers(protocols),
            leads={family: PROTOCOLS[name].label for family, name in reports[0].leads.items()},
        ),
        "table.md": _markdown(heads, rows) + "\n" + comparison.to_markdown(),
        "table.csv": _csv(runs, reports, settings),
        "table.tex": tables.latex_table(heads, rows, num_text=1 + min(len(settings), _MOST_SETTINGS)),
    }
    drawn = {
        folder / file: content for name, each in figures.items() for file, content in each.files(name).items()
    }
    written = {folder / name: text.encode("utf-8", errors="replace") for name, text in texts.items()}
    replace_files(folder, drawn | written, figures=FIGURES)
    page, markdown, table, latex = (folder / name for name in _FILES)
    return ReportPaths(page=page, gap=table, markdown=markdown, csv=table, latex=latex, figures=tuple(drawn))


def _figures(comparison: RunComparison, effects: Sequence[Effect], look: Look) -> Mapping[str, Drawing]:
    pairs = {frozenset(found.best.values()) for found in comparison.inversions}
    found = {
        "scatter": plot_scatter(comparison.reports, pairs, look),
        "effects": plot_effects(effects, look),
    }
    return {name: drawing for name, drawing in found.items() if drawing}


def disagreements(comparison: RunComparison) -> list[Disagreement]:
    """Say of every inversion whether the two students differ beyond noise under both protocols, each its own way."""
    runs = dict(zip((report.name for report in comparison.reports), comparison.runs, strict=True))
    found = []
    for inversion in comparison.inversions:
        first, second = inversion.best.values()
        sure = True
        for protocol in inversion.protocols.values():
            if inversion.task == "mean" and not any(
                task.task == "mean" for report in comparison.reports for task in report.tasks
            ):
                means = mean_differences(runs[first], runs[second], comparison.reports)
                gap = means[PROTOCOLS[protocol].family]
                sure = sure and gap is not None and gap.excludes_zero
            else:
                task = student_differences(runs[first], runs[second], protocol).get(inversion.task)
                sure = sure and task is not None and (task.low > 0 or task.high < 0)
        found.append(Disagreement(inversion, sure))
    return sorted(found, key=lambda each: not each.sure)


def headline(comparison: RunComparison, found: Sequence[Disagreement]) -> list[str]:
    """Say which student each protocol prefers, and how far that is known."""
    sentences = []
    runs = dict(zip((report.name for report in comparison.reports), comparison.runs, strict=True))
    best = {}
    for family, how in (
        (ProtocolFamily.GENERATION, "Writing their answers"),
        (ProtocolFamily.LIKELIHOOD, "By log-likelihood"),
    ):
        gaps = {
            report.name: gap
            for report in comparison.reports
            if (gap := report.mean_gap(report.leads[family])) is not None
        }
        if len(gaps) < 2:
            sentences.append(f"{how}, fewer than two students are measured against their teacher.")
            continue
        first, second = sorted(gaps, key=lambda name: -gaps[name].value)[:2]
        best[family] = first
        ahead = mean_differences(runs[second], runs[first], comparison.reports)[family]
        sure = ahead is not None and ahead.low > 0
        known = (
            f"surely before {printable(second)}" if sure else f"which {printable(second)} cannot be told from"
        )
        gap = gaps[first]
        sentences.append(
            f"{how}, {printable(first)} comes first ({tables.signed(gap.value)} points to its teacher, 95% interval "
            f"{tables.signed(gap.low)} to {tables.signed(gap.high)}), {known}."
        )
    pairs = {frozenset(each.inversion.best.values()) for each in found}
    sure = {frozenset(each.inversion.best.values()) for each in found if each.sure}
    total = len(comparison.reports) * (len(comparison.reports) - 1) // 2
    if pairs:
        sentences.append(
            f"{len(pairs)} of {total} {'pair' if total == 1 else 'pairs'} of students change places between "
            f"log-likelihood and generation, {len(sure) or 'none'} of them beyond noise."
        )
    elif len(best) == 2:
        sentences.append("No two of these students change places between log-likelihood and generation.")
    return sentences


def run_table(
    runs: Sequence[RunFiles], reports: Sequence[GapReport], settings: Sequence[Setting]
) -> tuple[list[str], list[list[Cell]]]:
    """Lay out a row per run: its name, the settings that differ, and what they led to."""
    shown = settings[:_MOST_SETTINGS]
    ranked, written = (PROTOCOLS[reports[0].leads[family]].label for family in ProtocolFamily)
    heads = ["run", *(setting.name for setting in shown)]
    heads += [f"gap {ranked}", f"gap {written}", "hidden gap", "kept", "perplexity", "KL"]
    rows = []
    for index, (run, report) in enumerate(zip(runs, reports, strict=True)):
        last = run.heldout[-1][1] if run.heldout else None
        kept = report.kept.get(report.leads[ProtocolFamily.GENERATION])
        gaps = [report.mean_gap(report.leads[family]) for family in ProtocolFamily]
        rows.append(
            [
                Cell(printable(report.name)),
                *(Cell(printable(setting.values[index], longest=60)) for setting in shown),
                *(tables.difference_cell(gap) for gap in gaps),
                tables.difference_cell(report.mean_hidden, mark=" !!"),
                tables.percent_cell(kept.plain if kept else None),
                Cell(
                    f"× {perplexity(last['student_ce'] - last['teacher_ce']):.3g}"  # noqa: RUF001
                    if last
                    else tables.NOT_MEASURED
                ),
                Cell(f"{last['kl']:.3g}" if last else tables.NOT_MEASURED),
            ]
        )
    return heads, rows


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = ["| " + " | ".join(map(tables.markdown_cell, heads)) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        lines.append(
            "| " + " | ".join(tables.markdown_cell(" ".join(filter(None, cell))) for cell in row) + " |"
        )
    return "\n".join(lines) + "\n"


def _csv(runs: Sequence[RunFiles], reports: Sequence[GapReport], settings: Sequence[Setting]) -> str:
    """Write a line per run and task, with the settings that differ and the held-out scores."""
    protocols = tables.shown_protocols(reports)
    rows = []
    for index, (run, report) in enumerate(zip(runs, reports, strict=True)):
        last = run.heldout[-1][1] if run.heldout else {}
        own = {setting.name: setting.values[index] for setting in settings}
        own |= {f"heldout_{name}": last.get(name) for name in ("kl", "student_ce", "teacher_ce")}
        for row in tables.raw_rows(report, protocols):
            rows.append(row | own)
    return tables.csv_text(rows)

"""Write a run's report, show it in a terminal, and compare several runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from gendistill.errors import ReportError
from gendistill.paths import RunDir, write_json, write_text, writing
from gendistill.report import tables
from gendistill.report.gap import GapReport, Inversion, compute_gap, rank_inversions
from gendistill.report.run_files import RunFiles, read_run


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """Name the files of a written report."""

    page: Path
    gap: Path
    markdown: Path
    csv: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Hold several runs' reports and where the two protocols disagree on their order."""

    reports: tuple[GapReport, ...]
    inversions: tuple[Inversion, ...]

    def to_markdown(self) -> str:
        """Lay out one table of all runs, followed by the rank inversions."""
        lines = tables.inversion_lines(self.inversions) or ["both protocols rank these runs alike"]
        return tables.render_markdown(self.reports) + "\n" + "".join(f"- {line}\n" for line in lines)


def gap_report(run: RunFiles) -> GapReport:
    """Compute the gap report of a run that has been read."""
    return compute_gap(
        run.results.get("teacher"),
        run.results.get("student"),
        run.samples,
        name=run.name,
        placement=str(run.placement) if run.placement else None,
        resamples=run.resamples,
    )


def write_report(run_dir: Path) -> ReportPaths:
    """Write ``report/`` of a run: the page, gap.json, the table as markdown and CSV, and the figures.

    Equal run files give equal report files.

    Args:
        run_dir: The run folder.
    Returns: Paths of everything written.
    Raises:
        ReportError: The files are missing or unreadable, or teacher and student are not comparable.
        OutputError: The report folder cannot be written.
    """
    # Imported here: a table in the terminal needs neither templates nor figures.
    from gendistill.report.html import render_page
    from gendistill.report.plots import plot_run

    run = read_run(run_dir)
    report = gap_report(run)
    figures = plot_run(run, report)
    folder = RunDir(run.root).report
    paths = ReportPaths(
        page=folder / "index.html",
        gap=folder / "gap.json",
        markdown=folder / "table.md",
        csv=folder / "table.csv",
        figures=tuple(folder / f"{name}.png" for name in figures),
    )
    page = render_page(run, report, figures)
    write_json(paths.gap, report.to_json())
    write_text(paths.markdown, tables.render_markdown([report]))
    write_text(paths.csv, tables.render_csv([report]))
    for path, png in zip(paths.figures, figures.values(), strict=True):
        _write_bytes(path, png)
    write_text(paths.page, page)
    return paths


def _write_bytes(path: Path, content: bytes) -> None:
    with writing(path):
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(path)


def render_terminal(run_dir: Path, *, console: Console | None = None) -> GapReport:
    """Print the gap table, the verdict and the warnings of a run.

    Args:
        run_dir: The run folder.
        console: Where to print; standard output if None.
    Returns: The report that was printed.
    Raises:
        ReportError: The files are missing or unreadable, or teacher and student are not comparable.
    """
    report = gap_report(read_run(run_dir))
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    if report.tasks:
        console.print(tables.render_rich(report))
    console.print(tables.verdict(report), markup=False, soft_wrap=True)
    for warning in tables.warnings(report):
        console.print(f"warn     {warning}", markup=False, soft_wrap=True)
    return report


def compare_reports(run_dirs: Sequence[Path]) -> Comparison:
    """Compare the students of several runs that were scored on the same items.

    Args:
        run_dirs: At least two run folders; runs of the same name are told apart by their folder.
    Raises:
        ReportError: Fewer than two runs, or runs that were scored on different items, prompts or settings.
    """
    if len(run_dirs) < 2:
        raise ReportError(
            "a comparison needs at least two run folders", hint="gendistill report runs/a runs/b"
        )
    reports = [gap_report(read_run(run_dir)) for run_dir in run_dirs]
    names = Counter(report.name for report in reports)
    reports = [
        replace(report, name=str(run_dir)) if names[report.name] > 1 else report
        for run_dir, report in zip(run_dirs, reports, strict=True)
    ]
    return Comparison(tuple(reports), tuple(rank_inversions(reports)))

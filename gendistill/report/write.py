"""Write a run's report, show it in a terminal, and compare several runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gendistill.errors import ReportError
from gendistill.paths import RunDir, writing
from gendistill.report import tables, verdicts
from gendistill.report.gap import GapReport, compute_gap
from gendistill.report.ranking import Inversion, rank_inversions
from gendistill.report.run_files import RunFiles, read_run
from gendistill.text import printable
from gendistill_evals.stats import RESAMPLES

_FILES = ("index.html", "gap.json", "table.md", "table.csv", "table.tex")
# how the names of figures begin, and end
_FIGURES = ("gap.", "placement.", "heldout.", "positions.", "cache.", "loss-", "watch-")
_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """The files of a written report."""

    page: Path
    gap: Path
    markdown: Path
    csv: Path
    latex: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Several runs' files and reports, and where log-likelihood and generation disagree on their order."""

    runs: tuple[RunFiles, ...]
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
        resamples=(run.recipe.get("eval") or {}).get("bootstrap", RESAMPLES),
    )


def write_report(run_dir: Path, *, serif: bool = False, width: float | None = None) -> ReportPaths:
    """Write ``report/`` of a run: the page, gap.json, the table as markdown, CSV and LaTeX, and the figures.

    Equal run files give equal report files.

    Args:
        run_dir: The run folder.
        serif, width: How figures are set, as ``plots.Look`` says.
    Returns: Paths of everything written.
    Raises:
        ReportError: The files are missing or unreadable, or teacher and student are not comparable.
        OutputError: The report folder cannot be written.
    """
    # Imported here: a table in the terminal needs neither templates nor figures.
    from gendistill.report.html import render_page
    from gendistill.report.plots import Look, plot_run

    run = read_run(run_dir)
    report = gap_report(run)
    figures = plot_run(run, report, Look(serif, width))
    folder = RunDir(run.root).report
    page, gap_file, markdown, csv, latex = (folder / name for name in _FILES)
    drawn = {
        folder / file: content for name, each in figures.items() for file, content in each.files(name).items()
    }
    paths = ReportPaths(
        page=page,
        gap=gap_file,
        markdown=markdown,
        csv=csv,
        latex=latex,
        figures=tuple(drawn),
    )
    gap = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    texts = {
        paths.gap: gap,
        paths.markdown: tables.render_markdown([report]),
        paths.csv: tables.render_csv([report]),
        paths.latex: tables.render_latex([report]),
        paths.page: render_page(run, report, figures),
    }
    # a model may emit half of a character pair; such text is kept, with "?" for it
    contents = {path: text.encode("utf-8", errors="replace") for path, text in texts.items()}
    replace_files(folder, drawn | contents)
    return paths


def replace_files(
    folder: Path, contents: Mapping[Path, bytes], *, figures: tuple[str, ...] = _FIGURES
) -> None:
    """Write all files beside the old ones before the first takes its place; figures of an older report go."""
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in contents}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for path, partial in partials.items():
                if path.is_dir():
                    raise NotADirectoryError(
                        errno.ENOTDIR, "a folder is in the place of this file", str(path)
                    )
                partial.write_bytes(contents[path])
            for path, partial in partials.items():
                partial.replace(path)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
        _unlink_figures(folder, kept=contents, figures=figures)


def _unlink_figures(folder: Path, *, kept: Collection[Path], figures: tuple[str, ...]) -> None:
    for figure in folder.glob("*"):
        if figure.suffix in _FORMATS and figure not in kept and figure.name.startswith(figures):
            figure.unlink()


def clear_report(run_dir: Path) -> None:
    """Remove the files of a report, because the run shows something else now; what others put there stays."""
    folder = RunDir(run_dir).report
    with writing(folder):
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        _unlink_figures(folder, kept=(), figures=_FIGURES)


def render_terminal(run_dir: Path, *, console: Console | None = None) -> GapReport:
    """Print the gap table, the verdict and the warnings of a run.

    Args:
        run_dir: The run folder.
        console: Where to print; standard output if None.
    Returns: The report that was printed.
    Raises:
        ReportError: The files are missing or unreadable, or teacher and student are not comparable.
    """
    run = read_run(run_dir)
    report = gap_report(run)
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    if report.tasks:
        console.print(tables.render_rich(report))
    if (protocols := tables.render_protocols(report)) is not None:
        console.print(protocols)
    console.print(Text(verdicts.verdict(report)), soft_wrap=True)
    for warning in [
        *verdicts.warnings(report),
        *verdicts.stage_remarks(run),
        *(printable(each, longest=2000) for each in run.warnings),
    ]:
        console.print(Text(f"warn     {warning}"), soft_wrap=True)
    return report


def compare_reports(run_dirs: Sequence[Path]) -> RunComparison:
    """Compare the students of several runs that were scored on the same items.

    Args:
        run_dirs: At least two run folders; if two runs have the same name, all go by their folders.
    Raises:
        ReportError: Fewer than two runs, one run twice, or runs that were scored on different items, prompts or
            settings.
    """
    if len(run_dirs) < 2:
        raise ReportError(
            "a comparison needs at least two run folders", hint="gendistill report runs/a runs/b"
        )
    folders = [os.path.realpath(run_dir) for run_dir in run_dirs]
    if len(set(folders)) < len(folders):
        raise ReportError(
            f"the same run folder is given twice: {', '.join(printable(str(run_dir)) for run_dir in run_dirs)}",
            hint="give different run folders: gendistill report runs/a runs/b",
        )
    runs = [read_run(run_dir) for run_dir in run_dirs]
    reports = [gap_report(run) for run in runs]
    if len({report.name for report in reports}) < len(reports):
        reports = [
            replace(report, name=str(run_dir)) for run_dir, report in zip(run_dirs, reports, strict=True)
        ]
    return RunComparison(tuple(runs), tuple(reports), tuple(rank_inversions(reports)))

"""Tables, plots and the page, from run files alone. Imports no torch."""

from __future__ import annotations

from gendistill.report.gap import GapReport, TaskGap, compute_gap
from gendistill.report.ranking import Inversion, rank_inversions
from gendistill.report.write import (
    ReportPaths,
    RunComparison,
    clear_report,
    compare_reports,
    render_terminal,
    write_report,
)

__all__ = [
    "GapReport",
    "Inversion",
    "ReportPaths",
    "RunComparison",
    "TaskGap",
    "clear_report",
    "compare_reports",
    "compute_gap",
    "rank_inversions",
    "render_terminal",
    "write_report",
]

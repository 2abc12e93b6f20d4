"""Compare models item by item, from files of evaluations alone: ours or lm-eval's. Imports no torch."""

from __future__ import annotations

from gendistill.comparison.compute import compare
from gendistill.comparison.load import Scores, load_scores
from gendistill.comparison.values import Comparison, PairScore
from gendistill.comparison.write import ComparisonPaths, render_terminal, write_comparison

__all__ = [
    "Comparison",
    "ComparisonPaths",
    "PairScore",
    "Scores",
    "compare",
    "load_scores",
    "render_terminal",
    "write_comparison",
]

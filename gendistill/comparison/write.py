"""Write a comparison to a folder, and show it in a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gendistill.comparison import tables, wording
from gendistill.comparison.values import Comparison, PairScore, leading
from gendistill.gates import Gate
from gendistill.report.write import replace_files
from gendistill.text import encodable, printable
from gendistill_evals import ProtocolFamily

# Of ``--gate``; the names of points lost are above zero for a loss.
GATE_NAMES = (
    *("gap", "gap_high", "likelihood_gap", "generation_gap", "hidden_gap", "accuracy", "mcnemar_p"),
    *("not_inferior_p", "equivalent_p", "flips"),
)
_NOTED = 12


@dataclass(frozen=True, slots=True)
class ComparisonPaths:
    """The files of a written comparison."""

    page: Path
    json: Path
    markdown: Path
    csv: Path
    latex: Path
    figures: tuple[Path, ...]


def write_comparison(
    comparison: Comparison, folder: Path, *, command: str, gates: Sequence[str] = ()
) -> ComparisonPaths:
    """Write the page, ``compare.json``, the table as Markdown, CSV and LaTeX, and the forest plot as SVG and PDF.

    Args:
        comparison: What was compared.
        folder: Made if missing; older files of a comparison are replaced.
        command: What made it, for the page.
        gates: What was said of each gate.
    Raises:
        OutputError: The folder cannot be written.
    """
    # Imported here: a table in the terminal needs neither templates nor figures.
    from gendistill.comparison.html import render_page
    from gendistill.comparison.plots import plot_forest

    drawings = plot_forest(comparison)
    figures = {folder / f"forest.{kind}": drawing for kind, drawing in drawings.items()}
    paths = ComparisonPaths(
        page=folder / "index.html",
        json=folder / "compare.json",
        markdown=folder / "table.md",
        csv=folder / "table.csv",
        latex=folder / "table.tex",
        figures=tuple(figures),
    )
    texts = {
        paths.markdown: tables.render_markdown(comparison),
        paths.csv: tables.render_csv(comparison),
        paths.latex: tables.render_latex(comparison),
        paths.page: render_page(comparison, drawings["svg"], command=command, gates=gates),
    }
    content = {**comparison.to_json(), "headline": wording.headline(comparison)}
    # Last, because it says that the other files are complete.
    texts[paths.json] = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_files(
        folder, figures | {path: encodable(text).encode() for path, text in texts.items()}, figures=()
    )
    return paths


def render_terminal(comparison: Comparison, *, console: Console | None = None) -> None:
    """Print the headline, the tables and the notes.

    Args:
        comparison: What was compared.
        console: Where to print; standard output if None.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    for name, rows in tables.sections(comparison):
        console.print(Text(f"\n{name}", style="bold"), soft_wrap=True)
        console.print(tables.render_rich(rows))
    console.print()
    console.print(Text(wording.headline(comparison)), soft_wrap=True)
    for each in comparison.hidden[:_NOTED]:
        low, high = tables.signed(each.hidden.low), tables.signed(each.hidden.high)
        console.print(
            Text(
                f"hidden   {printable(each.task)}, {printable(each.second)} against {printable(each.first)}: "
                f"{tables.signed(each.hidden.value)} points [{low}, {high}]"
            ),
            soft_wrap=True,
        )
    for each in comparison.agreement[:_NOTED]:
        tau = "not defined" if each.tau is None else f"{each.tau:.2f}"
        console.print(
            Text(
                f"ranks    {printable(each.task)}: Kendall's tau of {each.likelihood} and {each.generation} is {tau}"
            ),
            soft_wrap=True,
        )
    for line in wording.power_notes(comparison)[:_NOTED]:
        console.print(Text(f"power    {line}"), soft_wrap=True)
    for note in comparison.notes:
        console.print(Text(f"warn     {printable(note, longest=2000)}"), soft_wrap=True)


def gate_value(comparison: Comparison, gate: Gate) -> tuple[float | None, str]:
    """Find the measured value that a gate is held against: the worst of all later models beside the first.

    Returns: The value, None if nothing was measured; and what it was measured of.
    """
    worst: tuple[float | None, str] = (None, f"{gate.task or 'all tasks'}")
    first = comparison.models[0]
    for second in comparison.models[1:]:
        for value, measured in _gate_values(comparison, gate, first, second):
            of = f"{second} against {first}, {gate.task or 'all tasks'}{measured}"
            if value is None:
                return None, of
            # A gate from above is missed by the largest value, one from below by the smallest.
            if worst[0] is None or (value > worst[0]) == gate.op.startswith("<"):
                worst = value, of
    return worst


def _gate_values(
    comparison: Comparison, gate: Gate, first: str, second: str
) -> list[tuple[float | None, str]]:
    """List what a gate is held against, once for each measure it takes to have every task."""
    if gate.name == "hidden_gap":
        found = [
            -each.hidden.value
            for each in comparison.hidden
            if (each.first, each.second) == (first, second) and gate.task in (None, each.task)
        ]
        return [(sum(found) / len(found) if found else None, "")]
    rows = _gate_rows(comparison, gate, first, second)
    return [(_gate_value(gate, row), f", {row.measure}") for row in rows] or [(None, "")]


def _gate_value(gate: Gate, row: PairScore) -> float | None:
    return {
        "gap": -row.gap.value,
        "likelihood_gap": -row.gap.value,
        "generation_gap": -row.gap.value,
        "gap_high": -row.gap.low,
        "accuracy": row.second_score.value,
        "mcnemar_p": row.p_holm,
        "not_inferior_p": row.not_inferior_p,
        "equivalent_p": row.equivalent_p,
        "flips": row.flips,
    }[gate.name]


def _gate_rows(comparison: Comparison, gate: Gate, first: str, second: str) -> list[PairScore]:
    """Find the rows of the leading measures, or of those of the family that the gate names."""
    family = {
        "likelihood_gap": ProtocolFamily.LIKELIHOOD,
        "generation_gap": ProtocolFamily.GENERATION,
    }.get(gate.name)
    rows = [
        row
        for row in comparison.pairs
        if (row.first, row.second) == (first, second) and family in (None, row.family)
    ]
    if gate.task is not None:
        rows = [row for row in rows if row.task == gate.task]
    leads = comparison.leads if family is None and gate.task is None else leading(rows)
    # the mean is the last of its measure
    last = {row.measure: row for row in rows}
    return [last[measure] for measure in leads]

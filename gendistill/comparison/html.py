"""The page of a comparison: one self-contained HTML file, without scripts or anything to fetch."""

from __future__ import annotations

from collections.abc import Sequence

from gendistill.comparison import tables, wording
from gendistill.comparison.plots import for_page
from gendistill.comparison.values import LEVEL, Comparison
from gendistill.report.html import page_environment


def render_page(comparison: Comparison, forest: bytes, *, command: str, gates: Sequence[str] = ()) -> str:
    """Render the page.

    Args:
        comparison: What was compared.
        forest: The forest plot as SVG.
        command: What made the page.
        gates: What was said of each gate.
    Returns: HTML. Every text that a model, a dataset or a person wrote is escaped.
    """
    return (
        page_environment("gendistill.comparison")
        .get_template("page.html.j2")
        .render(
            comparison=comparison,
            headline=wording.headline(comparison),
            power=wording.power_notes(comparison),
            sections=[
                (name, rows, [tables.cells(row) for row in rows])
                for name, rows in tables.sections(comparison)
            ],
            headers=tables.HEADERS,
            forest=for_page(forest),
            command=command,
            gates=gates,
            level=LEVEL,
            p_text=wording.p_text,
        )
    )

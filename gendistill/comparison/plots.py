"""The forest plot of a comparison: every gap with its interval, beside the margin. Loaded on first use."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from gendistill.comparison.tables import sections
from gendistill.comparison.values import ALL_TASKS, Comparison, PairScore
from gendistill.errors import ReportError
from gendistill.report.tables import signed
from gendistill.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that a page replaces by its own, so that one drawing fits light and dark: ink, muted, rule, accent, line.
_INK, _MUTED, _RULE, _ACCENT, _LINE = "#1b2430", "#5f6b7a", "#d9dee5", "#b84a00", "#0072b2"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _ACCENT: "accent", _LINE: "line"}
_MOST_ROWS = 120
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "gendistill",
    "pdf.fonttype": 42,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _INK,
}


def plot_forest(comparison: Comparison) -> dict[str, bytes]:
    """Draw the gaps of the first pairs and measures, a row each.

    Args:
        comparison: At least one pair.
    Returns: ``svg`` for pages and ``pdf`` for papers. Of very many rows the first are drawn, and the axis says so.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ValueError as error:
        raise ReportError(
            f"matplotlib cannot start: {error}",
            where="environment variables of matplotlib",
            hint="unset MPLBACKEND: figures are drawn to files and need no backend",
        ) from error
    found: dict[str, bytes] = {}
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # the font has no letters for some languages, and draws a box for each of theirs
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(layout="constrained")
        _draw(figure, comparison)
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("pdf", {"CreationDate": None})):
            out = io.BytesIO()
            figure.savefig(out, format=kind, metadata=metadata, transparent=kind == "svg")
            found[kind] = out.getvalue()
    return found


def _draw(figure: Figure, comparison: Comparison) -> None:
    groups = sections(comparison)
    total = sum(len(rows) for _, rows in groups)
    axes = figure.subplots()
    place, ticks, blocks, left = 0.0, [], [], _MOST_ROWS
    for _, rows in groups:
        if left <= 0:
            break
        axes.annotate(
            f"{_short(rows[0].second)} against {_short(rows[0].first)}, {_short(rows[0].measure)}",
            (0.01, place),
            xycoords=("figure fraction", "data"),
            va="center",
            fontweight="bold",
            fontsize=8.5,
            annotation_clip=False,
            # a long name would leave no room for what is drawn
            in_layout=False,
        )
        place += 1
        for row in rows[:left]:
            _draw_row(axes, row, place)
            ticks.append((place, _label(row.task, 34)))
            place += 1
        blocks.append((place - len(rows[:left]) - 0.5, place - 0.5))
        left -= len(rows)
        place += 0.4
    for top, bottom in blocks:
        axes.vlines(0, top, bottom, color=_INK, linewidth=0.9)
        axes.vlines(-comparison.margin, top, bottom, color=_ACCENT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_ylim(place - 0.2, -0.8)
    ends = [end for _, rows in groups for row in rows for end in (row.gap.low, row.gap.high)]
    low, high = min(*ends, -comparison.margin), max(*ends, 0.0)
    room = 0.06 * (high - low)
    axes.set_xlim(low - room, high + room)
    shown = min(total, _MOST_ROWS)
    some = f"; the first {shown} of {total} rows" if shown < total else ""
    axes.set_xlabel(f"gap in points with 95% interval; dashed: margin of {comparison.margin:g}{some}")
    figure.set_size_inches(6.6, 0.7 + 0.26 * place)


def _draw_row(axes: Any, row: PairScore, place: float) -> None:
    mean = row.task == ALL_TASKS
    colour = _ACCENT if row.gap.high < 0 else _LINE if row.gap.low > 0 else _MUTED
    axes.plot([row.gap.low, row.gap.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot(
        [row.gap.value], [place], marker="D" if mean else "o", markersize=6 if mean else 5, color=colour
    )
    value = signed(row.gap.value).replace("-", "\N{MINUS SIGN}")
    axes.annotate(
        value,
        (1, place),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
    )


def _label(text: str, longest: int) -> str:
    """Write a name so that matplotlib takes no part of it for a formula."""
    return printable(text, longest=longest).replace("$", r"\$")


def _short(name: str) -> str:
    """Leave out the middle of a long name, whose end tells variants apart."""
    text = printable(name)
    return _label(text if len(text) <= 28 else f"{text[:12]}…{text[-15:]}", 28)


def for_page(svg: bytes) -> str:
    """Make a drawing part of a page: its colours become variables of the page, and its head is left out."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    for colour, name in _VARIABLES.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    # Quotes in texts are escaped too, as in the rest of the page.
    return re.sub(r">([^<>]*)</text>", lambda match: f">{match[1].replace(chr(34), '&#34;')}</text>", text)

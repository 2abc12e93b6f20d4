"""What was measured: as rows of a results file, as a table, and as a chart. Imports no torch."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from gendistill.bench.cases import ERROR_BAR, ERROR_BARS, ERROR_RATIO_BAR, FORWARD, STEP, TRAIN
from gendistill.report.plots import COLOURS, INK, MUTED
from gendistill.results.table import ResultRow

NOT_MEASURED = "–"  # noqa: RUF001 an en dash is what tables use for an empty cell
# keeps numbers apart from the lines behind them
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One quantity of one case, ours and the peer's.

    Attributes:
        case: Name of the case.
        gate: ``bounded``, ``softplus``, or None where there is no choice.
        quantity: What was measured.
        unit: Of both values.
        ours, peer: None where it could not be measured.
        bar: What ours must meet.
        better: Which way is better.
        note: Spread of the rounds, or why a value is missing.
    """

    case: str
    quantity: str
    unit: str
    ours: float | None
    peer: float | None = None
    gate: str | None = None
    bar: float | None = None
    better: Literal["lower", "higher"] = "lower"
    note: str | None = None

    def row(self, peer: str | None) -> ResultRow | None:
        """Return a row of a results file; None if ours was not measured."""
        if self.ours is None:
            return None
        known = peer is not None and self.peer is not None and math.isfinite(self.peer)
        return ResultRow(
            name=f"{self.case}{f' {self.gate}' if self.gate else ''}: {self.quantity}",
            value=float(self.ours),
            unit=self.unit,
            better=self.better,
            bar=self.bar,
            peer=peer if known else None,
            peer_value=float(self.peer) if known and self.peer is not None else None,
            n=None,
            note=self.note,
        )


@dataclass(frozen=True, slots=True)
class Check:
    """How far one geometry is from float64.

    Attributes:
        case: Name of the first case that has it.
        gate: Of the check.
        ours, peer: Relative rms error by result; ``peer`` is empty where it did not run.
        same, peer_same: Whether repeated runs agree bit by bit.
    """

    case: str
    gate: str
    ours: Mapping[str, float]
    same: bool
    peer: Mapping[str, float]
    peer_same: bool | None = None

    @property
    def passed(self) -> bool:
        """Whether every error of ours is under its bar, NaN never is, and repeated runs agree."""
        return self.same and all(error < ERROR_BARS.get(name, ERROR_BAR) for name, error in self.ours.items())

    @property
    def ratios(self) -> dict[str, float]:
        """Our error over the peer's, by result, where the peer has one to compare with."""
        return {
            name: error / self.peer[name]
            for name, error in self.ours.items()
            if 0 < self.peer.get(name, 0.0) < math.inf
        }

    def measurements(self) -> list[Measurement]:
        """Return every error, then every ratio to the peer's."""
        words = {True: "agree bit by bit", False: "differ in bits", None: "not measured"}
        note = f"small sizes, against float64; 3 runs {words[self.same]}, the peer's: {words[self.peer_same]}"
        return [
            Measurement(
                case=self.case,
                gate=self.gate,
                quantity=f"relative error of {name}",
                unit="",
                ours=error,
                peer=self.peer.get(name),
                bar=ERROR_BARS.get(name, ERROR_BAR),
                note=note,
            )
            for name, error in self.ours.items()
        ] + [
            Measurement(
                case=self.case,
                gate=self.gate,
                quantity=f"error ratio to peer, {name}",
                unit="",
                ours=ratio,
                bar=ERROR_RATIO_BAR,
                note=f"ours {self.ours[name]:.2e}, the peer's {self.peer[name]:.2e}",
            )
            for name, ratio in self.ratios.items()
        ]


def check_table(checks: Sequence[Check], peer: str | None) -> Table:
    """Lay out errors, a line for ours and one for the peer; what misses its bar is red."""
    names = list(dict.fromkeys(name for check in checks for name in check.ours))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("error against float64")
    for name in names:
        table.add_column(f"{name}\n< {ERROR_BARS.get(name, ERROR_BAR):g}", justify="right")
    table.add_column("3 runs")
    for check in checks:
        ours = [_error(check.ours, name) for name in names]
        title = f"{check.case} {check.gate}"
        table.add_row(title if check.passed else f"[bold red]{title}: RED", *ours, _agree(check.same))
        if check.peer:
            other = [_shown(check.peer.get(name), "", ".1e") for name in names]
            table.add_row(f"  {peer}", *other, _agree(check.peer_same), style="dim")
            title = f"  ours / peer, <= {ERROR_RATIO_BAR:g}"
            table.add_row(title, *[_ratio(check.ratios.get(name)) for name in names], style="dim")
    return table


def _error(errors: Mapping[str, float], name: str) -> str:
    shown = _shown(errors.get(name), "", ".1e")
    red = name in errors and not errors[name] < ERROR_BARS.get(name, ERROR_BAR)
    return f"[bold red]{shown}[/]" if red else shown


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return NOT_MEASURED
    return f"{ratio:.2f}" if ratio <= ERROR_RATIO_BAR else f"[red]{ratio:.2f} missed[/]"


def _agree(same: bool | None) -> str:
    return {True: "same bits", False: "[bold red]differ[/]", None: ""}[same]


def measurement_table(found: Sequence[Measurement], peer: str | None) -> Table:
    """Lay out what one case took."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("quantity")
    for header in ("ours", "bar", peer or "peer", "better by"):
        table.add_column(header, justify="right")
    table.add_column("note", overflow="fold")
    for each in found:
        row = each.row(peer)
        met = row.met if row else None
        factor = NOT_MEASURED
        if each.ours and each.peer:
            ratio = each.peer / each.ours if each.better == "lower" else each.ours / each.peer
            factor = f"{ratio:.2f}x"
        result = {True: " met", False: " missed", None: ""}[met]
        table.add_row(
            f"{each.case} {each.quantity}",
            _shown(each.ours, each.unit),
            NOT_MEASURED if each.bar is None else f"{each.bar:g}{result}",
            _shown(each.peer, each.unit),
            factor,
            each.note or "",
            style="red" if met is False else None,
        )
    return table


def _shown(value: float | None, unit: str, form: str = ".4g") -> str:
    return NOT_MEASURED if value is None else f"{value:{form}} {unit}".strip()


def plot_measurements(found: Sequence[Measurement], peer: str | None) -> bytes | None:
    """Draw the times as bars, ours above the peer's, a panel per kind of call; a PNG, or None without any."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = {
        title: [each for each in found if each.quantity == quantity and each.ours is not None]
        for quantity, title in ((FORWARD, FORWARD), (TRAIN, "forward + backward"), (STEP, "decode step"))
    }
    panels = {title: bars for title, bars in panels.items() if bars}
    if not panels:
        return None
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
    }
    with matplotlib.rc_context(style):
        height = sum(0.55 + 0.5 * len(bars) for bars in panels.values())
        figure = Figure(figsize=(8.0, 0.7 + height), layout="constrained")
        ratios = [0.55 + 0.5 * len(bars) for bars in panels.values()]
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for panel, (title, bars) in zip(axes, panels.items(), strict=True):
            _draw(panel, bars, title)
        colours = [("ours", COLOURS["student"]), *([(peer, COLOURS["teacher"])] if peer else [])]
        handles = [Patch(color=colour, label=label) for label, colour in colours]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out.getvalue()


def _draw(axes, bars: Sequence[Measurement], title: str) -> None:
    longest = max(max(each.ours or 0.0, each.peer or 0.0) for each in bars)
    for place, each in enumerate(bars):
        for offset, value, colour in (
            (-0.19, each.ours, COLOURS["student"]),
            (0.19, each.peer, COLOURS["teacher"]),
        ):
            if value is not None:
                axes.barh(place + offset, value, height=0.34, color=colour)
                axes.text(
                    value + 0.01 * longest,
                    place + offset,
                    f"{value:.3g}",
                    va="center",
                    fontsize=9,
                    bbox=_PLAIN,
                )
        if each.bar is not None:
            axes.plot([each.bar] * 2, [place - 0.42, place + 0.42], color=COLOURS["accent"], linewidth=1.6)
    names = [" ".join(filter(None, (each.case, each.gate))) for each in bars]
    axes.set_yticks(range(len(bars)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)
    axes.set_title(
        f"{title}, {bars[0].unit} (lower is better; the line is the bar)", loc="left", fontsize=10.5
    )
    axes.tick_params(axis="x", colors=MUTED)


def save_plot(path: Path, found: Sequence[Measurement], peer: str | None) -> None:
    """Write the chart, if there is anything to draw."""
    png = plot_measurements(found, peer)
    if png is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)

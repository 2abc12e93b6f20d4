"""Figures of the report, as pixels and as curves. Colours are Okabe and Ito's, which survive colour blindness and grey
print, and keep their hues where the page turns them light for the dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.placement import Placement
from gendistill.errors import ReportError
from gendistill.report.choices import Effect
from gendistill.report.gap import GapReport
from gendistill.report.run_files import ROLES, RunFiles, StageFiles
from gendistill.report.tables import signed
from gendistill.text import printable
from gendistill_evals import ProtocolFamily

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Look:
    """How figures are set.

    Attributes:
        serif: Whether letters have serifs, as papers set with LaTeX have; they are STIX's then.
        width: Of every figure in inches, such as 3.3 for a column, with letters of 8 points; None: fit for the page.
    """

    serif: bool = False
    width: float | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure in every format that is written, by the ending of its file: ``png``, ``svg`` and ``pdf``."""

    png: bytes
    svg: bytes
    pdf: bytes

    def files(self, name: str) -> dict[str, bytes]:
        """Name the files."""
        return {f"{name}.png": self.png, f"{name}.svg": self.svg, f"{name}.pdf": self.pdf}


INK, MUTED, RULE = "#1b2430", "#5f6b7a", "#d9dee5"
COLOURS = {"teacher": "#6b7685", "student": "#0072b2", "accent": "#d55e00"}
# about 40 tasks; a figure has at most 65,536 rows of pixels
_MOST_BARS = 80
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    # letters are embedded in PDF as type that can be searched, and drawn in SVG, which then looks alike everywhere
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": "large",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


_SERIF: dict[Any, Any] = {"font.family": ["STIXGeneral", "DejaVu Serif"], "mathtext.fontset": "stix"}
_PAPER: dict[Any, Any] = {"font.size": 8, "axes.titlepad": 6, "lines.markersize": 3}


@contextmanager
def _figure(width: float, height: float, look: Look) -> Iterator[tuple[Figure, list[Drawing]]]:
    """Yield a figure, and a list that holds what was drawn once the block ends."""
    # Imported here: it costs half a second, and tables and gap.json need none of it.
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ValueError as error:
        raise ReportError(
            f"matplotlib cannot start: {error}",
            where="environment variables of matplotlib",
            hint="unset MPLBACKEND: figures are drawn to files and need no backend",
        ) from error

    drawn: list[Drawing] = []
    style = _STYLE | (_SERIF if look.serif else {}) | (_PAPER if look.width else {})
    # equal runs give equal files: names inside an SVG come from this word and what is drawn
    style |= {"svg.hashsalt": "gendistill"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # the font has no letters for some languages, and draws a box for each of theirs
        warnings.filterwarnings("ignore", message="Glyph")
        if look.width:
            # letters shrink less than the figure, and what is high of itself stays so
            width, height = look.width, max(height * min(1.0, look.width / width * 1.25), 1.0)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, drawn
        drawn.append(Drawing(**{kind: _saved(figure, kind) for kind in ("png", "svg", "pdf")}))


_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def _saved(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=160, facecolor="white", metadata=_METADATA[kind])
    # letters drawn as curves come with their text in a comment, which readers of a page need not be shown
    return (
        re.sub(rb"<!--.*?-->\s*", b"", out.getvalue(), flags=re.DOTALL) if kind == "svg" else out.getvalue()
    )


_PLAIN = Look()


def plot_run(run: RunFiles, report: GapReport, look: Look = _PLAIN) -> dict[str, Drawing]:
    """Draw every figure that the run has data for.

    Returns: By name: gap, placement, heldout, positions, loss- and watch-<stage>, cache.
    """
    figures = {
        "gap": plot_gap(report, look),
        "placement": plot_placement(run.placement, look) if run.placement else None,
        "heldout": plot_heldout(run.probe, run.stages, look),
        "positions": plot_positions(run.positions, look),
        **{f"loss-{stage.name}": plot_stage(stage, look) for stage in run.stages},
        **{f"watch-{stage.name}": plot_watched(stage, look) for stage in run.stages},
        "cache": plot_cache(run.manifest.get("cache_bytes") or [], look),
    }
    return {name: drawing for name, drawing in figures.items() if drawing}


def _label(text: str) -> str:
    """Write a name of the run so that matplotlib takes no part of it for a formula."""
    return printable(text, longest=40).replace("$", r"\$")


def plot_gap(report: GapReport, look: Look = _PLAIN) -> Drawing | None:
    """Draw the scores of both models under every protocol, with intervals and the gap beside them.

    Of very many tasks the first are drawn, and the axis says so.
    """
    found = [
        (task.task, protocol, scores, task.gap.get(protocol))
        for task in report.tasks
        for protocol in report.protocols
        if any((scores := {role: getattr(task, role).get(protocol) for role in ROLES}).values())
    ]
    if not found:
        return None
    groups = found[:_MOST_BARS]
    with _figure(5.2, 1.1 + 0.72 * len(groups), look) as (figure, drawn):
        axes = figure.subplots()
        for row, (_, _, scores, gap) in enumerate(groups):
            ends = []
            for offset, (role, score) in zip((-0.19, 0.19), scores.items(), strict=True):
                if score is None:
                    continue
                error = [[score.value - score.low], [score.high - score.value]]
                axes.barh(row + offset, score.value, height=0.34, color=COLOURS[role])
                axes.errorbar(score.value, row + offset, xerr=error, color=INK, linewidth=1, capsize=2.5)
                axes.text(1, row + offset, f"{score.value:.1f}", color="white", va="center", fontsize="small")
                ends.append(score.high)
            if gap:
                axes.text(
                    max(ends) + 1.5,
                    row,
                    "gap " + signed(gap.value).replace("-", "\N{MINUS SIGN}"),
                    va="center",
                    fontweight="bold",
                    fontsize="medium",
                )
        axes.set_yticks(
            range(len(groups)), [f"{_label(task)}\n{protocol}" for task, protocol, _, _ in groups]
        )
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        highest = max(score.high for _, _, scores, _ in groups for score in scores.values() if score)
        axes.set_xlim(0, min(highest + 16, 118))
        axes.set_xticks([tick for tick in range(0, 101, 10) if tick <= highest + 10])
        some = f"; the first {len(groups)} of {len(found)} scores" if len(groups) < len(found) else ""
        axes.set_xlabel(f"% of items right, with 95% intervals{some}")
        _legend(figure, [("teacher", COLOURS["teacher"]), ("student", COLOURS["student"])])
    return drawn[0]


def plot_placement(placement: Placement, look: Look = _PLAIN) -> Drawing:
    """Draw one square per layer, coloured and lettered by its mixer."""
    num_layers = len(placement.kinds)
    with _figure(7.2, 1.15, look) as (figure, drawn):
        axes = figure.subplots()
        for layer, kind in enumerate(placement.kinds):
            fill, ink = MIXERS[kind].colour
            axes.bar(layer, 1, width=0.9, color=fill)
            axes.text(
                layer,
                0.5,
                MIXERS[kind].letter,
                ha="center",
                va="center",
                color=ink,
                weight="bold",
                size="small",
            )
        axes.set_xlim(-0.6, max(num_layers, 12) - 0.4)
        axes.set_yticks([])
        axes.set_xticks(range(0, num_layers, 1 if num_layers < 40 else 4))
        axes.tick_params(axis="x", length=0, labelsize="x-small")
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        _legend(figure, [(kind, MIXERS[kind].colour[0]) for kind in dict.fromkeys(placement.kinds)])
    return drawn[0]


def plot_stage(stage: StageFiles, look: Look = _PLAIN) -> Drawing | None:
    """Draw the training loss of one stage by step."""
    rows = [row for row in stage.metrics if row.get("loss") is not None]
    if not rows:
        return None
    with _figure(4.6, 3.0, look) as (figure, drawn):
        axes = figure.subplots()
        axes.plot(
            [row["step"] for row in rows],
            [row["loss"] for row in rows],
            color=COLOURS["student"],
            linewidth=1.4,
        )
        objective = f": {_label(stage.result['objective'])}" if stage.result else ", unfinished"
        axes.set_title(f"{_label(stage.name)}{objective}")
        _steps(axes)
        axes.set_ylabel("training loss")
        _log_if_wide(axes, [row["loss"] for row in rows])
    return drawn[0]


def plot_watched(stage: StageFiles, look: Look = _PLAIN) -> Drawing | None:
    """Draw what was looked at while one stage trained, by step: cosines, median half-lives, the generation score.

    Of layers there is a thin line each and a thick one for the lowest cosine, or the middle of the medians.
    """
    panels = [
        (label, lines, thick)
        for label, lines, thick in (
            ("cosine to attention", _by_layer(stage, "cosine"), min),
            (
                "half-life, tokens",
                _by_layer(stage, "half_life_50"),
                lambda values: sorted(values)[len(values) // 2],
            ),
            ("items right by generation, %", {"": _scores(stage)}, None),
        )
        if any(lines.values())
    ]
    if not panels:
        return None
    with _figure(3.4 * len(panels), 2.8, look) as (figure, drawn):
        for axes, (label, lines, thick) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for points in lines.values():
                axes.plot(*zip(*points, strict=True), color=COLOURS["student"], linewidth=0.8, alpha=0.5)
            at: dict[int, list[float]] = {}
            for step, value in (point for points in lines.values() for point in points):
                at.setdefault(step, []).append(value)
            chosen = {step: thick(values) if thick else values[0] for step, values in at.items()}
            axes.plot(
                list(chosen),
                list(chosen.values()),
                color=COLOURS["accent"],
                linewidth=1.8,
                marker="o",
                markersize=3,
            )
            _steps(axes)
            axes.set_ylabel(label)
            if thick:
                _log_if_wide(axes, list(chosen.values()))
            else:
                axes.set_ylim(0, max(5.0, 1.1 * max(chosen.values())))
        figure.suptitle(_label(stage.name), x=0.01, ha="left", fontsize="large", fontweight="bold")
    return drawn[0]


def _by_layer(stage: StageFiles, what: str) -> dict[str, list[tuple[int, float]]]:
    """List step and value by layer."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in stage.metrics:
        for name, value in row.get("layers", {}).items():
            layer, _, kind = name.partition("/")
            if kind == what:
                found.setdefault(layer, []).append((row["step"], value))
    return found


def _scores(stage: StageFiles) -> list[tuple[int, float]]:
    return [(row["step"], 100 * row["score"]["value"]) for row in stage.metrics if "score" in row]


def plot_heldout(
    probe: Mapping[str, Any] | None, stages: Sequence[StageFiles], look: Look = _PLAIN
) -> Drawing | None:
    """Draw held-out KL from the converted student to the end; every stage has the same width."""
    points = [(0.0, probe["kl"])] if probe else []
    for index, stage in enumerate(stages):
        inside = [(row["step"], row["heldout"]["kl"]) for row in stage.metrics if row.get("heldout")]
        end = (stage.result or {}).get("heldout")
        points += [
            (index + step / max(stage.num_steps, 1), kl) for step, kl in inside if step < stage.num_steps
        ]
        points += [(index + 1.0, end["kl"])] if end else []
    if len(points) < 2:
        return None
    with _figure(4.6, 3.0, look) as (figure, drawn):
        axes = figure.subplots()
        x, kl = zip(*points, strict=True)
        axes.plot(x, kl, color=COLOURS["accent"], linewidth=1.4, marker="o", markersize=4)
        for at, value, place in ((x[0], kl[0], "left"), (x[-1], kl[-1], "right")):
            axes.annotate(
                f"{value:.2f}", (at, value), (0, 7), textcoords="offset points", ha=place, fontweight="bold"
            )
        axes.set_title("held-out KL to the teacher")
        axes.set_ylabel("nats per token")
        axes.set_xticks(
            [0, *range(1, len(stages) + 1)],
            ["converted", *(f"after\n{_label(stage.name)}" for stage in stages)],
        )
        axes.margins(x=0.06, y=0.18)
        _log_if_wide(axes, kl)
    return drawn[0]


def plot_positions(
    points: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], look: Look = _PLAIN
) -> Drawing | None:
    """Draw the held-out KL by tokens read, after conversion and after each stage; the last line is thick.

    Args:
        points: Name and means by range of positions, in order.
        look: How it is set.
    """
    shown = [(name, rows) for name, rows in points if len(rows) > 1]
    if not shown:
        return None
    with _figure(4.6, 3.0, look) as (figure, drawn):
        axes = figure.subplots()
        for index, (name, rows) in enumerate(shown):
            last = index == len(shown) - 1
            axes.plot(
                # the middle of a range on a logarithmic axis
                [(row["first"] * row["last"]) ** 0.5 for row in rows],
                [row["kl"] for row in rows],
                color=COLOURS["accent"] if last else COLOURS["teacher"],
                linestyle="-" if last else _DASHES[index % len(_DASHES)],
                linewidth=1.8 if last else 1.1,
                marker="o" if last else None,
                markersize=3.5,
                label=("" if name == "conversion" else "after ") + _label(name),
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value:,.0f}" if value < 1024 else f"{value / 1024:g}k"
        )
        axes.minorticks_off()
        axes.set_title("KL by position")
        axes.set_xlabel("tokens read")
        axes.set_ylabel("nats per token")
        _log_if_wide(axes, [row["kl"] for _, rows in shown for row in rows])
        figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return drawn[0]


_DASHES = ("--", ":", "-.")


def plot_scatter(
    reports: Sequence[GapReport], inverted: Collection[frozenset[str]], look: Look = _PLAIN
) -> Drawing | None:
    """Draw every run's gap by generation against its gap by log-likelihood; lines join runs that change places.

    Args:
        reports: Of the runs.
        inverted: Pairs of names that the two protocols put in opposite orders.
        look: How it is set.
    """
    points = {}
    for report in reports:
        ranked, written = (report.mean_gap(report.leads[family]) for family in ProtocolFamily)
        if ranked and written:
            points[report.name] = (ranked, written)
    if not points:
        return None
    with _figure(5.2, 4.4, look) as (figure, drawn):
        axes = figure.subplots()
        axes.axline((0, 0), slope=1, color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
        axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)
        axes.axvline(0, color=MUTED, linewidth=0.6, zorder=1)
        for first, second in (sorted(pair) for pair in inverted if pair <= points.keys() and len(pair) == 2):
            x, y = ([points[name][axis].value for name in (first, second)] for axis in (0, 1))
            axes.plot(x, y, color=COLOURS["accent"], linewidth=1.2, alpha=0.7, zorder=2)
        changed = {name for pair in inverted for name in pair}
        for index, (name, (ranked, written)) in enumerate(points.items()):
            axes.errorbar(
                ranked.value,
                written.value,
                xerr=[[ranked.value - ranked.low], [ranked.high - ranked.value]],
                yerr=[[written.value - written.low], [written.high - written.value]],
                color=COLOURS["accent"] if name in changed else COLOURS["student"],
                elinewidth=0.7,
                alpha=0.9,
                marker="os^Dv"[index % 5],
                markersize=5,
                zorder=3,
            )
            axes.annotate(
                _label(name),
                (ranked.value, written.value),
                (6, 5),
                textcoords="offset points",
                fontsize="small",
            )
        axes.set_xlabel("gap by log-likelihood, points")
        axes.set_ylabel("gap by generation, points")
        axes.margins(0.12)
    return drawn[0]


def plot_effects(effects: Sequence[Effect], look: Look = _PLAIN) -> Drawing | None:
    """Draw what every single choice did under both protocols, with intervals."""
    shown = [effect for effect in effects if any(effect.by_family.values())][:_MOST_EFFECTS]
    if not shown:
        return None
    looks = (
        (ProtocolFamily.LIKELIHOOD, -0.14, "teacher", "s"),
        (ProtocolFamily.GENERATION, 0.14, "accent", "o"),
    )
    with _figure(5.2, 1.1 + 0.62 * len(shown), look) as (figure, drawn):
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, linewidth=0.9)
        for row, effect in enumerate(shown):
            for family, offset, colour, marker in looks:
                if (found := effect.by_family.get(family)) is None:
                    continue
                axes.errorbar(
                    found.value,
                    row + offset,
                    xerr=[[found.value - found.low], [found.high - found.value]],
                    color=COLOURS[colour],
                    marker=marker,
                    markersize=5,
                    capsize=2.5,
                    label=f"by {'log-likelihood' if family is ProtocolFamily.LIKELIHOOD else 'generation'}"
                    if not row
                    else None,
                )
        names = [
            f"{_label(each.setting)}\n{_label(each.change[0])} → {_label(each.change[1])}" for each in shown
        ]
        axes.set_yticks(range(len(shown)), names, fontsize="small")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("points that the second student scores more")
        figure.legend(loc="outside upper left", ncols=2)
    return drawn[0]


_MOST_EFFECTS = 40


def plot_cache(rows: Sequence[Mapping[str, int]], look: Look = _PLAIN) -> Drawing | None:
    """Draw what one sequence keeps in memory while generating, by context length."""
    if len(rows) < 2:
        return None
    with _figure(4.6, 3.0, look) as (figure, drawn):
        axes = figure.subplots()
        tokens = [row["tokens"] for row in rows]
        for role in ROLES:
            mebibytes = [row[role] / 2**20 for row in rows]
            axes.plot(tokens, mebibytes, color=COLOURS[role], linewidth=2, marker="o", markersize=4)
            axes.annotate(
                role,
                (tokens[-1], mebibytes[-1]),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=COLOURS[role],
                fontweight="bold",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(tokens, [f"{count:,}" if count < 1024 else f"{count // 1024}k" for count in tokens])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.margins(x=0.22)
        axes.set_title("cache of one sequence")
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("MiB")
    return drawn[0]


def _steps(axes: Axes) -> None:
    """Label an axis of whole steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in entries]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(entries), handlelength=1, handleheight=1
    )


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis once the values span more than a factor of ten."""
    if min(values) > 0 and max(values) / min(values) > 10:
        axes.set_yscale("log")

"""What steps took: as tables and as rows of a results file. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.table import Table

from gendistill.anatomy.cost import peak_flops
from gendistill.bench.rows import NOT_MEASURED
from gendistill.bench.shapes import BARS, IDLE, MEMORY, RATIO, SPEED
from gendistill.results.table import ResultRow

if TYPE_CHECKING:
    from gendistill.bench.trace import Trace

# as the trainer's clock names them
PARTS = ("teacher", "mixers", "student", "loss", "optimizer", "other")


class Check(NamedTuple):
    """How far an engine is from float32 arithmetic on one batch.

    Attributes:
        engine: Its name.
        loss: Relative error.
        gradient: Relative norm of the error of all gradients together.
        bars: What the two must not exceed; None for the engine that sets them.
    """

    engine: str
    loss: float
    gradient: float
    bars: tuple[float, float] | None

    @property
    def passed(self) -> bool:
        """Whether both are finite and within their bars."""
        bars = self.bars or (1.0, 1.0)
        return self.loss <= bars[0] and self.gradient <= bars[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """What a step takes under one setting of the engine.

    Attributes:
        name: Of the setting, or of the peer.
        seconds: Of every timed step.
        tokens: Of a step, over all processes, without padding: the mean.
        flops: What this process has to multiply in a step.
        device: Name of the device.
        world: Processes.
        host: Seconds that the host needs for a step at least, in which it does not wait for a full queue.
        waited: Of these, seconds a step that it waits for data.
        cold: Seconds of the steps before the timed ones.
        memory_gb: Highest allocation in the timed steps; None on a CPU.
        parts: Shares of a step.
        syncs: How often the host waits for the GPU in a step; None on a CPU.
        trace: What the profiler saw.
    """

    name: str
    seconds: tuple[float, ...]
    tokens: float
    flops: float
    device: str
    world: int = 1
    host: float = 0.0
    waited: float = 0.0
    cold: float = 0.0
    memory_gb: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    syncs: int | None = None
    trace: Trace | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.median

    @property
    def spread(self) -> tuple[float, float]:
        """Tokens a second of the slowest and of the fastest step."""
        return self.tokens / max(self.seconds), self.tokens / min(self.seconds)

    @property
    def mfu(self) -> float | None:
        """Share of the device's bfloat16 peak; None where that is not known."""
        peak = peak_flops(self.device)
        return None if peak is None else self.flops / self.median / peak

    @property
    def idle(self) -> float | None:
        """Share of a step in which the GPU runs nothing; None without a profile."""
        return None if self.trace is None else self.trace.idle_of(1000 * self.median)

    def __str__(self) -> str:
        low, high = self.spread
        return (
            f"{self.speed:,.0f} tokens/s ({low:,.0f} to {high:,.0f}), {1000 * self.median:.1f} ms a step, first steps "
            f"{self.cold:.1f} s"
        )


def result_rows(
    shape: str, stage: str, found: Sequence[StepTime], peer: StepTime | None = None
) -> list[ResultRow]:
    """Return rows of a results file; only the first engine's have bars and the peer beside them."""
    first = found[0]
    rows = _first_rows(f"{stage} stage, {shape}", first, peer, (shape, stage))
    for each in found[1:]:
        case = f"{stage} stage, {shape}, {each.name}"
        low, high = each.spread
        note, times = f"{low:,.0f} to {high:,.0f}", each.speed / first.speed
        rows.append(_row(f"{case}: {SPEED}", each.speed, SPEED, "higher", n=len(each.seconds), note=note))
        rows.append(_row(f"{case}: times {first.name}", times, "times", "higher"))
        if each.memory_gb is not None:
            rows.append(_row(f"{case}: {MEMORY}", each.memory_gb, "GB", "lower"))
    return rows


def _first_rows(case: str, found: StepTime, peer: StepTime | None, key: tuple[str, str]) -> list[ResultRow]:
    case += f", {found.world} processes" if found.world > 1 else ""

    def bar(quantity: str) -> float | None:
        return BARS.get((*key, quantity)) if found.world == 1 else None

    beside = {} if peer is None else {"peer": peer.name, "peer_value": float(peer.speed)}
    low, high = found.spread
    note = f"{found.name}; {low:,.0f} to {high:,.0f}"
    rows = [
        _row(
            f"{case}: {SPEED}",
            found.speed,
            SPEED,
            "higher",
            bar=bar(SPEED),
            n=len(found.seconds),
            note=note,
            **beside,
        )
    ]
    if peer is not None:
        note = f"the peer is {peer.name}"
        rows.append(
            _row(f"{case}: {RATIO}", found.speed / peer.speed, "times", "higher", bar=bar(RATIO), note=note)
        )
    measured: tuple[tuple[str, float | None, str, Literal["lower", "higher"]], ...] = (
        (MEMORY, found.memory_gb, "GB", "lower"),
        ("MFU", found.mfu, "share", "higher"),
        (IDLE, found.idle, "share", "lower"),
        ("waits for the GPU", found.syncs, "a step", "lower"),
    )
    for name, value, unit, better in measured:
        if value is not None:
            rows.append(_row(f"{case}: {name}", value, unit, better, bar=bar(name)))
    shares = [(part, found.parts[part]) for part in PARTS if part in found.parts]
    return rows + [_row(f"{case}: share of {part}", share, "share", "lower") for part, share in shares]


def _row(name: str, value: float, unit: str, better: Literal["lower", "higher"], **more: Any) -> ResultRow:
    return ResultRow(name=name, value=float(value), unit=unit, better=better, **more)


def check_table(checks: Sequence[Check], *, dtype: str) -> Table:
    """Lay out how far every engine is from float32."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"relative error in {dtype}, against eager float32")
    for header in ("loss", "gradient"):
        table.add_column(header, justify="right")
    table.add_column("bars")
    for check in checks:
        bars = "sets the bars" if check.bars is None else "{:.1e} / {:.1e}".format(*check.bars)
        name = check.engine if check.passed else f"[bold red]{check.engine}: RED[/]"
        table.add_row(name, f"{check.loss:.1e}", f"{check.gradient:.1e}", bars)
    return table


def time_table(found: Sequence[StepTime]) -> Table:
    """Lay out what every engine takes, beside the first one."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("engine")
    parts = [part for part in PARTS if any(part in each.parts for each in found)]
    headers = ("tokens/s", "times the first", "ms a step", "host ms", "data ms", "GB", "MFU", "idle", "syncs")
    for header in (*headers, *parts):
        table.add_column(header, justify="right")
    for each in found:
        cells = [
            f"{each.speed:,.0f}",
            f"{each.speed / found[0].speed:.3f}",
            f"{1000 * each.median:.1f}",
            f"{1000 * each.host:.1f}",
            f"{1000 * each.waited:.1f}",
            NOT_MEASURED if each.memory_gb is None else f"{each.memory_gb:.1f}",
            NOT_MEASURED if each.mfu is None else f"{each.mfu:.1%}",
            NOT_MEASURED if each.idle is None else f"{each.idle:.1%}",
            NOT_MEASURED if each.syncs is None else str(each.syncs),
        ]
        shares = [f"{each.parts[part]:.0%}" if part in each.parts else NOT_MEASURED for part in parts]
        table.add_row(each.name, *cells, *shares)
    return table

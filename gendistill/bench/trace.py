"""What a GPU does in a few steps, from torch's profiler: its kernels, and how much of the time it has none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

_WIDEST = 90
# what some profilers also list among the work of a GPU
_WAITS = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")


class KernelTime(NamedTuple):
    """What one kernel took of a step."""

    name: str
    calls: float
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A few steps as the GPU saw them.

    Attributes:
        steps: How many.
        wall_ms: Of a step, from the first kernel to the end of the last one; the profiler slows launches.
        busy_ms: Of a step, in which at least one kernel ran.
        launches: Of a step.
        host_ms: Of a step, until the host had launched it all.
        kernels: The most expensive first.
    """

    steps: int
    wall_ms: float
    busy_ms: float
    launches: float
    host_ms: float
    kernels: Sequence[KernelTime]

    @property
    def idle(self) -> float:
        """Share of the profiled steps in which no kernel ran."""
        return 1 - self.busy_ms / self.wall_ms

    def idle_of(self, step_ms: float) -> float:
        """Return the idle share of a step that took so long without the profiler."""
        return max(0.0, 1 - self.busy_ms / step_ms)

    def table(self, top: int) -> Table:
        """Lay out the most expensive kernels."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("kernel", overflow="ellipsis", no_wrap=True, max_width=_WIDEST)
        for header in ("ms a step", "share", "calls a step"):
            table.add_column(header, justify="right")
        total = sum(kernel.ms for kernel in self.kernels)
        for name, calls, ms in self.kernels[:top]:
            table.add_row(name[:_WIDEST], f"{ms:.2f}", f"{ms / total:.1%}", f"{calls:,.0f}")
        rest = self.kernels[top:]
        if rest:
            ms, calls = sum(each.ms for each in rest), sum(each.calls for each in rest)
            table.add_row(f"{len(rest):,} others", f"{ms:.2f}", f"{ms / total:.1%}", f"{calls:,.0f}")
        return table


def trace_steps(step: Callable[[], Any], *, steps: int, path: Path | None = None) -> Trace:
    """Profile steps on the current GPU.

    What the host does is recorded only for a file: that slows it so much that the GPU idles more.

    Args:
        step: Has run before.
        steps: How many.
        path: Where to write a trace for ``chrome://tracing`` or Perfetto.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if path is None else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        host_ms = 1000 * (time.perf_counter() - started)
        torch.cuda.synchronize()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    intervals = [
        (event.name, event.time_range.start / 1000, event.time_range.end / 1000)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation and event.name not in _WAITS
    ]
    return summarise_trace(intervals, steps=steps, host_ms=host_ms / steps)


def summarise_trace(
    intervals: Sequence[tuple[str, float, float]], *, steps: int, host_ms: float = 0.0
) -> Trace:
    """Reduce the kernels of a few steps.

    Args:
        intervals: Name, start and end in milliseconds of everything the GPU did. A copy from the host that runs beside
            kernels does not make the GPU busy.
        steps: In which it did.
        host_ms: Of a step.
    """
    computing = [(start, end) for name, start, end in intervals if not name.startswith("Memcpy HtoD")]
    found: dict[str, tuple[int, float]] = {}
    for name, start, end in intervals:
        calls, ms = found.get(name, (0, 0.0))
        found[name] = calls + 1, ms + end - start
    kernels = [KernelTime(name, calls / steps, ms / steps) for name, (calls, ms) in found.items()]
    wall = max((end for _, end in computing), default=0.0) - min(
        (start for start, _ in computing), default=0.0
    )
    return Trace(
        steps=steps,
        wall_ms=wall / steps,
        busy_ms=covered(computing) / steps,
        launches=len(intervals) / steps,
        host_ms=host_ms,
        kernels=sorted(kernels, key=lambda kernel: -kernel.ms),
    )


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total

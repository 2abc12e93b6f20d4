"""Which launcher is behind every row of the kernels' table, and what it is told to launch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from gendistill.bench.measure import attempt
from gendistill_kernels.block import attention, glu, rope
from gendistill_kernels.block import norm as block_norm
from gendistill_kernels.block import rows as block_rows
from gendistill_kernels.conv import causal
from gendistill_kernels.conv import rows as conv_rows
from gendistill_kernels.delta import chunk, decode
from gendistill_kernels.delta import rows as delta_rows
from gendistill_kernels.divergence import dense, tail
from gendistill_kernels.divergence import rows as divergence_rows
from gendistill_kernels.norm import gated
from gendistill_kernels.norm import rows as norm_rows
from gendistill_kernels.paged import decode as paged_decode
from gendistill_kernels.paged import prefill, store
from gendistill_kernels.paged import rows as paged_rows
from gendistill_kernels.runtime.launch import Fixed
from gendistill_kernels.runtime.lookup import Table
from gendistill_kernels.runtime.memory import Part
from gendistill_kernels.thin import product as thin_product
from gendistill_kernels.thin import rows as thin_rows

# compilers at a time
_COMPILERS = 12


class Place(NamedTuple):
    """Where a kernel is launched.

    Attributes:
        module, launcher: Whose attribute the launcher is.
        summary: What it says as ``SUMMARY``; None if it says nothing.
    """

    module: Any
    launcher: str
    summary: bool | None = None


PLACES = {
    "prepare": Place(chunk, "_prepare"),
    "prepare_levels": Place(chunk, "_prepare_levels"),
    "scan": Place(chunk, "_scan", False),
    "summary": Place(chunk, "_scan", True),
    "carry": Place(chunk, "_carry"),
    "reverse_scan": Place(chunk, "_reverse_scan", False),
    "reverse_summary": Place(chunk, "_reverse_scan", True),
    "values": Place(chunk, "_values"),
    "keys": Place(chunk, "_keys"),
    "keys_levels": Place(chunk, "_keys_levels"),
    "sum_heads": Place(chunk, "_sum_heads"),
    "sum_chunks": Place(chunk, "_sum_chunks"),
    "conv_forward": Place(causal, "_forward"),
    "conv_backward": Place(causal, "_backward"),
    "norm_forward": Place(gated, "_forward"),
    "norm_backward": Place(gated, "_backward"),
    "block_norm_forward": Place(block_norm, "_forward"),
    "block_norm_backward": Place(block_norm, "_backward"),
    "block_glu_forward": Place(glu, "_forward"),
    "block_glu_backward": Place(glu, "_backward"),
    "block_rope_forward": Place(rope, "_forward"),
    "block_rope_backward": Place(rope, "_backward"),
    "block_attention": Place(attention, "_forward"),
    "block_attention_queries": Place(attention, "_queries"),
    "block_attention_keys": Place(attention, "_keys"),
    "decode": Place(decode, "_decode"),
    "decode_convolution": Place(decode, "_convolution"),
    "divergence": Place(dense, "_compare"),
    "divergence_mixture": Place(dense, "_compare"),
    "tail_sum": Place(tail, "_log_sum"),
    "tail_gradient": Place(tail, "_spread"),
    "paged_store": Place(store, "_store"),
    "paged_prefill": Place(prefill, "_prefill"),
    "paged_decode": Place(paged_decode, "_decode"),
    "paged_join": Place(paged_decode, "_join"),
    "thin_product": Place(thin_product, "_product"),
}


TABLES: tuple[Table[Any], ...] = (
    delta_rows.TABLE,
    conv_rows.TABLE,
    norm_rows.TABLE,
    block_rows.TABLE,
    divergence_rows.TABLE,
    paged_rows.TABLE,
    thin_rows.TABLE,
)


def table_of(kernel: str) -> Table[Any]:
    """Return the table that has the rows of a kernel."""
    return next(table for table in TABLES if kernel in table.kernels)


class Launch(NamedTuple):
    """What a launcher was told; ``launcher[grid](*arguments, **settings)`` does it again."""

    launcher: Any
    grid: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]

    def again(self) -> None:
        """Launch."""
        self.launcher[self.grid](*self.arguments, **self.settings)


class _Watched:
    """A stand-in for a launcher that writes down what it is told."""

    def __init__(self, launcher: Any, found: list[Launch], *, run: bool) -> None:
        self.launcher, self.found, self.run = launcher, found, run

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def call(*arguments: Any, **settings: Any) -> None:
            launch = Launch(self.launcher, grid, arguments, settings)
            if isinstance(grid, Fixed):
                launch = Launch(self.launcher, grid.grid, arguments, {**grid.constants})
            self.found.append(launch)
            if self.run:
                launch.again()

        return call


@contextmanager
def watch(kernel: str, *, run: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches of a kernel; without ``run``, no kernel of its module is launched at all."""
    place, found = PLACES[kernel], []
    names = {place.launcher}
    if not run:
        names = {other.launcher for other in PLACES.values() if other.module is place.module}
    launchers = {name: getattr(place.module, name) for name in names}
    for name, launcher in launchers.items():
        setattr(place.module, name, _Watched(launcher, found if name == place.launcher else [], run=run))
    try:
        yield found
    finally:
        for name, launcher in launchers.items():
            setattr(place.module, name, launcher)
    found[:] = [each for each in found if each.settings.get("SUMMARY") == place.summary]


def compile_all(launches: Collection[Launch]) -> list[str]:
    """Compile what was collected without being run, several at a time; returns why some could not be."""

    def build(launch: Launch) -> None:
        arguments = [part.tensor if isinstance(part, Part) else part for part in launch.arguments]
        launch.launcher.function.warmup(*arguments, grid=launch.grid, **launch.settings)

    with ThreadPoolExecutor(_COMPILERS) as pool:
        reasons = {reason for _, reason in pool.map(lambda one: attempt(lambda: build(one)), launches)}
    return sorted(filter(None, reasons))

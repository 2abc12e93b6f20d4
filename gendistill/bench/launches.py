"""Which launcher is behind every row of the kernels' table, and what it is told to launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from gendistill_kernels import decode, delta_chunk, gated_norm, short_conv
from gendistill_kernels.launch import Fixed


class Place(NamedTuple):
    """Say where a kernel is launched.

    Attributes:
        module, launcher: Whose attribute the launcher is.
        summary: What it says as ``SUMMARY``; None if it says nothing.
    """

    module: Any
    launcher: str
    summary: bool | None = None


PLACES = {
    "prepare": Place(delta_chunk, "_prepare"),
    "prepare_wild": Place(delta_chunk, "_prepare_wild"),
    "scan": Place(delta_chunk, "_scan", False),
    "summary": Place(delta_chunk, "_scan", True),
    "carry": Place(delta_chunk, "_carry"),
    "reverse_scan": Place(delta_chunk, "_reverse_scan", False),
    "reverse_summary": Place(delta_chunk, "_reverse_scan", True),
    "values": Place(delta_chunk, "_values"),
    "keys": Place(delta_chunk, "_keys"),
    "keys_wild": Place(delta_chunk, "_keys_wild"),
    "sum_heads": Place(delta_chunk, "_sum_heads"),
    "sum_chunks": Place(delta_chunk, "_sum_chunks"),
    "conv_forward": Place(short_conv, "_forward"),
    "conv_backward": Place(short_conv, "_backward"),
    "norm_forward": Place(gated_norm, "_forward"),
    "norm_backward": Place(gated_norm, "_backward"),
    "decode": Place(decode, "_decode"),
    "decode_group": Place(decode, "_decode"),
}


class Launch(NamedTuple):
    """Hold what a launcher was told; ``launcher[grid](*arguments, **settings)`` does it again."""

    launcher: Any
    grid: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]

    def again(self) -> None:
        """Launch."""
        self.launcher[self.grid](*self.arguments, **self.settings)


class _Watched:
    """Stand in for a launcher, and write down what it is told."""

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

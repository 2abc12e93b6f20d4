"""Marks on a device's own timeline, and what lies between them; nothing here waits before it is read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Moments on the device's current stream; on a CPU, moments of the process.

    Args:
        device: Whose.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """Return this moment: on a GPU the one at which it gets here."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks; the device must have passed both."""
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()


class Spans:
    """Time spent in named parts.

    Args:
        clock: Of the device.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def start(self, name: str) -> None:
        """Begin a part."""
        self._open[name] = self.clock.mark()

    def stop(self, name: str) -> None:
        """End it."""
        self._spans.append((name, self._open.pop(name), self.clock.mark()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        self.start(name)
        yield
        self.stop(name)

    def read(self) -> dict[str, float]:
        """Wait for the device; return the seconds of every part, added up."""
        self.clock.wait()
        found: dict[str, float] = {}
        for name, start, end in self._spans:
            found[name] = found.get(name, 0.0) + self.clock.seconds(start, end)
        return found

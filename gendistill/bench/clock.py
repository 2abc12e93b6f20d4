"""Marks on a device's own timeline; to make one waits for nothing."""

from __future__ import annotations

import time
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

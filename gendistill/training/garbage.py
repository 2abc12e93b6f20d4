"""Python's garbage collector, kept out of the way of training."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Garbage:
    """Objects that refer to one another, collected between two steps only.

    Left alone, the collector looks at all objects of the process in the middle of a step, again and again: on an H200
    that took a third of the host's time.

    Args:
        seconds: Between two collections, at least.
        whole: Every how many of them look at all that has been made since the beginning: what was in use at one
            collection and not any more at the next would stay otherwise.
    """

    def __init__(self, seconds: float = 0.5, *, whole: int = 400) -> None:
        self.seconds, self.whole, self.number = seconds, whole, 0
        self.last = time.perf_counter()

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Collect nothing but by :meth:`collect`; what is there already is not looked at until the end."""
        was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            yield
        finally:
            gc.unfreeze()
            if was_enabled:
                gc.enable()

    def collect(self) -> None:
        """Collect what has been made since the last time, if it is time; older objects are looked at rarely."""
        if time.perf_counter() - self.last > self.seconds:
            self.number += 1
            gc.collect(0 if self.number % self.whole else 2)
            self.last = time.perf_counter()

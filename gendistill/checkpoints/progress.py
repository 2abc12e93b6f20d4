"""Show how far a long file operation is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with every number of bytes done. Writes to standard error only."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.advance(task, done)
        return
    finished, shown = 0, time.monotonic()

    def advance(done: int) -> None:
        nonlocal finished, shown
        finished += done
        if time.monotonic() - shown >= _PLAIN_SECONDS:
            shown = time.monotonic()
            print(
                f"{label}: {finished / max(total, 1):.0%} of {total / 1e9:.2f} GB",
                file=sys.stderr,
                flush=True,
            )

    yield advance

"""What a stage says while it runs: a progress bar on a terminal, one plain line per log interval elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from gendistill.text import printable, printable_lines


class StageView(Protocol):
    """A place where the rows of one stage are shown."""

    def show(self, row: dict[str, Any]) -> None:
        """Show one row of metrics."""
        ...


class TrainingConsole:
    """Messages for people, from the main process only.

    Args:
        main: Whether this process prints at all.
        console: Where to; standard output by default. A terminal gets a live bar, anything else plain lines.
    """

    def __init__(self, *, main: bool = True, console: Console | None = None) -> None:
        self.main = main
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one message."""
        if self.main:
            self.console.print(_plain(text))

    def warn(self, text: str) -> None:
        """Print one message that must not be missed."""
        if self.main:
            self.console.print(_plain(f"warning: {text}"), style="yellow")

    @contextmanager
    def stage(self, name: str, *, num_steps: int, step: int) -> Iterator[StageView]:
        """Open the view of one stage.

        Args:
            name: Name of the stage.
            num_steps: Steps in all.
            step: Steps already finished, when resuming.
        """
        if not self.main:
            yield _Silence()
        elif not self.console.is_terminal:
            yield _Lines(self, name, num_steps, step)
        else:
            columns = (
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
            )
            with Progress(*columns, console=self.console) as progress:
                yield _Bar(progress, name, num_steps, step)


def _plain(text: str) -> Text:
    """Take a message as it is: brackets and colons in names and paths are neither styles nor pictures."""
    return Text(printable_lines(text))


class _Silence:
    def show(self, row: dict[str, Any]) -> None:
        """Show nothing."""


class _Lines:
    def __init__(self, console: TrainingConsole, name: str, num_steps: int, step: int) -> None:
        self.console, self.name, self.num_steps = console, name, num_steps
        self.eta = _Eta(num_steps, step)

    def show(self, row: dict[str, Any]) -> None:
        step = row["step"]
        share = f"{100 * step // self.num_steps:3d}%"
        self.console.say(
            f"{self.name}  {step:,}/{self.num_steps:,}  {share}  {numbers(row)}  eta {self.eta(row)}"
        )


class _Bar:
    def __init__(self, progress: Progress, name: str, num_steps: int, step: int) -> None:
        self.progress = progress
        self.task = progress.add_task(printable(name), total=num_steps, completed=step, numbers="")
        self.eta = _Eta(num_steps, step)

    def show(self, row: dict[str, Any]) -> None:
        text = f"{numbers(row)}  eta {self.eta(row)}"
        self.progress.update(self.task, completed=row["step"], numbers=text)


class _Eta:
    """The time that is left, from the pace since this process started."""

    def __init__(self, num_steps: int, step: int) -> None:
        self.num_steps, self.first_step = num_steps, step
        self.first_seconds: float | None = None

    def __call__(self, row: dict[str, Any]) -> str:
        if self.first_seconds is None:
            self.first_step, self.first_seconds = row["step"], row["seconds"]
        done = row["step"] - self.first_step
        if row["step"] >= self.num_steps:
            return "0s"
        if done == 0:
            return "?"
        return duration((row["seconds"] - self.first_seconds) / done * (self.num_steps - row["step"]))


def numbers(row: dict[str, Any]) -> str:
    """Lay out the numbers of one row of metrics."""
    shown = ["no finite step" if row["loss"] is None else f"loss {row['loss']:.4f}"]
    shown += [f"{name} {row['parts'][name]:.4f}" for name in ("kl", "ce") if name in row["parts"]]
    shown.append("lr " + "/".join(f"{rate:.1e}" for rate in dict.fromkeys(row["lr"].values())))
    shown.append(f"gnorm {row['grad_norm']:.2f}")
    shown.append(f"{row['tokens_per_second']:,.0f} tok/s")
    if "mfu" in row.get("speed", ()):
        shown.append(f"mfu {row['speed']['mfu']:.0%}")
    if "memory_gib" in row:
        shown.append(f"{row['memory_gib']:.1f} GiB")
    if "skipped" in row:
        shown.append(f"skipped {row['skipped']:,}")
    if "heldout" in row:
        shown.append(f"heldout kl {row['heldout']['kl']:.4f}")
    cosines = {name: value for name, value in row.get("layers", {}).items() if name.endswith("/cosine")}
    if cosines:
        worst = min(cosines, key=lambda name: cosines[name])
        shown.append(f"worst cosine {cosines[worst]:.3f} (layer {worst.split('/')[0]})")
    if "score" in row:
        shown.append(f"score {row['score']['value']:.1%}")
    return "  ".join(shown)


def duration(seconds: float) -> str:
    """Write a time as ``42s``, ``12m05s`` or ``3h58m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

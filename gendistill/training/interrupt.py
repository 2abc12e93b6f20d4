"""Stop between two steps when the machine or the user asks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gendistill.errors import TrainingError


class StageStopped(TrainingError):
    """A stage that stopped on request and can be resumed.

    Args:
        at: What stopped it, and at which step.
        saved: What became of the work.
        signal_number: The signal; the exit code is 128 plus it, as a shell would say.
        where: Stage.
        hint: How to resume.
    """

    kind = "stopped"

    def __init__(self, at: str, *, saved: str, signal_number: int, where: str, hint: str) -> None:
        super().__init__(f"{at}; {saved}", where=where, hint=hint)
        self.at = at
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class StopRequest:
    """The signal that asked to stop, if any has."""

    def __init__(self) -> None:
        self.signal_number = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; a second one acts at once, as without us.

    Outside the main thread, where Python allows no handlers, signals keep their usual effect.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()

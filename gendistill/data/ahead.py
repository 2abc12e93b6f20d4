"""Results that are made in a thread before they are asked for, in the order of the calls."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

# seconds; a source that hangs must not keep a process from ending
PATIENCE = 5.0


class Stopped(Exception):
    """What is being made is no longer wanted."""


class Ahead:
    """What a method returns, call by call, made in a thread and kept until it is taken.

    The thread ends with the owner of the method, with the process, or after the method's first error; that reaches
    whoever takes what it was to return, then and ever after.

    Args:
        make: A method that this thread alone calls. It may look at :attr:`stopped` now and then, and raise
            :class:`Stopped`.
        number: Results that may wait.
    """

    def __init__(self, make: Callable[[], Any], number: int) -> None:
        self._make = weakref.WeakMethod(make)
        self._number = number
        self._process = os.getpid()
        self._made: deque[tuple[Any, BaseException | None]] = deque()
        self._changed = threading.Condition()
        self.stopped = False
        self._thread = threading.Thread(target=self._work, name="gendistill-data", daemon=True)
        owner = self._make()
        self._finalizer = weakref.finalize(getattr(owner, "__self__", self), self.close, PATIENCE)
        del owner
        self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.stopped or len(self._made) < self._number)
            make = self._make()
            if self.stopped or make is None:
                return
            made, error = None, None
            try:
                made = make()
            except BaseException as raised:
                error = raised
            del make
            with self._changed:
                if self.stopped:
                    return
                self._made.append((made, error))
                self._changed.notify_all()
                if error is not None:
                    return

    def take(self) -> Any:
        """Return the next result, as soon as it is there.

        Raises:
            Stopped: It is closed.
            RuntimeError: This process was forked from the one that has the thread.
            Exception: What the method raised.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "what is prepared ahead was begun in another process: its thread did not follow the fork; load a state "
                "of the stream first"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._made or self.stopped)
            if self.stopped:
                raise Stopped
            made, error = self._made[0]
            if error is not None:
                raise error
            self._made.popleft()
            self._changed.notify_all()
            return made

    def waits(self) -> bool:
        """Whether there is a result to take now; an error is none."""
        if os.getpid() != self._process:
            return False
        with self._changed:
            return bool(self._made) and self._made[0][1] is None

    def close(self, patience: float | None = None) -> bool:
        """Make nothing more, and wait for the thread.

        Args:
            patience: Seconds to wait at most; None: to the end.
        Returns: Whether the thread is gone; if not, it is still at what it makes.
        """
        if os.getpid() != self._process:
            # of a forked process, where the lock may never be free
            return True
        with self._changed:
            self.stopped = True
            self._made.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(patience)
        return not self._thread.is_alive()

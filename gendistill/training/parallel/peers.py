"""How the processes of a run notice that one of them is gone, and hear what another one has to say.

Everything goes through the store by which the processes found each other, beside the collectives of training: a
process that waits in a collective cannot look around, and one that waits for the main process may wait for hours.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendistill.errors import GendistillError, TrainingError

# a process that has lost another may still end by itself, with an error of its own
_GRACE_S = 10.0
# what a thread may take to end with the process
_REST_S = 2.0
_BEAT_S = 1.0
# what a process takes from the end of its connections to its own
_ENDING_S = 2.0
_LONGEST_NAP_S = 0.1
# ranks that a process watches; together they watch all, and the store is asked little
_WATCHED = 8
_UNREACHABLE = "the process that all others speak to, at MASTER_ADDR, cannot be reached"
# how the backends say that the other end of a connection is gone
_BROKEN = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recvValue failed"),
    *("NCCL", "sendBytes failed", "Timed out waiting", "Connection refused", "Socket closed"),
)


@dataclass(frozen=True, slots=True)
class Situation:
    """What an error about a lost process says beside its rank.

    Attributes:
        where: Stage or command.
        kept: What is intact.
        hint: What to do next.
    """

    where: str
    kept: str
    hint: str


class Peers:
    """The other processes, as a thread of this one sees them.

    Every process counts up a number in the store. Who watches, and sees the number of one of the next few ranks stand
    still for ``patience_s``, says so to all; so does a process that leaves with an error. The main thread gets the
    error where it can, and where it hangs in a collective a thread prints it and ends the process with exit code 1.

    Args:
        store: A torch store that all share.
        rank: Of this process.
        world: Number of processes.
        patience_s: How long a process may be silent.
    """

    def __init__(self, store: Any, *, rank: int, world: int, patience_s: float) -> None:
        self.rank, self.world, self.patience_s = rank, world, patience_s
        self._store = store
        self._others = [other for other in range(world) if other != rank]
        self._situations: list[Callable[[], Situation]] = []
        self._scope = 0
        self._calls = 0
        self._lost: str | None = None
        self._changed = threading.Condition()
        self._store.set(f"who/{rank}", json.dumps(_who()))
        self._store.set(f"alive/{rank}", "0")
        for other in self._others:
            self._wait_for(f"alive/{other}")
        self._who = {other: json.loads(store.get(f"who/{other}")) for other in self._others}
        place = _who()["place"]
        self._beside = [other for other in self._others if place and self._who[other]["place"] == place]
        self._next = [(rank + step) % world for step in range(1, 1 + min(_WATCHED, world - 1))]
        self._answered = time.monotonic()
        self._over = threading.Event()
        # of its own connection: a thread that waits for an answer keeps the others from asking
        self._threads = [
            threading.Thread(target=work, args=arguments, name="gendistill peers", daemon=True)
            for work, arguments in ((self._beat, (store.clone(),)), (self._guard, ()))
        ]
        for thread in self._threads:
            thread.start()
        # a thread that comes back from the store into an interpreter that has gone aborts the process
        atexit.register(self._rest)

    @contextmanager
    def watching(self, situation: Callable[[], Situation]) -> Iterator[None]:
        """Notice inside that another process is gone. Entered on every process.

        Args:
            situation: What to say beside the rank, at that moment.
        Raises:
            TrainingError: A process is gone.
        """
        with self._changed:
            self._situations.append(situation)
            if len(self._situations) == 1:
                self._scope, self._lost = self._scope + 1, None
        try:
            yield
        except BaseException as error:
            loss = self._explain(error)
            self._say_left(loss or error)
            if loss is not None and not isinstance(error, GendistillError):
                raise loss from error
            raise
        finally:
            with self._changed:
                self._situations.pop()
                self._changed.notify_all()

    def tell(self, key: str, value: Any) -> None:
        """Leave a value for the others under a new key."""
        self._store.set(key, pickle.dumps(value))

    def hear(self, key: str) -> Any:
        """Wait, however long it takes, for what another process leaves under a key.

        Raises:
            TrainingError: A process is lost meanwhile.
        """
        self._wait_for(key)
        return pickle.loads(self._store.get(key))

    def next_call(self) -> str:
        """Name a conversation; the same on every process if all have had as many."""
        self._calls += 1
        return f"call/{self._calls}"

    def everybody(self, key: str) -> None:
        """Wait until every process has come here with this key.

        Raises:
            TrainingError: A process is lost meanwhile.
        """
        for part in ("here", "gone"):
            if self._store.add(f"{key}/{part}", 1) == self.world:
                self._store.set(f"{key}/all {part}", "1")
            if part == "here" or self.rank == 0:
                # the store may live in the first process, which must not end before the others have asked
                self._wait_for(f"{key}/all {part}")

    def _wait_for(self, key: str) -> None:
        nap = 0.001
        while not self._store.check([key]):
            if self._lost is not None:
                raise self._error(self._lost)
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_S)

    def _rest(self) -> None:
        """Have the threads end, unless one waits for a store that does not answer."""
        self._over.set()
        for thread in self._threads:
            thread.join(_REST_S)

    def _beat(self, store: Any) -> None:
        beat = min(_BEAT_S, self.patience_s / 5)
        count, seen, scope = 0, {other: (b"", 0.0) for other in self._next}, 0
        last = time.monotonic()
        while not self._over.wait(beat):
            count += 1
            now = time.monotonic()
            watched = bool(self._situations) and self._lost is None
            # who was asleep itself, or begins to watch, cannot know how long the others have been silent
            if scope != self._scope or now - last > self.patience_s / 2:
                seen, scope = {other: (b"", now) for other in self._next}, self._scope
            last = now
            try:
                store.set(f"alive/{self.rank}", str(count))
                # something that is answered, also where nobody watches
                store.check([f"alive/{self.rank}"])
                lost = self._look(store, seen, now, scope) if watched else None
                self._answered = time.monotonic()
            except Exception as error:
                if not watched:
                    return
                # whoever kept the store may be the one
                lost = self._ended_soon() or f"{_UNREACHABLE}: {_first_line(error)}"
            if lost is not None:
                self._lose(lost)

    def _guard(self) -> None:
        """Notice that the store does not answer: a cable that is pulled breaks no connection."""
        beat = min(_BEAT_S, self.patience_s / 5)
        last, scope = time.monotonic(), 0
        while not self._over.wait(beat):
            now = time.monotonic()
            if scope != self._scope or now - last > self.patience_s / 2:
                scope, self._answered = self._scope, max(now, self._answered)
            last = now
            if self._situations and self._lost is None and now - self._answered > self.patience_s:
                self._lose(f"{_UNREACHABLE}: no answer for {self.patience_s:.0f} s")

    def _look(self, store: Any, seen: dict[int, tuple[bytes, float]], now: float, scope: int) -> str | None:
        """Compare the others' numbers with those of before; say who is lost, if anybody is."""
        if store.check([f"lost/{scope}"]):
            return store.get(f"lost/{scope}").decode()
        lost = self._ended()
        counts = store.multi_get([f"alive/{other}" for other in self._next])
        for other, found in zip(self._next, counts, strict=True):
            before, since = seen[other]
            if found != before:
                seen[other] = (found, now)
            elif lost is None and now - since > self.patience_s:
                lost = f"{self._name(other)} is lost: nothing was heard of it for {self.patience_s:.0f} s"
        if lost is not None:
            # the first one to notice is believed by all
            store.compare_set(f"lost/{scope}", "", lost)
        return lost

    def _ended(self) -> str | None:
        ended = [other for other in self._beside if _has_ended(self._who[other]["pid"])]
        return f"{self._name(ended[0])} is lost: it has ended" if ended else None

    def _ended_soon(self) -> str | None:
        """Say who ends within a moment: the connections of a process are closed before it is gone."""
        until = time.monotonic() + _ENDING_S
        while (lost := self._ended()) is None and time.monotonic() < until:
            time.sleep(_LONGEST_NAP_S)
        return lost

    def _name(self, other: int) -> str:
        return f"rank {other} (process {self._who[other]['pid']} on {self._who[other]['host']})"

    def _lose(self, lost: str) -> None:
        """Tell the main thread; where it does not listen, end the process."""
        with self._changed:
            if self._lost is not None:
                return
            self._lost = lost
            self._changed.notify_all()
            error = self._error(lost)
            deadline = time.monotonic() + min(_GRACE_S, 2 * self.patience_s)
            while self._situations and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            hangs = bool(self._situations)
        if hangs:
            print(error, file=sys.stderr, flush=True)
            os._exit(TrainingError.exit_code)

    def _explain(self, error: BaseException) -> TrainingError | None:
        """Turn the error of a broken connection into one that says who is lost, once that is known."""
        if not isinstance(error, RuntimeError | OSError) or not any(sign in str(error) for sign in _BROKEN):
            return None
        with self._changed:
            deadline = time.monotonic() + self.patience_s + _GRACE_S / 2
            while self._lost is None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._error(self._lost or f"a connection broke: {_first_line(error)}")

    def _error(self, lost: str) -> TrainingError:
        if not self._situations:
            return TrainingError(lost, hint="run the same command again")
        situation = self._situations[-1]()
        return TrainingError(f"{lost}. {situation.kept}", where=situation.where, hint=situation.hint)

    def _say_left(self, error: BaseException) -> None:
        if len(self._situations) > 1:
            return
        why = error.message if isinstance(error, GendistillError) else type(error).__name__
        me = _who()
        said = f"rank {self.rank} (process {me['pid']} on {me['host']}) has stopped: {_first_line(why)}"
        try:
            self._store.compare_set(f"lost/{self._scope}", "", said)
        except Exception:
            # nobody can be told any more; the silence will say it
            return


def _who() -> dict[str, Any]:
    """Describe this process to the others; ``place`` is the same where they see one another's numbers."""
    try:
        place = [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    except OSError:
        place = None
    return {"pid": os.getpid(), "host": socket.gethostname(), "place": place}


def _has_ended(pid: int) -> bool:
    """Whether a process of this machine has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return state in "ZX"


def _first_line(error: object) -> str:
    return json.dumps(next(iter(str(error).splitlines()), ""), ensure_ascii=False)[1:201].rstrip('"')

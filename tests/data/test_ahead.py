"""What is prepared in a thread: in order, with errors where they belong, and no thread that outlives its use."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from gendistill.data.ahead import Ahead, Stopped


class Counter:
    """Counts, slowly if asked to; fails at one number."""

    def __init__(
        self, number: int, *, fails_at: int | None = None, gate: threading.Event | None = None
    ) -> None:
        self.count, self.fails_at, self.gate = 0, fails_at, gate
        self.ahead = Ahead(self.make, number)

    def make(self) -> int:
        if self.gate is not None:
            while not self.gate.wait(0.01):
                if self.ahead.stopped:
                    raise Stopped
        if self.count == self.fails_at:
            raise ValueError(f"no {self.count}")
        self.count += 1
        return self.count


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gendistill-data"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    gc.collect()
    before = threads()
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while [thread for thread in threads() if thread not in before] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [thread for thread in threads() if thread not in before] == []


def settled(counter: Counter) -> int:
    """Return the count once it rises no more."""
    last = -1
    while last != counter.count:
        last = counter.count
        time.sleep(0.1)
    return last


@pytest.mark.parametrize("number", [1, 3])
def test_results_come_in_order_and_no_more_wait_than_asked(number):
    counter = Counter(number)
    assert settled(counter) == number
    assert [counter.ahead.take() for _ in range(10)] == list(range(1, 11))
    assert settled(counter) == 10 + number
    counter.ahead.close()


def test_an_error_comes_where_its_result_would_and_stays():
    counter = Counter(4, fails_at=2)
    assert [counter.ahead.take() for _ in range(2)] == [1, 2]
    assert not counter.ahead.waits()
    for _ in range(2):
        with pytest.raises(ValueError, match="no 2"):
            counter.ahead.take()


def test_it_can_be_asked_without_waiting():
    gate = threading.Event()
    counter = Counter(1, gate=gate)
    assert not counter.ahead.waits()
    gate.set()
    assert counter.ahead.take() == 1
    settled(counter)
    assert counter.ahead.waits()
    counter.ahead.close()


def test_closing_stops_what_is_being_made():
    counter = Counter(1, gate=threading.Event())
    time.sleep(0.05)
    started = time.monotonic()
    counter.ahead.close()
    assert time.monotonic() - started < 1
    assert counter.count == 0


def test_a_forgotten_owner_ends_its_thread():
    counter = Counter(2)
    settled(counter)
    assert threads()
    del counter  # the fixture sees that the thread is gone


@pytest.mark.parametrize("ends", ["return", "interrupt"])
def test_a_process_ends_though_a_source_hangs(ends):
    program = """
        import signal, sys, threading, time
        from gendistill.data import ahead
        ahead.PATIENCE = 0.2
        class Hangs:
            def make(self):
                time.sleep(600)
        hangs = Hangs()
        before = ahead.Ahead(hangs.make, 1)
        print("ready", flush=True)
        if sys.argv[1] == "interrupt":
            before.take()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), ends]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if ends == "interrupt":
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert ("KeyboardInterrupt" in errors) == (ends == "interrupt")


def test_who_waits_for_what_is_closed_is_told():
    counter = Counter(1, gate=threading.Event())
    found: list[BaseException] = []

    def take() -> None:
        try:
            counter.ahead.take()
        except Stopped as error:
            found.append(error)

    waiting = threading.Thread(target=take, daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert counter.ahead.close()
    waiting.join(5)
    assert found


def test_closing_says_whether_the_thread_is_gone():
    gate = threading.Event()

    class Hangs:
        def make(self) -> None:
            gate.wait(20)

    hangs = Hangs()
    ahead = Ahead(hangs.make, 1)
    assert not ahead.close(0.05)
    gate.set()
    assert ahead.close()


def test_a_forked_process_is_told_that_the_thread_stayed_behind():
    program = """
        import os, sys
        from gendistill.data.ahead import Ahead
        class Ones:
            def make(self):
                return 1
        ones = Ones()
        ahead = Ahead(ones.make, 2)
        assert ahead.take() == 1
        # as at a fork that comes while the thread puts a result down
        ahead._changed.acquire()
        if os.fork() == 0:
            try:
                ahead.take()
            except RuntimeError as error:
                print(error, ahead.waits(), ahead.close(), flush=True)
            os._exit(0)
        ahead._changed.release()
        os.wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "was begun in another process" in done.stdout
    assert done.stdout.endswith("False True\n")

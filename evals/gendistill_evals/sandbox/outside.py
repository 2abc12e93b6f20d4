"""Run a program that nobody has read behind barriers of the kernel, and say how it ended. Imports no torch."""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from gendistill_evals.errors import EvalError
from gendistill_evals.sandbox.folder import remove, size_of, size_of_removed
from gendistill_evals.sandbox.supervise import Watch
from gendistill_evals.sandbox.system_calls import MACHINES, this_machine

_PACKAGE = Path(__file__).parent
# The package is not imported inside as it is here: only the few modules that put up barriers are.
_START = """
import sys, types
for name, folder in (("gendistill_evals", sys.argv[1]), ("gendistill_evals.sandbox", sys.argv[2])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from gendistill_evals.sandbox.inside import main
main(int(sys.argv[3]), int(sys.argv[4]))
"""
_LIBRARIES = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/localtime"),
    "/usr/share/zoneinfo",
)
# Between two looks at the clock and at the size of the work folder.
_LOOK_EVERY_S = 0.05


class Ended(StrEnum):
    """The way in which a program ended."""

    FINISHED = "finished"
    RAISED = "raised"
    EXITED = "exited"
    REFUSED = "refused"
    TIME = "time"
    MEMORY = "memory"
    DISK = "disk"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Attributes:
        wall_s: Seconds on the clock, from its start.
        cpu_s: Whole seconds of processor time.
        memory_bytes: Addresses, which include the interpreter's own: about 40 MB.
        file_bytes: Size of one file.
        disk_bytes: Size of its folder, looked at 20 times a second, with files that it removed and still holds.
        files: Files and folders in its folder.
        open_files: Files open at once.
        output_bytes: Kept from each of standard output and standard error; the rest is read and dropped.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    files: int = 1000
    open_files: int = 64
    output_bytes: int = 64 << 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a program.

    Attributes:
        ended: How it ended.
        reason: The same in words.
        refused: What the kernel refused it, each thing once; a program may finish all the same.
        stdout, stderr: What it wrote, cut at ``Limits.output_bytes``.
        cut: Whether it wrote more.
        wall_s, cpu_s: Seconds it took.
        peak_bytes: Most memory that it held; 0 where it was killed from outside.
    """

    ended: Ended
    reason: str
    refused: tuple[str, ...]
    stdout: str
    stderr: str
    cut: bool
    wall_s: float
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Barriers:
    """The barriers of a run beside the filter of system calls and the limits, which every run has.

    Attributes:
        namespaces: Own users, mounts, processes, network, messages and names; the mounts show only what is allowed.
        landlock: Files are opened only where it is allowed.
    """

    namespaces: bool
    landlock: bool

    def __str__(self) -> str:
        names = ["namespaces"] * self.namespaces + ["Landlock"] * self.landlock
        return " + ".join([*names, "seccomp"])


# What is tried, the strongest first. Each has a barrier for files (Landlock or mounts), for the network (seccomp, and
# the namespace) and for processes (seccomp, and the namespace).
SETS = (
    Barriers(namespaces=True, landlock=True),
    Barriers(namespaces=False, landlock=True),
    Barriers(namespaces=True, landlock=False),
)


def run(source: str, limits: Limits | None = None, *, barriers: Barriers | None = None) -> Outcome:
    """Run a Python program and say how it ended.

    It runs in an interpreter of its own, of this version and with the standard library alone, in an empty folder that
    is removed afterwards. It sees no environment variables and an empty standard input. It may start no process and no
    thread, open no socket, and read and write no file beyond its folder and the libraries.

    Args:
        source: The program.
        limits: What it may use; None for ``Limits()``.
        barriers: One of ``SETS``; None for the first that holds on this machine.
    Returns: How it ended. A program that leaves the interpreter by itself has not finished, whatever its exit code.
    Raises:
        EvalError: This machine cannot contain programs (``why_not`` says why); nothing was run.
    """
    if barriers is None:
        barriers, reason = _choose()
        if barriers is None:
            raise EvalError(
                f"programs that a model wrote cannot be contained on this machine: {reason}",
                hint="score such tasks on Linux with Landlock or user namespaces, or leave them out; "
                "programs never run without barriers",
            )
    return _run(source, limits or Limits(), barriers)


def why_not() -> str | None:
    """Say what this machine lacks to contain programs; None if it can.

    Decided once in a process: every set of barriers is put up around a program that tries to get out, and the first
    that holds is used from then on.
    """
    return _choose()[1]


def in_use() -> Barriers | None:
    """Return the barriers that ``run`` puts up on this machine; None if there are none that hold."""
    return _choose()[0]


@functools.cache
def _choose() -> tuple[Barriers | None, str | None]:
    if sys.platform != "linux":
        return None, f"this is {platform.system()}, and its kernel has no such barriers; Linux has"
    if this_machine() is None:
        return None, f"system calls of {platform.machine()} are not known, only of {', '.join(MACHINES)}"
    reasons = []
    for barriers in SETS:
        reason = self_check(barriers)
        if reason is None:
            return barriers, None
        reasons.append(f"{barriers}: {reason}")
    return None, "; ".join(reasons)


# Tries what a program must not be able to do, and says by a line each what it could.
_ATTEMPTS = """
import hashlib, os, socket, sys

def attempt(what, act):
    try:
        act()
    except OSError:
        return
    print(what)

def start():
    if os.fork() == 0:
        os._exit(0)

with open("own", "w") as file:
    file.write(hashlib.sha256(b"").hexdigest())
os.rename("own", "mine")
assert len(open("mine").read()) == 64
outside = {outside!r}
attempt("read a file outside", lambda: open(outside + "/read").read())
attempt("write a file outside", lambda: open(outside + "/read", "a").close())
attempt("make a file outside", lambda: open(outside + "/made", "w").close())
attempt("make a folder outside", lambda: os.mkdir(outside + "/folder"))
attempt("remove a file outside", lambda: os.remove(outside + "/remove"))
attempt("change a mode outside", lambda: os.chmod(outside + "/read", 0o777))
attempt("shorten a file outside", lambda: os.truncate(outside + "/read", 0))
attempt("link to a file outside", lambda: os.link(outside + "/read", "link"))
attempt("open a network socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
attempt("open a local socket", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
attempt("signal its parent", lambda: os.kill(os.getppid() or {parent}, 0))
attempt("signal the caller", lambda: os.kill({parent}, 0))
attempt("leave its group of processes", os.setsid)
for _ in range(8):
    attempt("start a process", start)
attempt("run another program", lambda: os.execv({python!r}, [{python!r}, "-c", "print('run another program')"]))
"""


def self_check(barriers: Barriers) -> str | None:
    """Put barriers up around a program that tries to get out of them.

    Returns: What broke or what it could do; None if all holds.
    """
    outside = Path(tempfile.mkdtemp(prefix="gendistill-outside-"))
    try:
        for name in ("read", "remove"):
            (outside / name).write_text("kept")
        source = _ATTEMPTS.format(outside=str(outside), parent=os.getpid(), python=sys.executable)
        try:
            outcome = _run(source, Limits(wall_s=20), barriers)
        except EvalError as error:
            return error.message
        if outcome.stdout:
            return f"a program inside could {', '.join(dict.fromkeys(outcome.stdout.splitlines()))}"
        if outcome.ended is not Ended.FINISHED:
            return f"a program inside does not work: {outcome.reason}"
        kept = {path.name: path.read_text() for path in outside.iterdir() if path.is_file()}
        if kept != {"read": "kept", "remove": "kept"} or len(list(outside.iterdir())) != 2:
            return "a program inside changed files outside"
        return None
    finally:
        remove(outside)


def _run(source: str, limits: Limits, barriers: Barriers) -> Outcome:
    # Resolved: what is allowed is compared with what paths lead to.
    scratch = Path(tempfile.mkdtemp(prefix="gendistill-program-")).resolve()
    try:
        work, root = scratch / "work", scratch / "root"
        work.mkdir()
        root.mkdir()
        return _supervised(source, limits, barriers, work, root)
    finally:
        remove(scratch)


def _supervised(source: str, limits: Limits, barriers: Barriers, work: Path, root: Path) -> Outcome:
    token = secrets.token_hex(16)
    order = {
        **asdict(barriers),
        **{"source": source, "token": token, "work": str(work), "root": str(root)},
        **{"limits": asdict(limits), "readable": _readable()},
    }
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    report, report_in = os.pipe()
    arguments = [str(_PACKAGE.parent), str(_PACKAGE), str(there.fileno()), str(report_in)]
    with here, there:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(there.fileno(), report_in),
                cwd="/",
                env={"TMPDIR": str(work), "HOME": str(work), "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        finally:
            there.close()
            os.close(report_in)
        with process:
            watch = Watch(process, here, report, keep=limits.output_bytes)
            try:
                watch.order(json.dumps(order).encode("utf-8", "surrogatepass"))
                started = time.monotonic()
                stopped = None
                while not watch.ended and stopped is None:
                    watch.look(_LOOK_EVERY_S)
                    if time.monotonic() - started > limits.wall_s:
                        stopped = Ended.TIME
                    elif _too_large(work, limits, process.pid):
                        stopped = Ended.DISK
                seconds = time.monotonic() - started
            finally:
                # All of them: none can leave the group, and they have not been waited for.
                os.killpg(process.pid, signal.SIGKILL)
                watch.drain()
    return _outcome(watch, limits, stopped, token, seconds)


def _too_large(work: Path, limits: Limits, process: int) -> bool:
    size, count = size_of(work, most=limits.files)
    size += size_of_removed(process, mapped=limits.file_bytes)
    return size > limits.disk_bytes or count > limits.files


def _outcome(watch: Watch, limits: Limits, stopped: Ended | None, token: str, seconds: float) -> Outcome:
    if watch.broken is not None:
        raise EvalError(f"a barrier could not be put up: {watch.broken}")
    end, said = watch.end, watch.said()
    if stopped is None and end is None:
        raise EvalError(
            f"the process around a program ended before it: {watch.text(2).strip()[-500:] or 'it was killed'}"
        )
    ended, reason = _verdict(end or {}, said, limits, stopped, token)
    refused = tuple(watch.refused)
    if refused and ended is Ended.RAISED:
        ended = Ended.REFUSED
    if refused and ended is not Ended.FINISHED:
        reason = f"{reason}; it was refused to {', to '.join(refused)}"
    if watch.cut:
        reason = f"{reason}; its output was cut at {limits.output_bytes:,} bytes"
    return Outcome(
        *(ended, reason, refused, watch.text(1), watch.text(2), watch.cut, seconds),
        *((end or {}).get("cpu_s", 0.0), (end or {}).get("peak_bytes", 0)),
    )


def _verdict(
    end: dict[str, Any], said: dict[str, Any], limits: Limits, stopped: Ended | None, token: str
) -> tuple[Ended, str]:
    if stopped is Ended.TIME:
        return stopped, f"it did not end within {limits.wall_s:g} s"
    if stopped is Ended.DISK:
        return stopped, (
            f"its folder grew beyond {limits.disk_bytes:,} bytes or {limits.files:,} files, or hides them"
        )
    code = end["code"]
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and end["cpu_s"] >= limits.cpu_s - 0.5:
        return Ended.TIME, f"it used more than {limits.cpu_s} s of processor time"
    if code < 0:
        return Ended.CRASHED, f"it was ended by {signal.Signals(-code).name}"
    if said.get("token") == token:
        return Ended.FINISHED, "it came to its end"
    if "error" in said:
        causes = {"memory": Ended.MEMORY, "disk": Ended.DISK, "refused": Ended.REFUSED}
        limit = {
            "memory": f" (it may use {limits.memory_bytes:,} bytes)",
            "disk": f" (a file may hold {limits.file_bytes:,} bytes)",
            "refused": " (the file is outside, or what it asked for is not allowed)",
        }
        cause = said.get("cause", "")
        return causes.get(cause, Ended.RAISED), f"{said['error']}{limit.get(cause, '')}"
    code = said.get("exit", code)
    return Ended.EXITED, f"it left before its end, with exit code {code}"


def _readable() -> list[str]:
    """List what a program may read: the standard library of this interpreter and what it is linked with."""
    paths = sysconfig.get_paths()
    own = [paths["stdlib"], paths["platstdlib"], str(Path(sys.base_exec_prefix) / "lib")]
    named = {path for path in (*own, *_LIBRARIES) if Path(path).exists()}
    return sorted(named | {str(Path(path).resolve()) for path in named})

"""What runs behind the barriers: puts them up, runs one program, and says how it ended. Imports no torch.

Three processes. The first enters namespaces, where it may. Its child, which is the first process of its namespace,
leaves the file system, and its end kills all others. The third gives up its rights, and runs the program. A step that
fails ends the run before the program starts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import sys
import traceback
import types
from typing import Any, NoReturn

from gendistill_evals.sandbox import landlock, namespaces
from gendistill_evals.sandbox.kernel import die_with_parent, drop_capabilities, gain_no_privileges
from gendistill_evals.sandbox.seccomp import install_filter
from gendistill_evals.sandbox.system_calls import Machine, this_machine

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_LONGEST_ERROR = 500
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV)
_TOO_LARGE = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


def main(control: int, report: int) -> NoReturn:
    """Read the order from standard input and carry it out.

    Args:
        control: Socket to whoever ordered the run: what broke, the listener of refused calls, how the program ended.
        report: Pipe that says that the program came to its end, or what it raised.
    """
    order = json.loads(sys.stdin.buffer.read())
    channel = socket.socket(fileno=control)
    step = "the machine"
    try:
        machine = this_machine()
        assert machine is not None, "the caller has checked it"
        step = "the end of the parent"
        die_with_parent()
        gain_no_privileges()
        if order["namespaces"]:
            step = "namespaces"
            namespaces.enter(machine)
        step = "a process"
        child = os.fork()
        if child == 0:
            step = "the end of the parent"
            die_with_parent()
            if order["namespaces"]:
                step = "mounts"
                namespaces.keep_only(
                    *(machine, order["root"]),
                    readable=order["readable"],
                    writable=order["work"],
                    devices=DEVICES,
                )
            step = "a process"
            _guard(order, channel, report, machine)
        os.waitpid(child, 0)
        os._exit(0)
    except OSError as error:
        _say(channel, {"broken": f"{step}: {error.strerror or error}"})
        os._exit(1)


def _guard(order: dict[str, Any], channel: socket.socket, report: int, machine: Machine) -> NoReturn:
    """Start the process of the program, wait for its end and say what it was."""
    program = os.fork()
    if program == 0:
        step = "the end of the parent"
        try:
            die_with_parent()
            step = "limits"
            _limit(order["limits"])
            os.chdir(order["work"])
            step = "capabilities"
            drop_capabilities(machine)
            if order["landlock"]:
                step = "Landlock"
                landlock.restrict(readable=order["readable"], writable=order["work"], devices=DEVICES)
            step = "the filter of system calls"
            os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
            listener = _filter(channel, machine)
        except OSError as error:
            _say(channel, {"broken": f"{step}: {error.strerror or error}"})
            os._exit(1)
        if listener is not None:
            socket.send_fds(channel, [b'{"listener": true}'], [listener])
            os.close(listener)
        channel.close()
        os.dup2(report, 3)
        os.closerange(4, 1 << 16)
        _run(order["source"], order["token"], 3, work=order["work"], visible=order["readable"])
    _, status, usage = os.wait4(program, 0)
    code = os.waitstatus_to_exitcode(status)
    _say(
        channel,
        {"code": code, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024},
    )
    os._exit(0)


def _filter(channel: socket.socket, machine: Machine) -> int | None:
    settings: dict[str, Any] = {"pid": os.getpid(), "control": channel.fileno()}
    try:
        return install_filter(machine, **settings, listen=True)
    except OSError as error:
        # Another filter has a listener, or the kernel is older than listeners; calls are refused all the same.
        if error.errno not in (errno.EBUSY, errno.EINVAL):
            raise
        return install_filter(machine, **settings, listen=False)


def _limit(limits: dict[str, int]) -> None:
    seconds = limits["cpu_s"]
    for name, soft, hard in (
        ("CPU", seconds, seconds + 1),
        ("AS", limits["memory_bytes"], limits["memory_bytes"]),
        ("FSIZE", limits["file_bytes"], limits["file_bytes"]),
        ("NOFILE", limits["open_files"], limits["open_files"]),
        *((name, 0, 0) for name in ("NPROC", "CORE", "MEMLOCK", "MSGQUEUE")),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}", _LIMITS.get(name, -1)), (soft, hard))


# Limits that Python has no name for.
_LIMITS = {"MSGQUEUE": 12}


def _run(source: str, token: str, report: int, *, work: str, visible: list[str]) -> NoReturn:
    """Run the program as ``__main__``; what it printed and how it ended is all that leaves."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program"]
    try:
        # Without the annotations import of this file, under which a program may name types that do not exist.
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
        said = {"token": token}
    except SystemExit as error:
        said = {"exit": str(error.code)[:_LONGEST_ERROR]}
    except BaseException as error:
        said = {"error": _described(error), **_cause(error, work, visible)}
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
    # It may have closed the pipe; then it has not come to its end.
    with contextlib.suppress(OSError):
        os.write(report, json.dumps(said).encode())
    os._exit(0)


def _described(error: BaseException) -> str:
    text = str(error).encode("utf-8", "replace").decode()
    return f"{type(error).__name__}: {text}"[:_LONGEST_ERROR] if text else type(error).__name__


def _cause(error: BaseException, work: str, visible: list[str]) -> dict[str, str]:
    """Tell what a barrier or limit refused from what the program did wrong."""
    if isinstance(error, MemoryError):
        return {"cause": "memory"}
    if not isinstance(error, OSError):
        return {}
    if error.errno in _TOO_LARGE:
        return {"cause": "disk"}
    # Where mounts hide files, those outside do not exist.
    named = error.filename if isinstance(error.filename, str) else None
    place = os.path.realpath(named) if named else None
    outside = place is not None and not any(
        place == inner or place.startswith(f"{inner}/") for inner in (work, *visible, *DEVICES)
    )
    return {"cause": "refused"} if outside or error.errno in _DENIED else {}


def _say(channel: socket.socket, message: dict[str, Any]) -> None:
    try:
        channel.send(json.dumps(message).encode())
    except OSError:
        # Nobody listens any more: whoever ordered the run has ended, and this process is about to.
        os.kill(os.getpid(), signal.SIGKILL)

"""Watch a contained program from outside: what it writes, what it is refused, how it ended. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import selectors
import socket
import struct
import subprocess
from typing import Any

from gendistill_evals.sandbox.system_calls import meaning, this_machine

_RECEIVE, _REPLY = 0xC050_2100, 0xC018_2101
# struct seccomp_notif: id, pid, flags, then seccomp_data, whose first field is the number of the call.
_NOTICE, _NOTICE_BYTES = "<QIIi", 80
_MOST_REFUSED = 32
_LONGEST_REPORT = 64 << 10
_CHUNK = 1 << 16
_DRAIN_S = 5.0


class Watch:
    """The near end of everything that connects a run with whoever ordered it.

    Attributes:
        end: The guard's message on how the program ended: code, cpu_s and peak_bytes; None until there is one.
        broken: The step that failed before the program started, or None.
        refused: What the kernel refused the program, each once, with the number of times.
        cut: Whether it wrote more than is kept.

    Args:
        process: The first process of the run.
        control: Socket to it.
        report: Pipe from the program.
        keep: Bytes that are kept of each output.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], control: socket.socket, report: int, *, keep: int
    ) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.end: dict[str, Any] | None = None
        self.broken: str | None = None
        self.refused: dict[str, int] = {}
        self.cut = False
        self._process = process
        self._control = control
        self._keep = {1: keep, 2: keep, report: _LONGEST_REPORT}
        self._kept = {1: bytearray(), 2: bytearray(), report: bytearray()}
        self._report = report
        self._listener: int | None = None
        self._silent = False
        self._selector = selectors.DefaultSelector()
        for number, stream in ((1, process.stdout.fileno()), (2, process.stderr.fileno()), (report, report)):
            os.set_blocking(stream, False)
            self._selector.register(stream, selectors.EVENT_READ, number)
        self._selector.register(control, selectors.EVENT_READ, control)

    @property
    def ended(self) -> bool:
        """Whether the program has ended, or will never start."""
        return self.end is not None or self.broken is not None or self._silent

    def order(self, content: bytes) -> None:
        """Hand the order over."""
        assert self._process.stdin is not None
        # It may have ended before it read; the control socket says so too.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(content)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def look(self, timeout_s: float) -> None:
        """Take in what has come, waiting for it for a while."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is self._control:
                self._hear()
            elif key.data is self:
                self._refuse()
            else:
                self._read(key.fd, key.data)

    def drain(self) -> None:
        """Take in what was written before everything was killed, and let go of all ends."""
        try:
            if not self._silent:
                self._selector.unregister(self._control)
            if self._listener is not None:
                self._selector.unregister(self._listener)
                os.close(self._listener)
            while self._selector.get_map():
                ready = self._selector.select(_DRAIN_S)
                for key, _ in ready:
                    self._read(key.fd, key.data)
                if not ready:
                    break
        finally:
            self._selector.close()
            os.close(self._report)

    def text(self, number: int) -> str:
        """Return what is kept of output 1 or 2."""
        return self._kept[number].decode("utf-8", "replace")

    def said(self) -> dict[str, Any]:
        """Return what came through the report; a program could have written anything there."""
        try:
            content = json.loads(self._kept[self._report])
        except (ValueError, RecursionError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: value for key, value in content.items() if isinstance(value, str)}

    def _hear(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self._control, _CHUNK, 1, socket.MSG_CMSG_CLOEXEC)
        if not message:
            self._selector.unregister(self._control)
            self._silent = True
            return
        content = json.loads(message)
        if "listener" in content:
            self._listener = descriptors[0]
            self._selector.register(self._listener, selectors.EVENT_READ, self)
        elif "broken" in content:
            self.broken = content["broken"]
        else:
            self.end = content

    def _refuse(self) -> None:
        """Answer a call that the filter handed over: it fails, and is remembered."""
        assert self._listener is not None
        buffer = bytearray(_NOTICE_BYTES)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, buffer, True)
            identity, _, _, number = struct.unpack_from(_NOTICE, buffer)
            machine = this_machine()
            assert machine is not None
            what = meaning(number, machine)
            if what in self.refused or len(self.refused) < _MOST_REFUSED:
                self.refused[what] = self.refused.get(what, 0) + 1
            fcntl.ioctl(self._listener, _REPLY, struct.pack("<QqiI", identity, 0, -errno.EPERM, 0))
        except OSError as error:
            # The process was killed while it waited for the answer.
            if error.errno not in (errno.ENOENT, errno.EINPROGRESS):
                raise

    def _read(self, stream: int, number: int) -> None:
        try:
            chunk = os.read(stream, _CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            self._selector.unregister(stream)
            return
        room = self._keep[number] - len(self._kept[number])
        self._kept[number] += chunk[:room]
        self.cut |= len(chunk) > room

"""System calls that Python has no function for, through the C library. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import struct

from gendistill_evals.sandbox.system_calls import Machine

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_CAPSET = {0: 126, 1: 91}
_CAPABILITY_VERSION = 0x20080522
_SIGKILL = 9


def system_call(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Call the kernel.

    Args:
        number: Number of the call on this machine.
        arguments: Whole numbers, texts that end in a NUL, buffers, or None for a null pointer.
    Returns: What the kernel returned.
    Raises:
        OSError: It returned an error.
    """
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = _LIBC.syscall(ctypes.c_long(number), *values)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process.

    Raises:
        OSError: The kernel refuses.
    """
    zero = ctypes.c_ulong(0)
    if _LIBC.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends."""
    prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def gain_no_privileges() -> None:
    """Give up for ever what setuid programs would add; Landlock and filters of system calls ask for it."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities(machine: Machine) -> None:
    """Give up every capability of this process, as root too.

    Raises:
        OSError: The kernel refuses.
    """
    # Only who may set capabilities can drop what others would be bounded by; nobody gains any without execve.
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break
    header = ctypes.create_string_buffer(struct.pack("<Ii", _CAPABILITY_VERSION, 0))
    system_call(_CAPSET[machine.column], header, ctypes.create_string_buffer(24))

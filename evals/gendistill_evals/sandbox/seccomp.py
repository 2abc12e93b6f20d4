"""A filter of system calls: what a program may ask of the kernel. Imports no torch.

Everything is refused that ``system_calls`` does not allow, so that calls which do not exist yet are refused too.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterable, Sequence

from gendistill_evals.sandbox.kernel import system_call
from gendistill_evals.sandbox.system_calls import X32_BIT, Machine, conditional_calls, free_calls

_SECCOMP = {0: 317, 1: 277}
_SET_MODE_FILTER = 1
_FLAG_NEW_LISTENER = 8

_KILL_PROCESS = 0x8000_0000
_ALLOW = 0x7FFF_0000
_NOTIFY = 0x7FC0_0000
_ERRNO = 0x0005_0000

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x15, 0x35, 0x45
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16

_ACCESS_MODE, _TRUNCATE = 3, 0o1000
# What isatty, len(pipe) and non-blocking files ask: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# F_DUPFD to F_SETLKW, locks of open files, F_DUPFD_CLOEXEC; not F_SETOWN, which has others signalled.
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)

Instruction = tuple[int, int, int, int]


def build_filter(machine: Machine, *, pid: int, control: int, refusal: int) -> bytes:
    """Assemble the filter as ``struct sock_filter`` instructions.

    Args:
        machine: Instruction set of the process.
        pid: The process that will run under the filter, which may signal itself alone.
        control: File descriptor that a message may be sent by; closed before the program starts.
        refusal: What the filter returns for the rest.
    Returns: The instructions, 8 bytes each.
    """
    refuse: Instruction = (_RETURN, 0, 0, refusal)
    allow: Instruction = (_RETURN, 0, 0, _ALLOW)

    def only(argument: int, values: Iterable[int], otherwise: Instruction = refuse) -> list[Instruction]:
        block = [_argument(argument)]
        for value in values:
            block += [(_IF_EQUAL, 0, 1, value), allow]
        return [*block, otherwise]

    def opening(argument: int) -> list[Instruction]:
        # Landlock before 6.2 lets a file be emptied that is opened for reading, or in the mode that is neither.
        return [
            _argument(argument),
            (_AND, 0, 0, _ACCESS_MODE),
            (_IF_EQUAL, 0, 1, _ACCESS_MODE),
            refuse,
            (_IF_EQUAL, 1, 0, 0),
            allow,
            _argument(argument),
            (_IF_ANY_BIT, 0, 1, _TRUNCATE),
            refuse,
            allow,
        ]

    reading_limits = [
        *(_argument(2), (_IF_EQUAL, 1, 0, 0), refuse),
        *((_LOAD, 0, 0, _FIRST_ARGUMENT + 2 * 8 + 4), (_IF_EQUAL, 1, 0, 0), refuse),
        *only(0, (0, pid)),
    ]
    blocks = {
        "open": opening(1),
        "openat": opening(2),
        "ioctl": only(1, _IOCTLS, (_RETURN, 0, 0, _ERRNO | errno.ENOTTY)),
        "fcntl": only(1, _FCNTLS, (_RETURN, 0, 0, _ERRNO | errno.EINVAL)),
        "kill": only(0, [pid]),
        "tgkill": only(0, [pid]),
        "sendmsg": only(0, [control]),
        "prlimit64": reading_limits,
    }
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_IF_EQUAL, 1, 0, machine.audit_arch),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, 0, 1, X32_BIT),
        refuse,
    ]
    for number in free_calls(machine):
        program += [(_IF_EQUAL, 0, 1, number), allow]
    for name, number in conditional_calls(machine).items():
        program += [(_IF_EQUAL, 0, len(blocks[name]), number), *blocks[name]]
    return _assembled([*program, refuse])


def install_filter(machine: Machine, *, pid: int, control: int, listen: bool) -> int | None:
    """Put this thread under the filter, for ever.

    Args:
        machine: Instruction set of the process.
        pid, control: As for ``build_filter``.
        listen: Whether refused calls are handed to whoever holds the listener; without it they fail with EPERM.
    Returns: The listener's file descriptor, or None without one.
    Raises:
        OSError: The kernel refuses: it has no such filters, or ``gain_no_privileges`` was not called, or (EBUSY) a
            filter above has a listener already.
    """
    refusal = _NOTIFY if listen else _ERRNO | errno.EPERM
    code = build_filter(machine, pid=pid, control=control, refusal=refusal)
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, padded to a pointer, and where they are.
    program = struct.pack("<H6xQ", len(code) // 8, ctypes.addressof(instructions))
    flags = _FLAG_NEW_LISTENER if listen else 0
    buffer = ctypes.create_string_buffer(program, len(program))
    result = system_call(_SECCOMP[machine.column], _SET_MODE_FILTER, flags, buffer)
    return result if listen else None


def _argument(index: int) -> Instruction:
    """Load the lower half of an argument: all that the kernel reads of numbers of 32 bits."""
    return (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * index)


def _assembled(program: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)

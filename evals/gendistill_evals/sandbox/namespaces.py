"""Namespaces: a process that sees its own processes, no network and a few files. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gendistill_evals.sandbox.kernel import system_call
from gendistill_evals.sandbox.system_calls import Machine

_UNSHARE, _MOUNT, _UMOUNT, _PIVOT_ROOT = (272, 97), (165, 40), (166, 39), (155, 41)
_NEW_MOUNTS, _NEW_CGROUP, _NEW_NAMES, _NEW_IPC = 0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000
_NEW_USERS, _NEW_PIDS, _NEW_NETWORK = 0x1000_0000, 0x2000_0000, 0x4000_0000
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _REMOUNT, _BIND = 1, 2, 4, 32, 4096
_RECURSIVE, _PRIVATE = 1 << 14, 1 << 18
_DETACH = 2
# Flags of statvfs that a remount in a namespace of users must repeat; they have the same numbers there, but for one.
_KEPT_FLAGS = 1 | 2 | 4 | 8 | 1024 | 2048
_RELATIVE_TIMES_VFS, _RELATIVE_TIMES = 4096, 1 << 21
_NOBODY = 65534


def enter(machine: Machine) -> None:
    """Give this process, and from its next child on its children, namespaces of their own.

    Users, mounts, processes, network, messages, names and control groups. The processes' one begins with the next
    child, whose end kills all others in it.

    Raises:
        OSError: The kernel refuses.
    """
    uid, gid = os.geteuid(), os.getegid()
    apart = _NEW_MOUNTS | _NEW_CGROUP | _NEW_NAMES | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK
    system_call(_UNSHARE[machine.column], _NEW_USERS | apart)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_NOBODY} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{_NOBODY} {gid} 1")


def keep_only(
    machine: Machine, root: str, *, readable: Sequence[str], writable: str, devices: Sequence[str]
) -> None:
    """Replace the root of this process by one that holds a few files and folders, each at its usual path.

    Args:
        machine: Instruction set of the process.
        root: Empty folder to build the new root on.
        readable: Files and folders to show, not to be written; those that do not exist are left out.
        writable: Folder to show as it is.
        devices: Files to show as they are.
    Raises:
        OSError: The kernel refuses.
    """
    mount, top = _MOUNT[machine.column], root.encode()
    system_call(mount, None, b"/", None, _RECURSIVE | _PRIVATE, None)
    system_call(mount, b"tmpfs", top, b"tmpfs", _NO_SETUID | _NO_DEVICES, b"size=1m,nr_inodes=4096,mode=755")
    for path in _outermost(readable):
        _bind(machine, root, path)
    # A bind brings the mounts below it; each of them has its own flags.
    for place in _mounts_below(root):
        flags = _flags_of(place) | _READ_ONLY | _NO_SETUID | _NO_DEVICES | _REMOUNT | _BIND
        system_call(mount, None, place.encode(), None, flags, None)
    for path in (*devices, writable):
        _bind(machine, root, path)
    os.chdir(root)
    system_call(_PIVOT_ROOT[machine.column], b".", b".")
    system_call(_UMOUNT[machine.column], b".", _DETACH)
    system_call(mount, None, b"/", None, _REMOUNT | _READ_ONLY | _NO_SETUID | _NO_DEVICES, None)
    os.chdir(writable)


def _bind(machine: Machine, root: str, path: str) -> None:
    source = Path(path)
    if not source.exists():
        return
    target = Path(f"{root}{path}")
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    arguments = (str(source.resolve()).encode(), str(target).encode(), None, _BIND | _RECURSIVE, None)
    system_call(_MOUNT[machine.column], *arguments)


def _outermost(paths: Sequence[str]) -> list[str]:
    """Leave out what lies below another path, which shows it already."""
    kept: list[str] = []
    for path in sorted(set(paths), key=len):
        if not any(path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    return kept


def _mounts_below(root: str) -> list[str]:
    places = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # The kernel writes spaces, tabs, line feeds and backslashes as octal digits.
        place = line.split(" ")[4].encode().decode("unicode_escape").encode("latin-1").decode()
        if place.startswith(f"{root}/"):
            places.append(place)
    return places


def _flags_of(place: str) -> int:
    flags = os.statvfs(place).f_flag
    return flags & _KEPT_FLAGS | (_RELATIVE_TIMES if flags & _RELATIVE_TIMES_VFS else 0)

"""Landlock: which files a process may read and write. Imports no torch.

Landlock says nothing of ``stat``, of modes, owners and times, and before Linux 6.2 of lengths; the filter of system
calls refuses what changes these.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from gendistill_evals.sandbox.kernel import system_call

# The same numbers on every machine.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_FLAG_VERSION = 1
_RULE_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_MAKE_DIR, _MAKE_FILE, _MAKE_SYMLINK, _REFER, _TRUNCATE = 1 << 7, 1 << 8, 1 << 12, 1 << 13, 1 << 14
_READ = _READ_FILE | _READ_DIR
_CHANGE = (
    *(_WRITE_FILE, _REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_FILE, _MAKE_SYMLINK, _REFER, _TRUNCATE),
)
# Rights that exist, by version of the interface: 13 at first, then links between folders, lengths, device controls.
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK = 0b11
_SCOPES = 0b11


def version() -> int:
    """Return the version of the kernel's Landlock interface; 0 if it has none."""
    try:
        return system_call(_CREATE_RULESET, None, 0, _FLAG_VERSION)
    except OSError:
        return 0


def restrict(*, readable: Sequence[str], writable: str, devices: Sequence[str]) -> None:
    """Take from this process every file but some, and from version 4 and 6 on TCP and signals to others.

    Args:
        readable: Files and folders that it may read; those that do not exist are left out.
        writable: Folder that it may read and change.
        devices: Files that it may read and write.
    Raises:
        OSError: The kernel has no Landlock, ``gain_no_privileges`` was not called, or a path cannot be opened.
    """
    known = version()
    rights = (1 << _NUM_RIGHTS.get(known, 16)) - 1
    attributes = struct.pack("<Q", rights)
    if known >= 4:
        attributes += struct.pack("<Q", _NETWORK)
    if known >= 6:
        attributes += struct.pack("<Q", _SCOPES)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = system_call(_CREATE_RULESET, buffer, len(attributes), 0)
    try:
        for path in readable:
            if Path(path).exists():
                _allow(ruleset, path, _READ if Path(path).is_dir() else _READ_FILE)
        for path in devices:
            if Path(path).exists():
                _allow(ruleset, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & rights)
        _allow(ruleset, writable, (_READ | sum(_CHANGE)) & rights)
        system_call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("<Qi", rights, parent)
        system_call(
            *(_ADD_RULE, ruleset, _RULE_PATH_BENEATH),
            *(ctypes.create_string_buffer(rule, len(rule)), 0),
        )
    finally:
        os.close(parent)

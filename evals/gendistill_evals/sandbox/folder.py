"""The folder of a program that may have filled it with anything: its size, and its removal. Imports no torch."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def size_of(folder: Path, *, most: int) -> tuple[int, int]:
    """Count bytes and entries below a folder, without following links.

    Args:
        folder: The folder.
        most: Entries after which counting stops, one more than this.
    Returns: Bytes and entries; more than ``most`` where a folder cannot be looked into.
    """
    size = count = 0
    pending = [str(folder)]
    while pending:
        try:
            entries = os.scandir(pending.pop())
        except FileNotFoundError:
            continue
        except OSError:
            # Its path is too long, or it is hidden from its owner.
            return size, most + 1
        with entries:
            for entry in entries:
                count += 1
                if count > most:
                    return size, count
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                except OSError:
                    return size, most + 1
                # Blocks, not length: a file of holes takes no room.
                size += found.st_blocks * 512
                if stat.S_ISDIR(found.st_mode):
                    pending.append(entry.path)
    return size, count


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, however deep and whatever its modes are; links are not followed.

    Raises:
        OSError: Something cannot be removed.
    """
    folder.chmod(0o700)
    number = 0
    # A name that nothing in the folder can have.
    name = secrets.token_hex(16)
    # Folders inside folders are moved to the top first, so that no path grows long.
    pending = [folder]
    while pending:
        current = pending.pop()
        with os.scandir(current) as found:
            entries = list(found)
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                Path(entry.path).unlink()
                continue
            Path(entry.path).chmod(0o700)
            number += 1
            moved = folder / f"{name}-{number}"
            Path(entry.path).rename(moved)
            pending.append(moved)
        if current != folder:
            current.rmdir()
    folder.rmdir()

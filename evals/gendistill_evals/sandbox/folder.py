"""The folder of a program that may have filled it with anything: its size, what it hides, and its removal.

Imports no torch.
"""

from __future__ import annotations

import contextlib
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


def size_of_removed(first: int, *, mapped: int) -> int:
    """Count bytes of files that a process and those below it hold open or mapped, and that no folder shows any more.

    Args:
        first: The process.
        mapped: Counted for each file that is mapped alone, whose size nobody says.
    Returns: Bytes; what cannot be looked into counts for none.
    """
    size, pending = 0, [str(first)]
    while pending:
        process = pending.pop()
        seen = set()
        # It may end meanwhile, or hide itself from its owner.
        with contextlib.suppress(OSError), os.scandir(f"/proc/{process}/fd") as entries:
            for entry in entries:
                found = entry.stat()
                if stat.S_ISREG(found.st_mode) and not found.st_nlink and found.st_ino not in seen:
                    seen.add(found.st_ino)
                    size += found.st_blocks * 512
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/maps").read_bytes().splitlines():
                _, _, _, device, inode, *path = line.split(None, 5)
                # Memory that processes share is a removed file of the device 00:01; addresses are limited.
                if device != b"00:01" and path and path[0].endswith(b" (deleted)") and int(inode) not in seen:
                    seen.add(int(inode))
                    size += mapped
        with contextlib.suppress(OSError):
            pending += Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return size


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

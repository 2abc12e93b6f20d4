"""Keep results under keys, one line each, in files that several processes may add to. Imports no torch.

A line is ``{"key": ..., "crc32": ..., "result": ...}``; the checksum covers key and result. A process appends to a file
of its own, so that nobody waits for a lock, which not every file system has, and a killed process can leave at most its
last line unfinished. Whoever opens the store later reads the files of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from gendistill_evals.errors import EvalError

KEY_BYTES = 16
# What the process itself cannot lose, the machine can: at most the results of so many seconds.
_SYNC_SECONDS = 5.0
_HEAD = len('{"key": "')
_RESULT = _HEAD + 2 * KEY_BYTES + len('", "crc32": "01234567", "result": ')
# A place is one number, the file's times this plus the offset in it: far smaller than a pair of them.
_FILE = 2**48


class ResultStore:
    """Results of one kind, found by the key of all that decides them.

    Args:
        folder: Folder of the files; made when the first result is added. Other files in it are left alone.
        name: Beginning of the files' names: the kind of the results and whose they are.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self._paths: list[Path] = []
        # Keys and places only: results stay on disk until they are asked for.
        self._places: dict[bytes, int] = {}
        self._file: BinaryIO | None = None
        self._synced = 0.0
        self._look()

    def read(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, Any]]:
        """Yield the results that there are, in the order of the files; what is missing or damaged is left out.

        Args:
            keys: Keys of ``KEY_BYTES`` bytes, each once.
        """
        places = sorted(self._places[key] for key in keys if key in self._places)
        for number, group in groupby(places, lambda place: place // _FILE):
            with contextlib.suppress(OSError), self._paths[number].open("rb") as file:
                for place in group:
                    file.seek(place % _FILE)
                    line = file.readline()
                    # It was intact when the store was opened.
                    if (key := _intact_key(line)) is None:
                        continue
                    try:
                        result = json.loads(line[_RESULT:-2])
                    except (ValueError, RecursionError):
                        continue
                    yield key, result

    def add(self, key: bytes, result: Any) -> None:
        """Keep a result; it is with the operating system when this returns, on the disk some seconds later.

        Args:
            key: ``KEY_BYTES`` bytes.
            result: Plain data.
        Raises:
            EvalError: The file cannot be written.
            ValueError: The result holds a number that is not finite.
        """
        line = _line(key.hex().encode(), json.dumps(result, allow_nan=False).encode())
        try:
            file = self._file or self._create()
            place = (len(self._paths) - 1) * _FILE + file.tell()
            file.write(line)
            file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync(file)
        except OSError as error:
            # Nothing is written behind a line that may be unfinished.
            broken, self._file = self._file, None
            if broken is not None:
                with contextlib.suppress(OSError):
                    broken.close()
            raise _not_written(self._paths[-1] if broken else self.folder, error) from error
        self._places[key] = place

    def close(self) -> None:
        """Bring what was added to the disk; what is added afterwards begins another file.

        Raises:
            EvalError: The file cannot be written.
        """
        file, self._file = self._file, None
        if file is not None:
            try:
                with file:
                    self._sync(file)
            except OSError as error:
                raise _not_written(self._paths[-1], error) from error

    def _look(self) -> None:
        """Find all results, and say what is damaged and not there a second time."""
        damaged: list[tuple[Path, list[tuple[int, bytes]]]] = []
        # By time: what was made anew stands behind what it replaces.
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            try:
                # A pipe would wait for ever.
                if path.is_file():
                    damaged.append((path, self._scan(path)))
            except OSError as error:
                _say(f"{path} cannot be read ({error.strerror or error}): what it holds is made anew")
        for path, lines in damaged:
            lost = [number for number, key in lines if key not in self._places]
            if lost:
                which = (
                    f"line {lost[0]}" if len(lost) == 1 else f"{len(lost):,} lines, first in line {lost[0]}"
                )
                _say(f"{path} is damaged in {which}: what is lost is made anew")

    def _scan(self, path: Path) -> list[tuple[int, bytes]]:
        """Note the places of a file's results; returns numbers of damaged lines with what may be their keys."""
        damaged = []
        with path.open("rb") as file:
            place = len(self._paths) * _FILE
            self._paths.append(path)
            for number, line in enumerate(file, start=1):
                key = _intact_key(line)
                if key is None:
                    damaged.append((number, _key(line)))
                else:
                    self._places[key] = place
                place += len(line)
        return damaged

    def _create(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = self.folder / f"{self.name}-{time.time_ns()}-{os.getpid()}.jsonl"
            # Another machine may have the same time and process number.
            with contextlib.suppress(FileExistsError):
                self._file = path.open("xb")
                break
        self._paths.append(path)
        self._synced = time.monotonic()
        return self._file

    def _sync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        self._synced = time.monotonic()


def _line(key: bytes, result: bytes) -> bytes:
    return b'{"key": "%b", "crc32": "%08x", "result": %b}\n' % (
        key,
        zlib.crc32(result, zlib.crc32(key)),
        result,
    )


def _intact_key(line: bytes) -> bytes | None:
    """Return the key of a line; None if it is not what was written."""
    if line != _line(line[_HEAD : _HEAD + 2 * KEY_BYTES], line[_RESULT:-2]):
        return None
    return _key(line)


def _key(line: bytes) -> bytes:
    """Read the key of a line, which is empty if there is none."""
    try:
        return bytes.fromhex(line[_HEAD : _HEAD + 2 * KEY_BYTES].decode("ascii"))
    except ValueError:
        return b""


def _not_written(path: Path, error: OSError) -> EvalError:
    return EvalError(
        f"cannot write the file: {error.strerror or error}",
        where=str(path),
        hint="free space or choose another folder, then run the same command: what was finished is kept",
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

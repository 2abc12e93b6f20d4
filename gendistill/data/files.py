"""Local files of rows: JSON Lines, one big JSON array, plain text. Read by row number, never held in memory."""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock

from gendistill.errors import DataError
from gendistill.paths import cache_dir, clear_remains, new_folder, read_json, write_json, writing

Row = dict[str, Any]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text")
ROW_SUFFIXES = JSON_SUFFIXES + TEXT_SUFFIXES

_CHUNK_BYTES = 1 << 20
# the longest token that a cut can split without being a string: "-Infinity", or half an escape
_CUT_MARGIN = 16

_log = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time this process sees it."""
    _log.warning(message)


def row_suffix(path: Path) -> str:
    """Name the kind of a file by its suffix, looking through ``.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@dataclass(frozen=True, slots=True)
class LineFile:
    """Rows of one file with a row per line, found by the byte offsets of the lines.

    Attributes:
        path: Uncompressed file.
        offsets: ``[rows + 1]`` int64, where each row starts, then the end of the file.
        source: The file that the user named, for errors.
        where: Recipe path, for errors.
        is_text: Whether a line is ``{"text": line}`` rather than a JSON object.
    """

    path: Path
    offsets: np.ndarray
    source: Path
    where: str
    is_text: bool

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Row:
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            line = file.read(int(self.offsets[index + 1] - self.offsets[index]))
        if self.is_text:
            # blank lines that follow belong to no row
            return {"text": line.split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8", errors="replace")}
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"row {index + 1:,} of {self.source} is no JSON: {error}",
                where=self.where,
                hint="a .json file holds one array of objects, or one object per line",
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"row {index + 1:,} of {self.source} is a {type(row).__name__}, expected an object of columns",
                where=self.where,
            )
        return row


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Several files read as one, in order."""

    parts: tuple[LineFile, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, parts: list[LineFile]) -> JoinedRows:
        """Number the rows of all parts consecutively."""
        return cls(tuple(parts), tuple(int(start) for start in np.cumsum([0, *map(len, parts)])))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Row:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part][index - self.starts[part]]


def open_line_file(path: Path, *, where: str) -> LineFile:
    """Open a ``.json``, ``.jsonl`` or ``.txt`` file, plain or gzipped, for reading by row number.

    The first call writes an index of the rows to the cache; a JSON array or a gzipped file is also converted
    to one row per line there. Later calls read the index alone.

    Args:
        path: The file. A JSON array may be larger than memory, and may be cut off at its end.
        where: Recipe path, for errors.
    Raises:
        DataError: The file is broken before its end.
    """
    stat = path.stat()
    key = hashlib.sha256(f"1 {path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_dir() / "rows" / f"{path.stem[:40]}-{key}"
    if not (folder / "info.json").is_file():
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        # the ranks of one run open the same file at the same moment
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "info.json").is_file():
                clear_remains(folder.parent)
                with new_folder(folder) as partial:
                    _index(path, partial, where=where)
    info = read_json(folder / "info.json")
    if info["cut"]:
        warn_once(
            f"{where}: {path.name} is cut off at its end; its {info['rows']:,} whole records are used, "
            "the broken last one is left out"
        )
    return LineFile(
        path=folder / "rows.jsonl" if info["converted"] else path,
        offsets=np.load(folder / "offsets.npy"),
        source=path,
        where=where,
        is_text=row_suffix(path) in TEXT_SUFFIXES,
    )


def _index(path: Path, folder: Path, *, where: str) -> None:
    """Write the row offsets of a file, and its rows one per line if they are not so yet."""
    with _open_bytes(path) as file:
        head = file.read(4096).lstrip(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        is_array = row_suffix(path) in JSON_SUFFIXES and head.startswith(b"[")
        converted = is_array or path.suffix.lower() == ".gz"
        cut = False
        if is_array:
            with (folder / "rows.jsonl").open("wb") as out:
                offsets, cut = _write_array(file, out, path=path, where=where)
        elif converted:
            with (folder / "rows.jsonl").open("wb") as out:
                offsets = _line_offsets(file, out.write)
        else:
            offsets = _line_offsets(file)
    np.save(folder / "offsets.npy", np.frombuffer(offsets, dtype=np.int64))
    write_json(
        folder / "info.json",
        {"source": str(path.resolve()), "rows": len(offsets) - 1, "cut": cut, "converted": converted},
    )


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _line_offsets(file: IO[bytes], copy: Callable[[bytes], object] | None = None) -> array:
    """List where the rows of a line file start and end. Blank lines belong to the row before them."""
    offsets, position = array("q"), 0
    for line in file:
        if copy:
            copy(line)
        if line.strip():
            offsets.append(position)
        position += len(line)
    offsets.append(position)
    return offsets


def _write_array(file: IO[bytes], out: IO[bytes], *, path: Path, where: str) -> tuple[array, bool]:
    """Write the records of a JSON array one per line; say whether the array was cut off."""
    offsets = array("q", [0])
    records = JsonArrayRecords(file)
    try:
        for record in records:
            # inside a JSON string a line break is escaped, so every raw one is white space between tokens
            line = record.replace("\r", " ").replace("\n", " ").encode() + b"\n"
            out.write(line)
            offsets.append(offsets[-1] + len(line))
    except ValueError as error:
        raise DataError(
            f"record {len(offsets):,} of {path} is broken: {error}",
            where=where,
            hint="repair the file, or cut it after the last good record",
        ) from error
    out.flush()
    os.fsync(out.fileno())
    return offsets, records.cut


class JsonArrayRecords:
    """Iterate over the source text of an array's elements, one at a time, in constant memory.

    An array that ends in the middle of an element yields the whole elements and sets ``cut``. Anything else that
    is no JSON raises ``ValueError``.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.cut = False
        self._file = file
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode_json = json.JSONDecoder().raw_decode
        self._buffer = ""
        self._at = 0
        self._ended = False

    def __iter__(self) -> Iterator[str]:
        if self._next_character() != "[":
            raise ValueError("the file does not begin with [")
        self._at += 1
        first = True
        while True:
            character = self._next_character()
            if character == "]":
                return
            if not first and character == ",":
                self._at += 1
                character = self._next_character()
            elif not first and character:
                raise ValueError(f'expected "," or "]" between records, found "{character}"')
            if not character:
                self.cut = True
                return
            record = self._record()
            if record is None:
                self.cut = True
                return
            yield record
            first = False

    def _more(self, num_bytes: int) -> bool:
        """Drop what was used and read on; tell whether there was anything to read."""
        if self._ended:
            return False
        data = self._file.read(num_bytes)
        self._ended = not data
        self._buffer = self._buffer[self._at :] + self._decode_bytes.decode(data)
        self._at = 0
        return not self._ended

    def _next_character(self) -> str:
        """Skip white space; return the next character without using it, or "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if not self._more(_CHUNK_BYTES):
                return ""

    def _record(self) -> str | None:
        """Return the text of the element that starts here, or None if the file ends inside it."""
        wanted = _CHUNK_BYTES
        while True:
            try:
                _, end = self._decode_json(self._buffer, self._at)
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _CUT_MARGIN
                if not is_open:
                    raise
                if not self._more(wanted):
                    return None
                # doubling keeps the repeated parsing of one huge record linear
                wanted *= 2
                continue
            record, self._at = self._buffer[self._at : end], end
            return record

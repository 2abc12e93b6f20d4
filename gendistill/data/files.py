"""Local files of rows: JSON Lines, one big JSON array, CSV, plain text. Read by row number, never held in memory."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import logging
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock

from gendistill.data.lines import CHUNK_BYTES, MAX_ROW_BYTES, ByteFile, split_lines, too_long
from gendistill.data.locate import JSON_SUFFIXES, TABLE_DELIMITERS, TEXT_SUFFIXES, reading, row_suffix
from gendistill.data.tables import TableRecords
from gendistill.digests import file_stamp
from gendistill.errors import DataError, OutputError
from gendistill.paths import cache_dir, clear_remains, new_folder, read_json, write_json, writing
from gendistill.text import encodable, printable_lines

Row = dict[str, Any]

_CHUNK_BYTES = CHUNK_BYTES
# the longest token that a cut can split without being a string: "-Infinity", or half an escape
_CUT_MARGIN = 16
_BLANKS = re.compile(r"[ \t\r\n]*")
_INDEX_FORMAT = 2  # raise it when the index changes, so that files are indexed anew
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_log = logging.getLogger(__name__)


class BadRow(DataError):
    """A row that cannot be read, where the rows beside it can.

    Args:
        message: Names the file and the row.
        reason: Why, in words that rows of one kind share: they are counted by it.
    """

    def __init__(
        self, message: str, *, reason: str, where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.reason = reason


class Readable(Protocol):
    """Bytes that are read in order."""

    def read(self, num_bytes: int, /) -> bytes: ...


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time this process sees it."""
    _log.warning(printable_lines(message))


@dataclass(frozen=True, slots=True)
class LineFile:
    """Rows of one file with a row per line, found by the places of the lines.

    Attributes:
        path: Uncompressed file.
        spans: ``[rows, 2]`` int64, the bytes where each row starts and ends.
        source: The file that the user named, for errors.
        where: Recipe path, for errors.
        is_text: Whether a line is ``{"text": line}`` rather than a JSON object.
        state: Size in bytes and time of change of ``path`` when it was opened.
    """

    path: Path
    spans: np.ndarray
    source: Path
    where: str
    is_text: bool
    state: tuple[int, int]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Row:
        """Read one row.

        Raises:
            BadRow: It is not an object of columns, or not text.
            DataError: The file cannot be read, or has changed since it was opened.
        """
        start, end = self.spans[index].tolist()
        with reading(self.path, where=self.where), self.path.open("rb") as file:
            if _state(os.fstat(file.fileno())) != self.state:
                raise DataError(
                    f"{self.path} has changed since it was opened",
                    where=f"{self.where}.path",
                    hint="restore the file and run the same command again, or start a new run with another name=",
                )
            file.seek(start)
            line = file.read(end - start)
        try:
            return _text_row(line) if self.is_text else _object_row(line)
        except ValueError as error:
            hint = "a .json file holds one array of objects, or one object per line"
            raise BadRow(
                f"row {index + 1:,} of {self.source} {error}",
                reason=f"a row {error}".partition(":")[0],
                where=self.where,
                hint="a text file holds one text per line, in UTF-8" if self.is_text else hint,
            ) from error


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _text_row(line: bytes) -> Row:
    if b"\0" in line:
        raise ValueError("holds NUL characters, as files that are not text do")
    try:
        return {"text": line.rstrip(b"\r\n").decode("utf-8")}
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start + 1:,}") from error


def _object_row(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError("is nested too deeply to be read") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start + 1:,}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}, expected an object of columns")
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


@dataclass(frozen=True, slots=True)
class _Info:
    """What is known of an indexed file; ``bytes`` is the size of the file that the places belong to."""

    source: str
    rows: int
    bytes: int
    cut: bool
    converted: bool


def open_line_file(path: Path, *, where: str) -> LineFile:
    """Open a file of JSON, of a table or of text, plain or gzipped, for reading by row number.

    The first call writes an index of the rows to the cache; a JSON array, a table or a gzipped file is also converted
    to one row per line there. Later calls read the index alone.

    Args:
        path: The file. It may be larger than memory, and may be cut off at its end.
        where: Recipe path, for errors.
    Raises:
        DataError: The file cannot be read, or is broken before its end.
    """
    with reading(path, where=where):
        before = file_stamp(path.stat())
    key = hashlib.sha256(os.fsencode(f"{_INDEX_FORMAT} {path.resolve()}\0{before}")).hexdigest()[:16]
    folder = cache_dir() / "rows" / f"{path.stem[:40]}-{key}"
    index = _stored_index(folder, path) or _new_index(folder, path, before, where=where)
    info, spans = index
    if info.cut:
        warn_once(
            f"{where}: {path.name} is cut off at its end; its {info.rows:,} whole records are used, "
            "the broken last one is left out"
        )
    rows = folder / "rows.jsonl" if info.converted else path
    with reading(rows, where=where):
        state = _state(rows.stat())
    return LineFile(
        path=rows,
        spans=spans,
        source=path,
        where=where,
        is_text=row_suffix(path) in TEXT_SUFFIXES,
        state=state,
    )


def _stored_index(folder: Path, path: Path) -> tuple[_Info, np.ndarray] | None:
    """Read the index of a file, or None if there is none that is whole."""
    try:
        info = _Info(**read_json(folder / "info.json", shape=dict[str, int | str | bool]))
        spans = np.load(folder / "spans.npy", allow_pickle=False)
        size = (folder / "rows.jsonl" if info.converted else path).stat().st_size
    except (OutputError, OSError, ValueError, EOFError, TypeError):
        return None
    if spans.dtype != np.int64 or spans.shape != (info.rows, 2) or size != info.bytes:
        return None
    ordered = bool((np.diff(spans.reshape(-1), prepend=0, append=size) >= 0).all())
    return (info, spans) if ordered else None


def _new_index(folder: Path, path: Path, stamp: str, *, where: str) -> tuple[_Info, np.ndarray]:
    """Index a file, unless another process just has."""
    # opened first: a file that may not be read is not the fault of the cache
    with reading(path, where=where), ByteFile(path) as file, writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # the ranks of one run open the same file at the same moment
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            index = _stored_index(folder, path)
            if index is None:
                clear_remains(folder.parent)
                with new_folder(folder) as partial:
                    _index(file, path, partial, where=where)
                index = _stored_index(folder, path)
        if index is None or file_stamp(path.stat()) != stamp:
            raise DataError(
                f"{path} changed while it was read",
                where=f"{where}.path",
                hint="wait until it is written, then run the same command again",
            )
    return index


class _Records(Protocol):
    """The rows of a file and the places of their first bytes; ``cut`` once it ended inside a row."""

    cut: bool

    def __iter__(self) -> Iterator[tuple[int, bytes]]: ...


def _index(file: ByteFile, path: Path, folder: Path, *, where: str) -> None:
    """Write the places of the rows of a file, and its rows one per line if they are not so yet."""
    spans, number = array("q"), 0
    try:
        records, converted = _records(file, path)
        with (folder / "rows.jsonl").open("wb") as out:
            for start, line in records:
                number += 1
                if converted:
                    start = out.tell()
                    out.write(line + b"\n")
                spans.extend((start, start + len(line)))
            out.flush()
            os.fsync(out.fileno())
            size = out.tell() if converted else path.stat().st_size
    except ValueError as error:
        raise DataError(
            f"record {number + 1:,} of {path} is broken: {error}",
            where=where,
            hint="repair the file or get it again, or cut it after the last good record",
        ) from error
    if not converted:
        (folder / "rows.jsonl").unlink()
    np.save(folder / "spans.npy", np.frombuffer(spans, dtype=np.int64).reshape(-1, 2))
    info = _Info(
        source=encodable(str(path.resolve())),
        rows=len(spans) // 2,
        bytes=size,
        cut=records.cut,
        converted=converted,
    )
    write_json(folder / "info.json", asdict(info))


def _records(file: ByteFile, path: Path) -> tuple[_Records, bool]:
    """Choose how a file is read, and whether its rows must be written anew."""
    first = file.read(CHUNK_BYTES)
    if first.startswith(_UTF16):
        raise ValueError(
            "the file is UTF-16, and rows must be UTF-8: convert it with iconv -f UTF-16 -t UTF-8"
        )
    first = first.removeprefix(codecs.BOM_UTF8)
    while first.isspace():
        first = file.read(CHUNK_BYTES)
    file.rewind()
    suffix, is_zipped = row_suffix(path), path.suffix.lower() == ".gz"
    if suffix in TABLE_DELIMITERS:
        return TableRecords(file, delimiter=TABLE_DELIMITERS[suffix]), True
    if suffix in JSON_SUFFIXES and first.lstrip().startswith(b"["):
        return _ArrayLines(file), True
    return _RowLines(file, is_text=suffix in TEXT_SUFFIXES), is_zipped


class _RowLines:
    """Rows that are lines already."""

    def __init__(self, file: ByteFile, *, is_text: bool) -> None:
        self.cut = False
        self._file = file
        self._is_text = is_text

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for start, line in split_lines(self._file, skip_indent=not self._is_text):
            if start == 0 and line.startswith(codecs.BOM_UTF8):
                start, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
            if line.endswith(b"\n"):
                yield start, line[:-1]
            elif not self._is_cut(line):
                yield start, line
        self.cut = self.cut or self._file.cut

    def _is_cut(self, line: bytes) -> bool:
        """Tell whether the last line, which nothing ends, is only a part of a row."""
        try:
            _text_row(line) if self._is_text else json.loads(line)
        except (ValueError, RecursionError):
            self.cut = True
        # half a text looks like a whole one
        return self.cut or (self._file.cut and self._is_text)


class _ArrayLines:
    """The records of a JSON array, one per line."""

    def __init__(self, file: ByteFile) -> None:
        self.cut = False
        self._file = file

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        records = JsonArrayRecords(self._file)
        for record in records:
            # inside a JSON string a line break is escaped, so every raw one is white space between tokens
            yield 0, record.replace("\r", " ").replace("\n", " ").encode()
        self.cut = records.cut or self._file.cut


class JsonArrayRecords:
    """The source texts of an array's elements, one at a time, in constant memory.

    An array that ends in the middle of an element yields the whole elements and sets ``cut``. Anything else that
    is not JSON raises ``ValueError``.
    """

    def __init__(self, file: Readable) -> None:
        self.cut = False
        self._file = file
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")()
        # only the end of a record is looked for: a whole number of ten thousand digits need not fit
        self._decode_json = json.JSONDecoder(parse_int=float).raw_decode
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
                self._at += 1
                if self._next_character():
                    raise ValueError('something follows the "]" that ends the array')
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
            blanks = _BLANKS.match(self._buffer, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self._buffer):
                return self._buffer[self._at]
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
                if len(self._buffer) - self._at > MAX_ROW_BYTES:
                    raise too_long() from None
                if not self._more(wanted):
                    return None
                # doubling keeps the repeated parsing of one huge record nearly linear
                wanted = min(2 * wanted, MAX_ROW_BYTES // 8)
                continue
            except RecursionError as error:
                raise ValueError("it is nested too deeply to be read") from error
            record, self._at = self._buffer[self._at : end], end
            return record

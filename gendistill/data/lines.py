"""Files as bytes and lines: plain or gzipped, in constant memory, with a bound on the length of a line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

MAX_ROW_BYTES = 256 << 20
CHUNK_BYTES = 1 << 20


class ByteFile:
    """The content of a file, unzipped if its name ends in ``.gz``.

    Attributes:
        cut: Whether the zipped stream was found to end too early; what came before is read as usual.
    """

    def __init__(self, path: Path) -> None:
        self._plain: IO[bytes] = path.open("rb")
        self._file = self._plain
        # even of nothing, gzip makes a few bytes
        self.cut = path.suffix.lower() == ".gz" and not path.stat().st_size
        if path.suffix.lower() == ".gz":
            self._file = gzip.GzipFile(fileobj=self._plain)  # type: ignore[assignment]

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._plain.close()

    def read(self, num_bytes: int) -> bytes:
        """Read at most so many bytes; none at the end.

        Raises:
            ValueError: The zipped stream is damaged.
        """
        if self._file is self._plain:
            return self._plain.read(num_bytes)
        pieces, left = [], num_bytes
        try:
            # piece by piece: one longer read would lose what it has when the stream breaks off
            while left and (piece := self._file.read1(left)):  # type: ignore[attr-defined]
                pieces.append(piece)
                left -= len(piece)
        except EOFError:
            self.cut = True
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"the gzip stream is damaged: {error}") from error
        return b"".join(pieces)

    def rewind(self) -> None:
        """Start at the first byte again."""
        self._file.seek(0)


def split_lines(
    file: ByteFile, *, skip_blank: bool = True, skip_indent: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Iterate over the lines of a file with the places of their first bytes.

    A line ends after ``\\n``, which is part of it.

    Args:
        file: At its first byte.
        skip_blank: Leave out lines of white space, and whole chunks of it at the start of a line.
        skip_indent: Leave out white space at the start of a line wherever that saves memory.
    Raises:
        ValueError: A line is longer than ``MAX_ROW_BYTES``, or the file is damaged.
    """
    start = size = 0
    pieces: list[bytes] = []
    while chunk := file.read(CHUNK_BYTES):
        if skip_blank and not pieces and chunk.isspace():
            start += len(chunk)
            continue
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            line = b"".join((*pieces, part, b"\n"))
            pieces = []
            if not (skip_blank and line.isspace()):
                yield start, line
            start += len(line)
        if skip_indent and not pieces and rest.isspace():
            start, rest = start + len(rest), b""
        pieces += [rest] if rest else []
        size = size + len(chunk) if len(pieces) > 1 else len(rest)
        if size > MAX_ROW_BYTES:
            raise too_long()
    line = b"".join(pieces)
    if line and not (skip_blank and line.isspace()):
        yield start, line


def too_long() -> ValueError:
    return ValueError(f"it is longer than {MAX_ROW_BYTES >> 20} MiB, the most that one row may have")

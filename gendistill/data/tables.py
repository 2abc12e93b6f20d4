"""Tables in text, with commas or tabs between the columns, as rows of JSON."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator

from gendistill.data.lines import MAX_ROW_BYTES, ByteFile, split_lines

_OTHER_DELIMITERS = ",;\t|"
# a cut can leave a quoted field open; one open for longer is a stray quote
_MOST_OPEN_LINES = 1000
_MOST_BLANK_LINES = 1_000_000


class TableRecords:
    """The rows of a table as JSON objects, by the names of its first row.

    Fields may be quoted, and then hold delimiters, line breaks and doubled quotes. Bytes that are not UTF-8 stay in the
    row as lone surrogates, so that this row alone can be left out.

    Attributes:
        cut: Whether the table ended inside a row.

    Args:
        file: At its first byte.
        delimiter: What stands between two columns.
    Raises:
        ValueError: No usable header, a row of another length, or quotes that do not match.
    """

    def __init__(self, file: ByteFile, *, delimiter: str) -> None:
        self.cut = False
        self._file = file
        self._delimiter = delimiter
        self._last_line = ""

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        # the limit belongs to the whole process
        limit = csv.field_size_limit(MAX_ROW_BYTES)
        try:
            yield from self._records()
        finally:
            csv.field_size_limit(limit)

    def _records(self) -> Iterator[tuple[int, bytes]]:
        reader = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)
        header: list[str] = []
        while True:
            begun = reader.line_num
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                open_lines = reader.line_num - begun
                if "unexpected end of data" in str(error) and open_lines <= _MOST_OPEN_LINES:
                    self.cut = True
                    break
                raise ValueError(f"{error} (the row begins in line {begun + 1:,})") from error
            if not fields:
                continue
            if not header:
                header = self._checked(fields)
                continue
            if len(fields) != len(header):
                if len(fields) < len(header) and not self._last_line.endswith(("\n", "\r")):
                    self.cut = True
                    break
                raise ValueError(
                    f"it has {len(fields)} fields and the header {len(header)} (line {begun + 1:,}); "
                    "a field that holds the delimiter must be quoted"
                )
            yield 0, json.dumps(dict(zip(header, fields, strict=True))).encode()
        self.cut = self.cut or self._file.cut

    def _lines(self) -> Iterator[str]:
        num_blank = 0
        for start, line in split_lines(self._file, skip_blank=False):
            num_blank = num_blank + 1 if line.isspace() else 0
            if num_blank > _MOST_BLANK_LINES:
                raise ValueError(f"more than {_MOST_BLANK_LINES:,} blank lines follow one another")
            line = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
            self._last_line = line.decode("utf-8", errors="surrogateescape")
            # a zipped stream that broke off leaves half a line
            if not (self._file.cut and not self._last_line.endswith("\n")):
                yield self._last_line

    def _checked(self, header: list[str]) -> list[str]:
        if len(header) == 1:
            others = [each for each in _OTHER_DELIMITERS if each != self._delimiter and each in header[0]]
            if others:
                raise ValueError(
                    f"the first row is one column, {header[0][:80]!r}; the columns seem to be separated by "
                    f"{others[0]!r}, and .csv means commas, .tsv tabs"
                )
        blank = [number for number, name in enumerate(header, 1) if not name.strip()]
        if blank:
            raise ValueError(f"the first row must name the columns, and its field {blank[0]} is blank")
        double = next((name for name in header if header.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"the first row must name the columns, and {double[:80]!r} stands in it twice")
        return header

"""Tell whether files are still what they were: size, times, inode and checksum of each. Imports no torch."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from gendistill.errors import OutputError
from gendistill.paths import check_shape, read_json, write_json


class FileSeal(TypedDict):
    """State and content of a file.

    Attributes:
        stat: Size, times of modification and of change, inode.
        crc32: Of its bytes.
    """

    stat: list[int]
    crc32: int


Seal = dict[str, FileSeal]


def seal(folder: Path, names: Iterable[str]) -> Seal:
    """Read files and describe them, once what was written to them is on the disk.

    Args:
        folder: Their folder.
        names: Paths inside it.
    """
    return {
        name: {"stat": _stat(folder / name), "crc32": _crc32(folder / name, flush=True)} for name in names
    }


def check(folder: Path, sealed: Mapping[str, FileSeal]) -> tuple[dict[str, str], Seal]:
    """Compare files with their seals; a file whose state is as it was is not read again.

    Returns:
        What is wrong, by name, and the seals of intact files whose state has changed: they were copied or touched.
    """
    wrong: dict[str, str] = {}
    renewed: Seal = {}
    for name, entry in sealed.items():
        path = folder / name
        if not path.is_file():
            wrong[name] = "is missing"
        elif (stat := _stat(path)) != entry["stat"]:
            if stat[0] == entry["stat"][0] and _crc32(path) == entry["crc32"]:
                renewed[name] = {"stat": stat, "crc32": entry["crc32"]}
            else:
                wrong[name] = "is damaged"
    return wrong, renewed


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its own checksum in it."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    write_json(path, {**plain, "crc32": _checksum(plain)})


def read_sealed_json(path: Path, shape: Any) -> Any:
    """Read what ``write_sealed_json`` wrote.

    Raises:
        OutputError: It cannot be read, has another shape, or was changed after it had been written.
    """
    content = read_json(path, shape=dict[str, Any])
    if content.pop("crc32", None) != _checksum(content):
        raise OutputError(
            "the file was changed after it had been written",
            where=str(path),
            hint="delete the file and repeat the step that writes it",
        )
    check_shape(content, shape, error=OutputError, where=str(path), hint="delete the file")
    return content


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _crc32(path: Path, *, flush: bool = False) -> int:
    checksum = 0
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum

"""Finished steps by what they depend on: one folder a key, with the checksum of every file. Imports no torch."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from gendistill.errors import OutputError
from gendistill.paths import read_json, write_json, writing
from gendistill.runs.steps import Step

RECORD = "step.json"
_BEGUN = ".begun.json"
# of use to an unfinished step only
_PASSING = "checkpoints"
_POLL_SECONDS = 0.5


class _File(TypedDict):
    stat: list[int]
    crc32: int


class _Source(TypedDict):
    content: NotRequired[dict[str, Any]]


class _Inputs(TypedDict):
    """What is looked at in the inputs of a step; there are others."""

    data: NotRequired[dict[str, _Source]]


class _Found(TypedDict):
    """What is looked at in what a step found; there is more."""

    result: NotRequired[dict[str, Any]]
    warnings: NotRequired[list[str]]


class _Begun(TypedDict):
    step: str
    inputs: _Inputs


class _Record(_Begun):
    found: _Found
    files: dict[str, _File]


class Store:
    """The steps under one folder, which run folders link to.

    A step's folder is filled by its work and counts once ``step.json`` is in it, with its inputs, what it found, and
    size, checksum and time of every file. A folder without it is unfinished: work goes on in it, or begins again.

    Args:
        root: The folder, ``<output>/.store``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, step: Step) -> Path:
        """Folder of a step, finished or not."""
        return self.root / step.slug

    def folders(self) -> list[Path]:
        """Folders of all steps, of whatever recipe."""
        return [path for path in self.root.glob("[!.]*") if path.is_dir()]

    def record(self, step: Step) -> dict[str, Any] | None:
        """Return what a finished step recorded under ``found``, or None if it has not finished."""
        content = self._read(step)
        return None if content is None else dict(content["found"])

    def damage(self, step: Step) -> dict[str, str]:
        """Compare the files of a finished step with their checksums: name to what is wrong with it.

        A file whose size, times and inode are as recorded is not read again.
        """
        content = self._read(step)
        if content is None:
            return {}
        folder, wrong, touched = self.folder(step), {}, False
        for name, entry in content["files"].items():
            path = folder / name
            if not path.is_file():
                wrong[name] = "is missing"
            elif (stat := _stat(path)) != entry["stat"]:
                if stat[0] == entry["stat"][0] and _crc32(path) == entry["crc32"]:
                    entry["stat"], touched = stat, True
                else:
                    wrong[name] = "is damaged"
        if touched and not wrong:
            write_json(folder / RECORD, content)
        return wrong

    @contextmanager
    def working(self, step: Step, *, say: Callable[[str], None]) -> Iterator[Path]:
        """Give a step's folder to fill, while nobody else fills it; what an interrupted attempt left is in it.

        Args:
            step: The step. Another process may finish it before this one gets the folder.
            say: Receives a line if another process works on the same step; then this one waits.
        """
        folder = self.folder(step)
        with self._locked(step, say):
            if self._read(step) is None:
                write_json(folder / _BEGUN, {"step": step.name, "inputs": step.inputs})
            yield folder

    def clear(self, step: Step) -> None:
        """Forget what is in a step's folder."""
        with writing(self.folder(step)):
            (self.folder(step) / RECORD).unlink(missing_ok=True)
            shutil.rmtree(self.folder(step), ignore_errors=True)

    def finish(self, step: Step, found: dict[str, Any]) -> None:
        """Record that a step's folder is complete, with what the step found, as plain data."""
        folder = self.folder(step)
        files = {
            name: {"stat": _stat(folder / name), "crc32": _crc32(folder / name)} for name in _files(folder)
        }
        write_json(
            folder / RECORD, {"step": step.name, "inputs": dict(step.inputs), "found": found, "files": files}
        )
        self.tidy(step)

    def tidy(self, step: Step) -> None:
        """Remove what only an unfinished step needs."""
        folder = self.folder(step)
        shutil.rmtree(folder / _PASSING, ignore_errors=True)
        (folder / _BEGUN).unlink(missing_ok=True)

    def inputs(self, folder: Path) -> dict[str, Any] | None:
        """Return the inputs that a step's folder was made for, finished or not; None if it does not say."""
        for name in (RECORD, _BEGUN):
            with contextlib.suppress(OutputError):
                return dict(read_json(folder / name, shape=_Begun)["inputs"])
        return None

    def _read(self, step: Step) -> _Record | None:
        """Return a step's record; one that cannot be read is none, and the step is made again."""
        try:
            return read_json(self.folder(step) / RECORD, shape=_Record)
        except OutputError:
            return None

    @contextmanager
    def _locked(self, step: Step, say: Callable[[str], None]) -> Iterator[None]:
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / f".{step.slug}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{step.name}: another process makes the same step; waiting for it")
            lock.acquire(poll_interval=_POLL_SECONDS)
        try:
            yield
        finally:
            lock.release()


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.parts[0] not in (RECORD, _PASSING) and not any(part.startswith(".") for part in name.parts)
    )


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum

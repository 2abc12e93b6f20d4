"""Finished steps by what they depend on: one folder a key, with the checksum of every file. Imports no torch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from gendistill.errors import OutputError
from gendistill.paths import REMAINS, clear_remains, writing
from gendistill.runs.seal import Seal, check, read_sealed_json, seal, write_sealed_json
from gendistill.runs.steps import Step

RECORD = "step.json"
# results that models gave, by model
SCORES = "scores"
_BEGUN = ".begun.json"
# of use to an unfinished step only
_PASSING = "checkpoints"
_POLL_SECONDS = 0.5
# checking a step takes a moment, making it takes long
_PATIENCE_SECONDS = 2.0


class _Begun(TypedDict):
    step: str
    inputs: dict[str, Any]


class _Record(_Begun):
    found: dict[str, Any]
    files: Seal


class Store:
    """The steps under one folder, which run folders link to.

    A step's folder is filled by its work and counts once ``step.json`` is in it, with its inputs, what it found, and
    size, checksum and time of every file. A folder without it is unfinished: work goes on in it, or begins again.
    Whoever reads a record to rely on it, or changes anything in a step's folder, holds the step.

    Args:
        root: The folder, ``<output>/.store``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # one object a lock: only the same object may take it twice
        self._locks: dict[str, FileLock] = {}

    def folder(self, step: Step) -> Path:
        """Folder of a step, finished or not."""
        return self.root / step.slug

    def folders(self) -> list[Path]:
        """Folders of all steps, of whatever recipe."""
        return sorted(path for path in self.root.glob("[!.]*") if path.is_dir() and path.name != SCORES)

    def scores(self, step: Step) -> Path:
        """Folder where a model's results are kept, which steps that score the same model share."""
        return self.root / SCORES / step.model

    @contextmanager
    def holding(self, step: Step, *, say: Callable[[str], None]) -> Iterator[Path]:
        """Keep other processes out of a step's folder; the same process may hold it twice.

        Args:
            step: The step.
            say: Receives a line if another process holds the step; then this one waits.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        lock = self._lock(step.slug)
        with writing(self.root):
            try:
                lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=_POLL_SECONDS / 10)
            except Timeout:
                say(f"{step.name}: another process works on the same step; waiting for it")
                lock.acquire(poll_interval=_POLL_SECONDS)
        try:
            yield self.folder(step)
        finally:
            lock.release()

    @contextmanager
    def holding_if_free(self, folder: Path) -> Iterator[bool]:
        """Hold the step of a folder unless another process does; says whether it is held."""
        lock = self._lock(folder.name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def forget_lock(self, folder: Path) -> None:
        """Remove the lock of a step that this process holds and has removed."""
        (self.root / f".{folder.name}.lock").unlink(missing_ok=True)

    def has_record(self, step: Step) -> bool:
        """Whether a step has finished once, whatever has become of it."""
        return (self.folder(step) / RECORD).exists()

    def record(self, step: Step) -> dict[str, Any] | None:
        """Return what a finished step recorded under ``found``, or None if it has not finished."""
        content = self._read(step)
        return None if content is None else dict(content["found"])

    def files(self, step: Step) -> Seal:
        """Seals of a finished step's files."""
        content = self._read(step)
        return {} if content is None else content["files"]

    def damage(self, step: Step) -> dict[str, str]:
        """Compare the files of a finished step with their checksums: name to what is wrong with it."""
        content = self._read(step)
        if content is None:
            return {RECORD: "is damaged"} if self.has_record(step) else {}
        wrong, renewed = check(self.folder(step), content["files"])
        if renewed and not wrong:
            content["files"].update(renewed)
            write_sealed_json(self.folder(step) / RECORD, content)
        return wrong

    def begin(self, step: Step) -> None:
        """Make a step's folder ready for work: what an unfinished attempt left stays, a damaged step goes."""
        if self.has_record(step):
            with writing(self.folder(step)):
                (self.folder(step) / RECORD).unlink()
                shutil.rmtree(self.folder(step), ignore_errors=True)
        write_sealed_json(self.folder(step) / _BEGUN, {"step": step.name, "inputs": step.inputs})

    def finish(self, step: Step, found: dict[str, Any]) -> None:
        """Record that a step's folder is complete, with what the step found, as plain data."""
        folder = self.folder(step)
        with writing(folder):
            files = seal(folder, _files(folder))
        content = {"step": step.name, "inputs": step.inputs, "found": found, "files": files}
        write_sealed_json(folder / RECORD, content)
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
                return read_sealed_json(folder / name, _Record if name == RECORD else _Begun)["inputs"]
        return None

    def clear_remains(self) -> None:
        """Remove what killed processes left half-written, except where another process works."""
        for folder in self.folders():
            # another process may remove the folder meanwhile
            with contextlib.suppress(FileNotFoundError, PermissionError):
                # a student's code and checkpoints are written inside the step's folder
                if places := {path.parent for path in folder.rglob(".*") if path.suffix in REMAINS}:
                    with self.holding_if_free(folder) as free:
                        for place in places if free else ():
                            clear_remains(place, own=True)
        for folder in (self.root, self.root / SCORES):
            clear_remains(folder, own=True)

    def _lock(self, slug: str) -> FileLock:
        return self._locks.setdefault(slug, FileLock(self.root / f".{slug}.lock"))

    def _read(self, step: Step) -> _Record | None:
        """Return a step's record; one that cannot be read is none, and the step is made again."""
        try:
            return read_sealed_json(self.folder(step) / RECORD, _Record)
        except OutputError:
            return None


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.parts[0] not in (RECORD, _PASSING) and not any(part.startswith(".") for part in name.parts)
    )

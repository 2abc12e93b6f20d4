"""Where things are: shipped assets, the cache folder, and the layout of a run folder."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendistill.errors import GendistillError, OutputError
from gendistill.text import encodable


def asset_dir(name: str) -> Path:
    """Find a folder of shipped data (``recipes``) in a wheel or in a checkout."""
    packaged = Path(__file__).parent / name
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / name


def cache_dir() -> Path:
    """Folder of converted teachers and downloaded packages: ``$GENDISTILL_CACHE`` or ``~/.cache/gendistill``.

    Raises:
        OutputError: The home folder in it is nobody's.
    """
    chosen = os.environ.get("GENDISTILL_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "gendistill"
    except RuntimeError as error:
        raise OutputError(
            f"there is no cache folder: {error}",
            where=f"GENDISTILL_CACHE={chosen}" if chosen else "HOME",
            hint="export GENDISTILL_CACHE=FOLDER",
        ) from error


_UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
    *(errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into an error that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full while writing {path}",
                where=str(path),
                hint="free space or choose another folder with output=..., then run the same command: it resumes",
            ) from error
        if error.errno in _UNWRITABLE:
            raise OutputError(
                f"cannot write {path}: {error.strerror}",
                where=str(path),
                hint="choose a folder you may write to with output=...",
            ) from error
        raise


@contextmanager
def library_writing() -> Iterator[None]:
    """Turn what safetensors and tokenizers raise when a file cannot be written into the OSError that it stands for."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        # tokenizers raises Exception itself
        if not isinstance(error, SafetensorError) and type(error) is not Exception:
            raise
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        full = any(words in str(error) for words in ("No space left", "StorageFull"))
        code = errno.ENOSPC if full else int(number[1]) if number else None
        if code is None:
            raise
        raise OSError(code, os.strerror(code)) from error


# how names of temporary files and folders end
REMAINS = (".partial", ".old")
_REMAINS = re.compile(r"\.(.+)\.([0-9]{1,19})\.(partial|old)", re.DOTALL)


def clear_remains(folder: Path, *, own: bool = False) -> None:
    """Remove what killed processes left in a folder: temporary files and folders whose process is gone.

    Only names that this module gives are touched. What was being replaced is put back where its successor is missing.
    Processes of other machines are not known: call it where one machine writes.

    Args:
        folder: Need not exist; what cannot be listed is left alone.
        own: Whether this process writes nothing there now: its number is then that of an earlier one, as is usual in
            containers.
    """
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except PermissionError:
        return
    for path in paths:
        match = _REMAINS.fullmatch(path.name)
        if match is None or (_is_running(int(match[2])) and not (own and int(match[2]) == os.getpid())):
            continue
        target = path.with_name(match[1])
        if match[3] == "old" and not target.exists():
            os.replace(path, target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == 0:
        return True  # not the number of a process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one, never half."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically. NaN and infinities are rejected: they are not JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # halves of character pairs become escapes, which JSON reads as the same halves
    write_text(path, encodable(text) + "\n")


def real_path(path: Path) -> Path:
    """Follow links as far as they lead; where they lead in a circle, whoever opens the path gets the error."""
    return Path(os.path.realpath(path))


def read_file(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        OSError: It cannot be read, or is a pipe or a device, which may have no end.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path.read_bytes()


def read_json(
    path: Path,
    *,
    shape: Any = None,
    error: type[GendistillError] = OutputError,
    hint: str = "delete the file and repeat the step that writes it",
) -> Any:
    """Read a JSON file that a person or a crash may have broken.

    Args:
        path: The file.
        shape: What it must hold, as a type that pydantic knows: ``dict[str, Any]``, ``list[int]``, a ``TypedDict``;
            None for anything.
        error: What to raise.
        hint: What to do about a broken file.
    Raises:
        error: It cannot be read, is not JSON, holds a number that is not finite, or is of another shape.
    """
    try:
        text = read_file(path)
    except OSError as problem:
        raise error(f"cannot read the file: {problem.strerror}", where=str(path), hint=hint) from problem
    return parse_json(text, shape=shape, error=error, where=str(path), hint=hint)


def parse_json(
    text: str | bytes,
    *,
    where: str,
    hint: str,
    shape: Any = None,
    error: type[GendistillError] = OutputError,
) -> Any:
    """Parse JSON; arguments and errors as for ``read_json``, ``where`` names its place."""
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        content = json.loads(decoded, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as problem:
        raise error(f"this is not JSON: {problem}", where=where, hint=hint) from problem
    return content if shape is None else check_shape(content, shape, error=error, where=where, hint=hint)


def check_shape(content: Any, shape: Any, *, error: type[GendistillError], where: str, hint: str) -> Any:
    """Return JSON content that has a shape, as for ``read_json``; nothing is converted.

    Raises:
        error: It has another one; names the first place.
    """
    # pydantic takes a tenth of a second to import
    from pydantic import ValidationError

    try:
        _adapter(shape).validate_python(content, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise error(
            f"the file holds something else than it should: {message}", where=where, hint=hint
        ) from problem
    return content


@functools.cache
def _adapter(shape: Any) -> Any:
    """Build what checks a shape; that takes longer than checking."""
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _finite(number: str) -> float:
    """Read a number as ``json`` does, but refuse NaN and infinities, which are not JSON."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary sibling and rename it to ``path`` at the end, replacing what was there."""
    with writing(path):
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, path)


@dataclass(frozen=True, slots=True)
class RunDir:
    """The files of a run folder."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, device, resolved implementations, fingerprints of finished steps."""
        return self.root / "manifest.json"

    @property
    def plan(self) -> Path:
        """The conversion plan, tensor by tensor."""
        return self.root / "convert" / "plan.json"

    @property
    def probe(self) -> Path:
        """The functional probe of the student before training."""
        return self.root / "convert" / "probe.json"

    @property
    def student_init(self) -> Path:
        """The converted, untrained student."""
        return self.root / "student-init"

    @property
    def student(self) -> Path:
        """The student after the last finished stage."""
        return self.root / "student"

    def stage(self, name: str) -> Path:
        """Folder of one stage."""
        return self.root / "stages" / name

    def eval(self, which: str) -> Path:
        """Folder of one model's scores: ``teacher`` or ``student``."""
        return self.root / "eval" / which

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.root / "report"

"""A file of answers, as JSON lines that are added as they come and taken up again after an interruption.

Imports no torch. A line says by its fingerprint what it answers: the first part stands for the model and all settings,
the second for the prompt. A file that has another's answers, or anything else, is never changed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from gendistill.errors import OutputError
from gendistill.paths import parse_json, write_text, writing
from gendistill.text import encodable

_OTHER = "give another file with --out, or remove this one"


def fingerprint(content: Mapping[str, Any], *, length: int) -> str:
    """Hash plain data to so many hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


class AnswerFile:
    """A file of answers that one process writes.

    Args:
        path: The file; made if it is not there, with its folder.
        settings: Fingerprint of the model and the settings.
        prompts: Fingerprints of the prompts, in order; equal ones have the same answer.

    Attributes:
        done: Answers that were there, by the fingerprint of their prompt; those with an error are asked for again.

    Raises:
        OutputError: The file cannot be written, holds something else, or another process writes it.
    """

    def __init__(self, path: Path, *, settings: str, prompts: Sequence[str]) -> None:
        self.path = path
        self._settings, self._prompts = settings, list(prompts)
        self._is_new = not path.exists()
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() or not (self._is_new or stat.S_ISREG(path.stat().st_mode)):
                raise OutputError(
                    f"{path} is not a regular file", where="--out", hint="give a file with --out"
                )
            self._file: BinaryIO = path.open("a+b")
        try:
            self._lock()
            self.done = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        empty = self._file.tell() == 0 and os.fstat(self._file.fileno()).st_size == 0
        if self._is_new and empty:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def add(self, prompt: str, record: Mapping[str, Any]) -> None:
        """Write the answer to a prompt behind those that are there."""
        with _writing(self.path):
            self._file.write(encodable(self._line(prompt, record) + "\n").encode())
            self._file.flush()

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write all answers, in the order of the prompts, in place of those that are there."""
        lines = [self._line(prompt, record) for prompt, record in zip(self._prompts, records, strict=True)]
        text = encodable("".join(f"{line}\n" for line in lines))
        with _writing(self.path):
            self._file.seek(0)
            if self._file.read() != text.encode():
                write_text(self.path, text)

    def _line(self, prompt: str, record: Mapping[str, Any]) -> str:
        return json.dumps(
            {**record, "fingerprint": f"{self._settings}-{prompt}"}, ensure_ascii=False, allow_nan=False
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another process writes {self.path}", where="--out", hint="wait for it, or give another file"
            ) from error
        except OSError as error:
            # some file systems of clusters know no locks
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        *lines, last = self._file.read().split(b"\n")
        torn = _is_torn(last)
        if last and not torn:
            lines.append(last)
        known, found = set(self._prompts), {}
        for number, line in enumerate(lines, start=1):
            where = f"{self.path}:{number}"
            record = parse_json(line, where=where, hint=_OTHER, error=OutputError)
            mark = record.get("fingerprint") if isinstance(record, dict) else None
            settings, dash, prompt = mark.partition("-") if isinstance(mark, str) else ("", "", "")
            if not dash:
                problem = "the line is not an answer of gendistill generate"
            elif settings != self._settings:
                problem = "the line was answered by another model, or with other settings"
            elif prompt not in known:
                problem = "the line answers a prompt that is not among those asked now"
            else:
                if record.get("error") is None:
                    found[prompt] = record
                continue
            raise OutputError(f"{problem}; nothing was changed", where=where, hint=_OTHER)
        with _writing(self.path):
            if torn:
                self._file.truncate(os.fstat(self._file.fileno()).st_size - len(last))
            elif last:
                self._file.write(b"\n")
                self._file.flush()
        return found


def _is_torn(line: bytes) -> bool:
    """Tell whether a line that nothing ends is the beginning of an answer."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b'{"')
    return False


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name ``--out`` in errors of writing."""
    try:
        with writing(path):
            yield
    except OutputError as error:
        hint = error.hint if error.where == "--out" else "free space, or give another file with --out"
        raise OutputError(error.message, where="--out", hint=hint) from error

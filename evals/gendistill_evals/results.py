"""Read and write the files of an evaluation. Imports no torch.

``results.json`` holds settings and scores, ``samples.jsonl`` every item, ``transcripts.jsonl`` the open answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gendistill_evals.errors import EvalError
from gendistill_evals.protocols import PROTOCOLS
from gendistill_evals.reading import Maybe, check_shape, parse_json, read_text

SCHEMA = 2
_NUMBER = (float, int)
_SCORE = ({"value": _NUMBER, "n": int}, type(None))
_CORRECT = ({"correct": (bool, *_NUMBER)}, type(None))
# What readers rely on; files may hold more.
_TRANSCRIPT = {
    "id": str,
    "question": str,
    "answer": str,
    "truncated": bool,
    "repeated_4gram_share": _NUMBER,
    "teacher_nll": (*_NUMBER, type(None)),
}
_AGAIN = "run the evaluation again"


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write ``results.json``.

    Args:
        folder: Folder of the evaluation; made if missing.
        results: Content, with its schema version.
    Raises:
        EvalError: The folder cannot be written.
    """
    return write_json(folder / "results.json", results)


def read_results(folder: Path) -> dict[str, Any]:
    """Read ``results.json``.

    Raises:
        EvalError: The file is missing, is not JSON, or has another schema version or shape.
    """
    path = folder / "results.json"
    content = read_json(path)
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise EvalError(
            f"the file has schema {found!r}, this version reads {SCHEMA}",
            where=str(path),
            hint="score the model again with gendistill eval",
        )
    task = {"task": str, "n": int, **_by_protocol(_SCORE)}
    return check_shape(content, {"tasks": [task]}, where=str(path), hint=_AGAIN)


def write_samples(folder: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``samples.jsonl``, a row per item."""
    return write_lines(folder / "samples.jsonl", samples)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Read ``samples.jsonl``.

    Raises:
        EvalError: The file is missing, or a line is not JSON of its shape.
    """
    return _read_lines(
        folder / "samples.jsonl", {"task": str, "id": str, "group": Maybe(str), **_by_protocol(_CORRECT)}
    )


def write_transcripts(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``transcripts.jsonl``, a row per open question."""
    return write_lines(folder / "transcripts.jsonl", rows)


def read_transcripts(folder: Path) -> list[dict[str, Any]]:
    """Read ``transcripts.jsonl``.

    Raises:
        EvalError: The file is missing, or a line is not JSON of its shape.
    """
    return _read_lines(folder / "transcripts.jsonl", _TRANSCRIPT)


def write_json(path: Path, content: Any) -> Path:
    """Write JSON under a temporary name, then rename it. NaN and infinities are rejected: they are not JSON."""
    return _write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, hint: str = _AGAIN) -> Any:
    """Read JSON.

    Args:
        path: File to read.
        hint: What to do if it is not JSON.

    Raises:
        EvalError: The file is missing, is not JSON, or holds a number that is not finite.
    """
    return parse_json(_read(path), where=str(path), hint=hint)


def _by_protocol(shape: Any) -> dict[str, Maybe]:
    """Return the shape of each protocol's entry; files of before a protocol was added lack it."""
    return {name: Maybe(shape) for name in PROTOCOLS}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines under a temporary name, then rename the file."""
    return _write(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _read_lines(path: Path, shape: Any) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line:
            continue
        where = f"{path}:{number}"
        rows.append(check_shape(parse_json(line, where=where, hint=_AGAIN), shape, where=where, hint=_AGAIN))
    return rows


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A model may emit half of a character pair; such text is kept, replaced by "?".
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        raise EvalError(
            f"cannot write the file: {error.strerror}",
            where=str(path),
            hint="free space or choose another folder, then run the same command: what was scored is kept",
        ) from error
    return path


def _read(path: Path) -> str:
    return read_text(path, what="the file", hint="run the evaluation that writes it")

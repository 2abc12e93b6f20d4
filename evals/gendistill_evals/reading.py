"""Read what other people wrote: regular files of UTF-8 text, and JSON. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gendistill_evals.errors import EvalError

_SHOWN = 80


def read_text(path: Path, *, what: str, hint: str) -> str:
    """Read a file of UTF-8 text.

    Args:
        path: The file.
        what: What it is, for errors: "the task".
        hint: What to do if it is missing or broken.
    Raises:
        EvalError: It is missing, is not a regular file (a pipe would wait for ever), or is not UTF-8.
    """
    try:
        if not path.exists():
            raise EvalError(f"{what} is missing: there is no such file", where=str(path), hint=hint)
        if not path.is_file():
            raise EvalError(f"{what} is not a regular file", where=str(path), hint=hint)
        # Not universal newlines: a carriage return inside a text belongs to it.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvalError(f"{what} is not UTF-8 text: {error}", where=str(path), hint=hint) from error
    except OSError as error:
        raise EvalError(
            f"cannot read {what}: {error.strerror or error}", where=str(path), hint=hint
        ) from error
    except ValueError as error:
        # A NUL byte in the path.
        raise EvalError(f"cannot read {what}: {error}", where=repr(str(path)), hint=hint) from error


def parse_json(text: str, *, where: str, hint: str) -> Any:
    """Parse JSON.

    Args:
        text: One JSON value.
        where: Its place, for errors.
        hint: What to do if it is broken.
    Raises:
        EvalError: It is not JSON, is nested too deeply, or holds a number that is not finite.
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"this is not JSON: {error}", where=where, hint=hint) from error


def shorten(value: Any) -> str:
    """Show a value in an error, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or lists nested thousands deep.
        return f"a {type(value).__name__}"
    # A message must be printable as UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _finite(number: str) -> float:
    """Read a number as ``json`` does, but refuse NaN and infinities, which are not JSON."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is not a finite number")
    return value

"""Read what other people wrote: regular files of UTF-8 text, and JSON. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from gendistill_evals.errors import EvalError

_SHOWN = 80
_DEEPEST = 100
_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class Maybe(NamedTuple):
    """The shape of a key that may be absent."""

    shape: Any


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
        EvalError: It is not JSON, is nested too deeply, or holds a number that is not finite or half of a
            character pair, which no tokenizer and no file takes.
    """
    try:
        content = json.loads(text, parse_constant=_finite, parse_float=_finite)
        _check_nested(content)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"this is not JSON: {error}", where=where, hint=hint) from error
    return content


def check_shape(content: Any, shape: Any, *, where: str, hint: str) -> Any:
    """Return JSON content that has a shape.

    Args:
        content: Parsed JSON.
        shape: A type or a tuple of types; a list of one shape, for a list; or a dict of shapes, for an object that
            has at least these keys, apart from those whose shape is a ``Maybe``.
        where: Its place, for errors.
        hint: What to do if it has another shape.
    Raises:
        EvalError: It has another shape; names the first place.
    """
    place = _misfit(content, shape, "")
    if place is not None:
        raise EvalError(f"the file holds something else than it should: {place}", where=where, hint=hint)
    return content


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


def is_well_formed(text: str) -> bool:
    """Whether a text holds whole characters only, not half of a character pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_nested(content: Any) -> None:
    """Look through nested content without recursion, whose limit depends on the caller."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str) and not is_well_formed(value):
                raise ValueError(f"{shorten(value)} holds half of a character pair")
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below


def _misfit(content: Any, shape: Any, place: str) -> str | None:
    """Describe the first place where content has another shape; None if it fits."""
    if isinstance(shape, dict):
        if not isinstance(content, dict):
            return f"{place or 'it'} must be an object, got {shorten(content)}"
        lacking = next(
            (key for key, inner in shape.items() if key not in content and not isinstance(inner, Maybe)), None
        )
        if lacking is not None:
            return f"{place or 'it'} lacks {lacking}"
        steps = (
            (key, content[key], inner.shape if isinstance(inner, Maybe) else inner)
            for key, inner in shape.items()
            if key in content
        )
    elif isinstance(shape, list):
        if not isinstance(content, list):
            return f"{place or 'it'} must be a list, got {shorten(content)}"
        steps = ((index, value, shape[0]) for index, value in enumerate(content))
    elif isinstance(shape, tuple):
        # None or one shape of another kind.
        return (
            None
            if any(_misfit(content, one, place) is None for one in shape)
            else _misfit(content, shape[0], place)
        )
    elif isinstance(content, shape) and not (shape in (int, float) and isinstance(content, bool)):
        return None
    else:
        return f"{place or 'it'} must be {_TYPES[shape]}, got {shorten(content)}"
    found = (_misfit(value, inner, f"{place}.{step}" if place else str(step)) for step, value, inner in steps)
    return next((each for each in found if each is not None), None)

"""Settings of a mixer, declared once: a frozen dataclass whose fields say what they may hold.

The recipe's schema (``config/mixers.py``) and the check of a saved student's ``config.json`` are both made from it.
Standard library only: it travels inside exported students.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

S = TypeVar("S")
_RULE = "rule"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a field of a settings class may hold beside its type.

    Attributes:
        about: What it is, for ``gendistill recipe schema``.
        ge, gt, le, lt: Bounds of a number.
        conversion_only: Whether it says how the mixer starts from attention; the module does not read it.
        affects: What changes with it, by the name of a ``config.base.Affects``.
    """

    about: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    conversion_only: bool = False
    affects: str = "result"


def setting(default: Any, about: str = "", **rule: Any) -> Any:
    """Declare a field of a settings class.

    Args:
        default: Its value when nothing is given.
        about: What it is.
        rule: The other attributes of :class:`Rule`.
    """
    return dataclasses.field(default=default, metadata={_RULE: Rule(about, **rule)})


def rules(settings: type) -> dict[str, Rule]:
    """Map the fields of a settings class to what they may hold."""
    return {field.name: field.metadata.get(_RULE, Rule()) for field in dataclasses.fields(settings)}


def to_plain(settings: Any) -> dict[str, Any]:
    """Return settings as plain data for a ``config.json``: tuples become lists."""
    found = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def read_settings(settings: type[S], given: Mapping[str, Any], *, where: str) -> S:
    """Make settings from plain data that may be broken by hand or by a crash.

    Args:
        settings: The class.
        given: Values by field; what is left out has its default.
        where: Place of the section, for errors.
    Raises:
        ValueError: Names the field, what it holds and what is allowed.
    """
    known, hints = rules(settings), get_type_hints(settings)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where} must be settings among {', '.join(sorted(known))}, got {_shown(name)}")
        wanted = _wanted(hints[name], known[name], value)
        if wanted is not None:
            raise ValueError(f"{where}.{name} must be {wanted}, got {_shown(value)}")
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return settings(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _wanted(annotation: Any, rule: Rule, value: Any) -> str | None:
    """Say what is allowed, unless the value is."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        problems = [_wanted(one, rule, value) for one in arguments]
        return None if None in problems else " or ".join(problem for problem in problems if problem)
    if annotation is type(None):
        return None if value is None else "null"
    if origin is Literal:
        right = isinstance(value, str) and value in arguments
        return None if right else _any_of(arguments)
    if annotation is bool:
        return None if isinstance(value, bool) else "true or false"
    if annotation is int:
        right = isinstance(value, int) and not isinstance(value, bool) and _inside(rule, value)
        return None if right else f"a whole number{_range(rule)}"
    if annotation is float:
        return None if _is_number(value) and _inside(rule, value) else f"a number{_range(rule)}"
    if origin is tuple:
        right = isinstance(value, list | tuple) and len(value) == len(arguments)
        right = right and all(_wanted(*pair) is None for pair in _zip(arguments, rule, value))
        return None if right else f"a list of {len(arguments)} numbers{_range(rule)}"
    raise TypeError(f"a setting cannot have the type {annotation}")


def _zip(arguments: tuple[Any, ...], rule: Rule, values: Any) -> list[tuple[Any, Rule, Any]]:
    return [(annotation, rule, value) for annotation, value in zip(arguments, values, strict=True)]


def _inside(rule: Rule, value: float) -> bool:
    return (
        (rule.ge is None or value >= rule.ge)
        and (rule.gt is None or value > rule.gt)
        and (rule.le is None or value <= rule.le)
        and (rule.lt is None or value < rule.lt)
    )


def _any_of(words: Sequence[Any]) -> str:
    """Write ``a, b or c``."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def _range(rule: Rule) -> str:
    """Write bounds: `` from 0 to 16``, `` from -20 to below 0``."""
    low = None if rule.ge is None else f"from {_number(rule.ge)}"
    low = f"above {_number(rule.gt)}" if rule.gt is not None else low
    high = None if rule.le is None else f"to {_number(rule.le)}"
    high = f"to below {_number(rule.lt)}" if rule.lt is not None else high
    return "".join(f" {words}" for words in (low, high) if words)


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    given = repr(value)
    return given if len(given) < 80 else f"{given[:77]}..."

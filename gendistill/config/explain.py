"""Turn what pydantic rejects into lines that a person can act on. Imports no torch."""

from __future__ import annotations

import difflib
import re
import types
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gendistill.config.base import OneSectionOf, OneWordOf, Section
from gendistill.config.document import Node, Path, dotted, shortened
from gendistill.config.mixers import MixersConfig, mixers_section
from gendistill.config.problems import Problem
from gendistill.config.schema import MixtureConfig, Recipe

_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
_NAMES = ("string_pattern_mismatch", "string_too_long")
_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section (key: value lines)",
    "model_type": "a section (key: value lines)",
    "model_attributes_type": "a section (key: value lines)",
    "enum": "one of a fixed set of words",
}


def closest(word: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean "x"?``, or nothing when no allowed word is near."""
    near = _near(word, allowed)
    return f'; did you mean "{near[0]}"?' if near else ""


def _near(word: str, allowed: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word[:100].replace("-", "_"), list(allowed), n=1, cutoff=0.6)


def _keys_at(path: Path, root: Node) -> list[str]:
    return [key for one in annotations_at(path, root) if is_section(one) for key in settings(one)]


def alternatives(annotation: Any) -> list[Any]:
    """Flatten an annotation into the plain types it allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        for mark in marks:
            if isinstance(mark, OneWordOf):
                return [Literal[tuple(mark.words)]]  # pyright: ignore[reportInvalidTypeForm]
        return alternatives(inner)
    if origin in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in alternatives(part)]
    return [mixers_section() if annotation is MixersConfig else annotation]


def alternatives_of(field: FieldInfo) -> list[Any]:
    """List the plain types that a setting allows."""
    for mark in field.metadata:
        if isinstance(mark, OneSectionOf):
            return list(mark.sections.values())
    return alternatives(field.annotation)


def is_section(annotation: Any) -> bool:
    """Whether a type is a section of the recipe, with named settings."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def settings(section: type[Section]) -> dict[str, Any]:
    """Map each setting, as it is written in YAML, to its pydantic field."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def annotations_at(path: Path, root: Node | None = None) -> list[Any]:
    """List the types allowed at a dotted path of the recipe.

    Args:
        path: Steps from the top; names of stages and sources are free.
        root: The recipe as written. It decides between sections that differ by ``kind`` or ``mix``; without
            it every possibility is listed.
    """
    candidates: list[Any] = [Recipe]
    for depth, step in enumerate(path):
        node = root.at(path[:depth]) if root else None
        candidates = [leaf for one in _matching(candidates, node) for leaf in _step(one, step)]
    return _matching(candidates, root.at(path) if root else None)


def _step(annotation: Any, step: str | int) -> list[Any]:
    if is_section(annotation):
        field = settings(annotation).get(str(step)) or annotation.model_fields.get(str(step))
        return alternatives_of(field) if field else []
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return alternatives(arguments[1])
    if origin in (tuple, list) and arguments:
        return alternatives(arguments[0])
    return []


def _matching(candidates: list[Any], node: Node | None) -> list[Any]:
    """Drop the sections that the written ``kind`` or ``mix`` rules out."""
    sections = [one for one in candidates if is_section(one)]
    if len(sections) < 2 or node is None or not isinstance(node.content, dict):
        return candidates
    if MixtureConfig in sections:
        is_mix = "mix" in node.content
        return [one for one in candidates if one not in sections or (one is MixtureConfig) == is_mix]
    kind = node.content.get("kind")
    named = [one for one in sections if kind is not None and one.model_fields["kind"].default == kind.content]
    return named or candidates


def words_at(path: Path, root: Node | None = None) -> list[str]:
    """List the fixed words allowed at a path (literals and enums)."""
    words: list[str] = []
    for annotation in annotations_at(path, root):
        if get_origin(annotation) is Literal:
            words += [word for word in get_args(annotation) if isinstance(word, str)]
        elif isinstance(annotation, type) and issubclass(annotation, Enum):
            words += [str(member.value) for member in annotation]
    return words


def explain(error: ValidationError, root: Node, *, known: Sequence[Problem] = ()) -> list[Problem]:
    """Describe every error with its line, what was given, what is allowed and the next command.

    Args:
        error: What pydantic raised.
        root: The recipe as written, after ``extends`` and overrides.
        known: Problems found earlier; errors at the same settings are consequences and are left out.
    """
    seen = {problem.path for problem in known}
    located = [(_real_path(item, root), item) for item in error.errors(include_url=False)]
    located = [(path, item) for path, item in located if path is not None]
    misspelt = {
        (*path[:-1], near)
        for path, item in located
        if item["type"] == "extra_forbidden"
        for near in _near(str(path[-1]), _keys_at(path[:-1], root))
    }
    problems: list[Problem] = []
    for path in dict.fromkeys(path for path, _ in located):
        if dotted(path) in seen:
            continue
        here = [item for other, item in located if other == path]
        inside = f"{dotted(path)}." if path else ""
        deeper = any(other != path and other[: len(path)] == path for other, _ in located) or any(
            other.startswith(inside) for other in seen if other
        )
        kept = [item for item in here if not (deeper and _is_consequence(item))]
        if kept and not (path in misspelt and all(item["type"] == "missing" for item in kept)):
            problems += _problems_at(path, kept, root)
    return problems


def _is_consequence(item: ErrorDetails) -> bool:
    """Whether an error only repeats one inside the value: the other type of a union, or items left out."""
    return item["type"] in _WANTED or item["type"] in ("too_short", "value_error")


def _real_path(item: ErrorDetails, root: Node) -> Path | None:
    """Strip pydantic's union labels from a location; None if the error belongs to a rejected alternative."""
    path: Path = ()
    location = [step for step in item["loc"] if step != "[key]"]
    for index, step in enumerate(location):
        last = index == len(location) - 1
        if root.at((*path, step)) is not None or (last and item["type"] == "missing"):
            path = (*path, step)
        elif str(step) in _section_names() and str(step) not in _names_of(annotations_at(path, root)):
            return None
    return path


def _section_names() -> set[str]:
    return {"MixtureConfig", "SourceConfig"}


def _names_of(annotations: list[Any]) -> set[str]:
    return {one.__name__ for one in annotations if is_section(one)}


def _problems_at(path: Path, items: list[ErrorDetails], root: Node) -> list[Problem]:
    kinds = {item["type"] for item in items}
    if "extra_forbidden" in kinds:
        return [_unknown_key(path, root)]
    if "missing" in kinds:
        return [_missing_key(path, root)]
    if kinds == {"value_error"}:
        messages = [line for item in items for line in str(item["ctx"]["error"]).splitlines()]  # pyright: ignore
        return [_rule(path, message, root) for message in messages]
    return [_wrong_value(path, items, root)]


def _schema_command(path: Path) -> str:
    return f"gendistill recipe schema --at {dotted(path)}" if path else "gendistill recipe schema"


def _place(path: Path, root: Node) -> str:
    """Return the place of a setting, or of the nearest section around it that was written."""
    for length in range(len(path), -1, -1):
        node = root.at(path[:length])
        if node is not None:
            return node.origin
    return root.origin


def _unknown_key(path: Path, root: Node) -> Problem:
    parent, name = path[:-1], str(path[-1])
    sections = [one for one in annotations_at(parent, root) if is_section(one)]
    shown = shortened(name)
    lines = []
    for section in sections:
        allowed = settings(section)
        lines.append(f'unknown field "{shown}"{closest(name, allowed)}') if not lines else None
        lines.append(f"{section.__name__} accepts: {', '.join(sorted(allowed))}")
    if not lines:
        lines = [f'unknown field "{shown}"']
    return Problem(_place(path, root), dotted(path), "\n".join(lines), _schema_command(parent))


def _missing_key(path: Path, root: Node) -> Problem:
    parent, name = path[:-1], str(path[-1])
    section = next((one for one in annotations_at(parent, root) if is_section(one)), None)
    field = settings(section).get(name) if section else None
    about = f": {field.description}" if field is not None and field.description else ""
    hint = f"add {name}: ..."
    # a name that is misspelt in an override or a variant makes a section of its own, which then lacks everything
    if len(parent) == 2 and (siblings := root.at(parent[:1])) and isinstance(siblings.content, dict):
        own = str(parent[-1])
        near = _near(own, [each for each in siblings.content if each != own])
        hint += f'; or did you mean "{dotted((parent[0], near[0]))}"?' if near else ""
    return Problem(_place(parent, root), dotted(path), f'"{name}" is required{about}', hint)


def _rule(path: Path, message: str, root: Node) -> Problem:
    """Place a broken rule at the setting that its message names first, if it names one."""
    first = tuple(message.split(maxsplit=1)[0].split(".")) if message else ()
    if first and first != ("",) and root.at((*path, *first)) is not None and len(first) > len(path):
        path = (*path, *first)
    return Problem(_place(path, root), dotted(path), message, _schema_command(path))


def _wrong_value(path: Path, items: list[ErrorDetails], root: Node) -> Problem:
    node = root.at(path)
    place, name = _place(path, root), dotted(path)
    given = _show(node)
    words = words_at(path, root)
    if any(item["type"].startswith("union_tag") for item in items):
        return _wrong_kind(path, node, root)
    text = node.content if node is not None else None
    for item in items:
        if item["type"] in _NAMES:
            return Problem(place, name, _not_a_name(path), "rename it")
        if item["type"] in _BOUNDS:
            message = f"{_lower(item['msg'])}, got {given}\nallowed: {bounds_at(path, root)}"
            return Problem(place, name, message, _schema_command(path))
    if words and isinstance(text, str):
        message = f"{given} is not allowed{closest(text, words)}\nallowed: {', '.join(words)}"
        return Problem(place, name, message, _schema_command(path))
    if any(item["type"] == "enum" for item in items):
        return _wrong_word(path, root)
    wanted = list(dict.fromkeys(_WANTED[item["type"]] for item in items if item["type"] in _WANTED))
    if not wanted and words:
        wanted = [f"one of {', '.join(words)}"]
    if wanted:
        message = f"needs {' or '.join(wanted)}, got {given}"
    else:
        message = f"{_lower(items[0]['msg'])}, got {given}"
    hint = _schema_command(path[:-1])
    wants_text = "text" in wanted or bool(words)
    if wants_text and node is not None and node.written is not None and not isinstance(node.content, str):
        if node.content is None:
            return Problem(place, name, message, hint)
        message += f"; YAML reads {shortened(node.written)} as {_kind_of(node.content)}"
        hint = f'quote it: "{shortened(node.written)}"'
    elif wanted == ["a list"] and isinstance(text, str):
        hint = f"write [{shortened(text)}]"
    elif isinstance(text, str) and _looks_numeric(text) and any("number" in want for want in wanted):
        hint = f"remove the quotes: {shortened(text)}"
    return Problem(place, name, message, hint)


def _not_a_name(path: Path) -> str:
    what = "the name of this recipe" if path == ("name",) else f'the name "{shortened(str(path[-1]))}"'
    return (
        f"{what} cannot name a folder: it needs letters, digits, dots, dashes and underscores, a letter or digit "
        "first, and at most 100 of them"
    )


def bounds_at(path: Path, root: Node | None = None) -> str:
    """Describe the numbers that a setting allows, as in ``1 to 1,000``; nothing if it has no bounds."""
    found: dict[str, float] = {}
    for section in annotations_at(path[:-1], root):
        if is_section(section):
            field = settings(section).get(str(path[-1]))
            _collect_bounds([*field.metadata, field.annotation] if field else [], found)
        else:
            _collect_bounds(get_args(section)[1:], found)
    return _range(found)


def bounds_of(field: Any) -> str:
    """Describe the numbers that a pydantic field allows, as ``bounds_at`` does."""
    found: dict[str, float] = {}
    _collect_bounds([*field.metadata, field.annotation], found)
    return _range(found)


def _range(found: dict[str, float]) -> str:
    low, high = found.get("ge", found.get("gt")), found.get("le", found.get("lt"))
    if low is None or high is None:
        return ""
    above, below = "above " if "gt" in found else "", "below " if "lt" in found else ""
    return f"{above}{_number(low)} to {below}{_number(high)}"


def _collect_bounds(parts: Iterable[Any], found: dict[str, float]) -> None:
    for part in parts:
        for name in ("ge", "gt", "le", "lt"):
            value = getattr(part, name, None)
            if isinstance(value, (int, float)):
                found.setdefault(name, value)
        _collect_bounds(getattr(part, "metadata", ()), found)
        if get_origin(part) in (Annotated, Union, types.UnionType, dict):
            _collect_bounds(get_args(part), found)


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e20 else f"{value:g}"


def _wrong_word(path: Path, root: Node) -> Problem:
    """Describe a key that is not a member of an enum, as in ``lr: {mixers: 1e-3}``."""
    parent, name = path[:-1], str(path[-1])
    words: list[str] = []
    for annotation in annotations_at(parent, root):
        for argument in get_args(annotation)[:1]:
            if isinstance(argument, type) and issubclass(argument, Enum):
                words += [str(member.value) for member in argument]
    message = f'"{shortened(name)}" is not allowed{closest(name, words)}\nallowed: {", ".join(words)}'
    return Problem(_place(path, root), dotted(path), message, _schema_command(parent[:-1]))


def _wrong_kind(path: Path, node: Node | None, root: Node) -> Problem:
    kinds = [
        one.model_fields["kind"].default
        for one in annotations_at(path)
        if is_section(one) and "kind" in one.model_fields
    ]
    content = node.content if node is not None else None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind is None:
        message = f'"kind" is required; allowed: {", ".join(kinds)}'
        return Problem(_place(path, root), dotted(path), message, f"add kind: {kinds[0]}")
    written = str(kind.content)
    message = (
        f'kind "{shortened(written)}" is not allowed{closest(written, kinds)}\nallowed: {", ".join(kinds)}'
    )
    return Problem(kind.origin, dotted((*path, "kind")), message, _schema_command(path))


def _show(node: Node | None) -> str:
    if node is None:
        return "nothing"
    content: Any = node.content
    if isinstance(content, Mapping):
        return "a section"
    if isinstance(content, list):
        return "a list"
    if content is None:
        return "null"
    if isinstance(content, bool):
        return node.written or str(content).lower()
    return f'"{shortened(content)}"' if isinstance(content, str) else shortened(str(node.written or content))


def _kind_of(content: Any) -> str:
    if isinstance(content, bool):
        return "true" if content else "false"
    return "a number"


def _looks_numeric(text: str) -> bool:
    return re.fullmatch(r"[-+]?[0-9][0-9_.]*(?:[eE][-+]?[0-9]+)?", text) is not None


def _lower(message: str) -> str:
    message = message.removeprefix("Input ").removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def none_words(root: Node) -> list[Problem]:
    """Find the texts "None" and "none" where null is meant, which Python writes and YAML does not."""
    found = []
    for path, node in root.scalars():
        if node.content not in ("None", "none") or node.content in (words := words_at(path, root)):
            continue
        if words and type(None) not in annotations_at(path, root):
            continue  # null is not an answer here either; the allowed words are listed instead
        message = f'"{node.content}" is the text, not the value'
        found.append(Problem(node.origin, dotted(path), message, "write null"))
    return found


def unprintable(root: Node, path: Path = ()) -> list[Problem]:
    """Find texts and keys that no terminal, file name or UTF-8 file can hold: control characters, half surrogates."""
    if isinstance(root.content, str):
        return _unprintable_text(root.content, path, root)
    items = root.content.items() if isinstance(root.content, dict) else []
    if isinstance(root.content, list):
        items = enumerate(root.content)
    problems = []
    for key, node in items:
        problems += _unprintable_text(key, path, node) if isinstance(key, str) else []
        problems += unprintable(node, (*path, key))
    return problems


def _unprintable_text(text: str, path: Path, node: Node) -> list[Problem]:
    bad = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")), None)
    if bad is None:
        return []
    message = f"{shortened(repr(text))} holds the character U+{ord(bad):04X}, which cannot be printed"
    return [Problem(node.origin, dotted(path), message, "delete it")]

"""The recipe reference: every setting of the schema as tables of Markdown. Imports no torch.

``python -m gendistill.config.reference docs/recipes.md`` fills the block between ``<!-- settings -->`` and
``<!-- /settings -->``; ``--check`` changes nothing and fails if the block is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path as FilePath
from typing import Any, Literal, get_args, get_origin

from gendistill.config.base import Affects, affects
from gendistill.config.document import Path, dotted
from gendistill.config.explain import alternatives, alternatives_of, bounds_of, is_section, settings
from gendistill.config.schema import Recipe
from gendistill.errors import OutputError
from gendistill.pages import fill_pages

AFFECTED = {
    Affects.RESULT: "the result",
    Affects.ARITHMETIC: "rounding",
    Affects.CONTENT: "the result, if it holds something else",
    Affects.NOTHING: "nothing that is finished",
}
_TYPES = {str: "text", int: "whole number", float: "number", bool: "true/false", type(None): "null"}
_ANY_NAME = "NAME"
_BLOCK = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def type_words(types: Sequence[Any], *, quote: str = "") -> str:
    """Name the types that a setting allows as people write them: ``whole number | null``.

    Args:
        types: As ``alternatives`` lists them.
        quote: Put around words that are written as they are.
    """
    return " | ".join(dict.fromkeys(word for one in types for word in _type_words(one, quote)))


def _type_words(one: Any, quote: str) -> list[str]:
    origin, arguments = get_origin(one), get_args(one)
    if is_section(one) or origin is dict:
        return ["section"]
    if origin is Literal:
        return [f"{quote}{word}{quote}" for word in arguments]
    if isinstance(one, type) and issubclass(one, Enum):
        return [f"{quote}{member.value}{quote}" for member in one]
    if origin in (tuple, list):
        parts = [leaf for part in arguments if part is not Ellipsis for leaf in alternatives(part)]
        inner = type_words(parts, quote=quote)
        return [f"list of {inner}{'s' if inner.endswith(('number', 'section')) else ''}"]
    return [_TYPES.get(one, getattr(one, "__name__", str(one)))]


def default_words(field: Any) -> str:
    """Write the default of a setting as YAML would: ``required`` without one, ``{}`` for a section."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "{}" if hasattr(value, "model_dump") else json.dumps(value, default=str)


def walk_sections(section: Any = Recipe, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """List every section of the schema once, from the top, with the path at which it is written.

    A free name in a path, such as that of a stage, is ``NAME``.
    """
    seen: set[Any] = set()

    def walk(one: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if one in seen:
            return
        seen.add(one)
        yield path, one
        for name, field in settings(one).items():
            for leaf in alternatives_of(field):
                yield from inside(leaf, (*path, name))

    def inside(leaf: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if is_section(leaf):
            yield from walk(leaf, path)
        elif get_origin(leaf) is dict:
            for each in alternatives(get_args(leaf)[1]):
                yield from inside(each, (*path, _ANY_NAME))
        elif get_origin(leaf) in (tuple, list):
            for each in alternatives(get_args(leaf)[0]):
                yield from inside(each, path)

    yield from walk(section, path)


def render_reference() -> str:
    """Write every section as a heading, what its class says, and a table of its settings."""
    parts = []
    for path, section in walk_sections():
        about = inspect.cleandoc(section.__doc__ or "").replace("``", "`")
        parts.append(f"### {_heading(path, section)}\n\n{about}\n\n{_table(section)}")
    return "\n".join(parts)


def _heading(path: Path, section: Any) -> str:
    if not path:
        return "Top level"
    if word := _kind_of(section):
        return f"`{dotted(path)}`, kind `{word}`"
    alone = sum(other == path for other, _ in walk_sections()) == 1
    return f"`{dotted(path)}`" if alone else f"`{dotted(path)}`, with `{next(iter(settings(section)))}`"


def _kind_of(section: Any) -> str | None:
    """Return the word by which a section is chosen among others; None if it is not."""
    kind = settings(section).get("kind")
    words = get_args(kind.annotation) if kind is not None else ()
    return words[0] if len(words) == 1 else None


def _table(section: Any) -> str:
    lines = ["| setting | type | default | affects | meaning |", "|---|---|---|---|---|"]
    attributes = dict(zip(settings(section), section.model_fields, strict=True))
    for name, field in settings(section).items():
        types = alternatives_of(field)
        holds_sections = any(path for path, _ in walk_sections(section) if path[:1] == (name,))
        *first, last = type_words(types, quote="`").split(" | ")
        kind = f"{', '.join(first)} or {last}" if first else last
        if bounds := bounds_of(field):
            kind += f", {bounds}"
        default = "required" if name == "kind" and _kind_of(section) else default_words(field)
        cells = [
            f"`{name}`",
            kind,
            default if default == "required" else "" if holds_sections else f"`{default}`",
            "see there" if holds_sections else AFFECTED[affects(section, attributes[name])],
            field.description or "",
        ]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def fill_document(text: str, *, where: str = "document") -> str:
    """Replace the settings block of a document.

    Args:
        text: Markdown with one block.
        where: Name of the document, for errors.
    Raises:
        OutputError: There is not exactly one block.
    """
    if len(_BLOCK.findall(text)) != 1:
        raise OutputError(
            "it does not hold exactly one settings block",
            where=where,
            hint="write <!-- settings --> and <!-- /settings -->, each on its own line",
        )
    return _BLOCK.sub(lambda _: f"\n{render_reference()}\n", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the document, or with ``--check`` fail if it is out of date."""
    parser = argparse.ArgumentParser(prog="python -m gendistill.config.reference", allow_abbrev=False)
    parser.add_argument("document", type=FilePath, help="markdown file with a settings block")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it is out of date")
    options = parser.parse_args(arguments)
    return fill_pages(
        [options.document],
        lambda page, text: fill_document(text, where=str(page)),
        check=options.check,
        program=parser.prog,
    )


if __name__ == "__main__":
    sys.exit(main())

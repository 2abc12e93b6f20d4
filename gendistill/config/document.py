"""Read YAML into a tree that remembers the line of every value. Imports no torch.

Differs from YAML 1.1 as PyYAML reads it: ``3e-4`` is a number, keys are always text, dates, sexagesimal and
octal numbers are text, duplicate keys are errors, and no tag builds anything but plain data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from gendistill.config.problems import Problem, RecipeProblems

Path = tuple[str | int, ...]
Scalar = str | int | float | bool | None

COMMAND_LINE = "command line"
CALL = "()"  # how the place of a value that was written in Python ends
# far above any recipe, far below what slows the reader down or exhausts its stack
MOST_CHARACTERS = 1_000_000
MOST_VALUES = 100_000
MOST_LEVELS = 50


@dataclass(frozen=True, slots=True)
class Node:
    """One value, a mapping or a list, with the place where it was written.

    Attributes:
        content: Scalar, ``dict`` of nodes, or ``list`` of nodes.
        place: File name, ``command line``, or a function of gendistill, as in ``gendistill.distill()``.
        line: Line of the key or value, from 1; None on the command line.
        written: Text of an unquoted scalar, before it was read as a number, boolean or null.
    """

    content: Any
    place: str
    line: int | None = None
    written: str | None = None

    @property
    def origin(self) -> str:
        """``file:line`` or ``command line``."""
        return self.place if self.line is None else f"{self.place}:{self.line}"

    def plain(self) -> Any:
        """Return the value without its places."""
        if isinstance(self.content, dict):
            return {key: node.plain() for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain() for node in self.content]
        return self.content

    def at(self, path: Path) -> Node | None:
        """Find the node at a path, or None."""
        node = self
        for step in path:
            if isinstance(node.content, dict) and step in node.content:  # noqa: SIM114 - joined, types are lost
                node = node.content[step]
            elif isinstance(node.content, list) and isinstance(step, int) and step < len(node.content):
                node = node.content[step]
            else:
                return None
        return node

    def scalars(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Walk over every value that is neither mapping nor list."""
        if isinstance(self.content, dict):
            for key, node in self.content.items():
                yield from node.scalars((*path, key))
        elif isinstance(self.content, list):
            for index, node in enumerate(self.content):
                yield from node.scalars((*path, index))
        else:
            yield path, self


def dotted(path: Path) -> str:
    """Join a path as it is written on the command line."""
    return ".".join(str(step) for step in path)


def shortened(text: str) -> str:
    """Cut a text that would fill the screen."""
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


_TAG = "tag:yaml.org,2002:"
_DIGITS = r"[0-9][0-9_]*"
_POWER = r"[eE][-+]?[0-9]+"
_INFINITY, _NAN = r"\.(?:inf|Inf|INF)", r"\.(?:nan|NaN|NAN)"
_RESOLVERS = {
    "bool": r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": rf"[-+]?(?:{_DIGITS}\.[0-9_]*(?:{_POWER})?|\.{_DIGITS}(?:{_POWER})?|{_DIGITS}{_POWER}"
    rf"|{_INFINITY})|{_NAN}",
    "merge": r"<<",
}


def _resolver_table() -> dict[str | None, list[tuple[str, re.Pattern[str]]]]:
    return {None: [(_TAG + name, re.compile(f"(?:{pattern})\\Z")) for name, pattern in _RESOLVERS.items()]}


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the resolvers above, bounded in depth and number of nodes."""

    level = 0
    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Stop at what no recipe has, before the stack ends or minutes pass."""
        if self.level >= MOST_LEVELS:
            raise self._stop(f"sections and lists are nested more than {MOST_LEVELS} deep")
        if self.num_nodes >= 2 * MOST_VALUES:  # each value may have a key
            raise self._stop(f"more than {MOST_VALUES:,} values are too much for a recipe")
        self.level += 1
        self.num_nodes += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def _stop(self, reason: str) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=reason, problem_mark=self.peek_event().start_mark)


class RecipeDumper(yaml.SafeDumper):
    """A writer that quotes every text that the reader would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists under their key."""
        super().increase_indent(flow, False)


_Loader.yaml_implicit_resolvers = _resolver_table()  # pyright: ignore[reportAttributeAccessIssue]
RecipeDumper.yaml_implicit_resolvers = _resolver_table()  # pyright: ignore[reportAttributeAccessIssue]


def parse_yaml(
    text: str, *, place: str, problems: list[Problem], numbered: bool = True, at: Path = ()
) -> Node:
    """Read one YAML document.

    Args:
        text: The document.
        place: Name of its origin, for errors.
        problems: Receives what is wrong but does not stop the reading, such as duplicate keys.
        numbered: Whether lines mean anything; they do not on a command line.
        at: Path of the document within the recipe, for problems.
    Raises:
        RecipeProblems: The text is not YAML, or larger than any recipe.
    """
    if len(text) > MOST_CHARACTERS:
        raise RecipeProblems([_too_large(f"{len(text):,} characters", place)])
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeProblems([_syntax_problem(error, text, place, numbered)]) from error
    except (ValueError, OverflowError) as error:
        message = "this is not YAML: the number in an escape or directive is out of range"
        problem = Problem(place, "", message, 'look for "\\U" and "%"')
        raise RecipeProblems([problem]) from error
    if root is None:
        return Node(None, place, 1 if numbered else None)
    return _Builder(place, numbered, problems).build(root, at)


def _too_large(size: str, place: str) -> Problem:
    return Problem(
        place,
        "",
        f"{size} are too much for a recipe; at most {MOST_CHARACTERS:,} characters and {MOST_VALUES:,} values",
        "name data files in the recipe instead of writing them into it",
    )


def _syntax_problem(error: yaml.YAMLError, text: str, place: str, numbered: bool) -> Problem:
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        message = f"this is not YAML: the character U+{error.character:04X} is not allowed in it"
        return Problem(f"{place}:{line}" if numbered else place, "", message, "delete or replace it")
    reason = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    message = f"this is not YAML: {reason}" + (f" ({context})" if context else "")
    hint = (
        "indent with spaces, not tabs"
        if "\\t" in message
        else "check indentation, quotes, brackets and colons here"
    )
    return Problem(f"{place}:{mark.line + 1}" if mark and numbered else place, "", message, hint)


@dataclass(slots=True)
class _Builder:
    place: str
    numbered: bool
    problems: list[Problem]
    num_values: int = 0

    def build(
        self, node: yaml.Node, path: Path, at: int | None = None, parents: tuple[int, ...] = ()
    ) -> Node:
        line = at or node.start_mark.line + 1
        self.num_values += 1
        if self.num_values > MOST_VALUES:
            # aliases that repeat each other can stand for more values than memory holds
            raise RecipeProblems([_too_large(f"more than {MOST_VALUES:,} values", self._at(line))])
        if id(node) in parents:
            self._report(path, line, "an anchor contains itself", "write the value out")
            return self._node(None, line)
        parents = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._node(self._mapping(node, path, parents), line)
        if isinstance(node, yaml.SequenceNode):
            items = [self.build(item, (*path, index), None, parents) for index, item in enumerate(node.value)]
            return self._node(items, line)
        written = node.value if getattr(node, "style", None) is None else None
        return self._node(self._scalar(node, path, line), line, written)

    def _mapping(self, node: yaml.MappingNode, path: Path, parents: tuple[int, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._report(path, line, "a key must be one word", "quote it if it has brackets")
                continue
            if key.tag == f"{_TAG}merge":
                self._report(
                    path, line, "merge keys (<<) are not read", "write the values out, or use extends:"
                )
                continue
            name = str(key.value)
            if name in entries:
                self._report(
                    (*path, name),
                    line,
                    f'"{name}" is written twice; the first is at {entries[name].origin}',
                    "delete one of the two",
                )
                continue
            entries[name] = self.build(value, (*path, name), line, parents)
        return entries

    def _scalar(self, node: yaml.Node, path: Path, line: int) -> Scalar:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        if kind in ("int", "float"):
            return self._number(kind, text, path, line)
        self._report(
            path, line, f'the tag "{node.tag}" is not read', "write plain text, numbers, lists and sections"
        )
        return None

    def _number(self, kind: str, text: str, path: Path, line: int) -> Scalar:
        digits = text.replace("_", "")
        try:
            number = (
                int(digits) if kind == "int" else float(digits.replace(".inf", "inf").replace(".nan", "nan"))
            )
        except ValueError:
            number = math.nan
        if isinstance(number, float) and not math.isfinite(number):
            self._report(
                path,
                line,
                f"{shortened(text)} is not a finite number",
                f'if it is text, quote it: "{shortened(text)}"',
            )
            return None
        return number

    def _node(self, content: Any, line: int, written: str | None = None) -> Node:
        return Node(content, self.place, line if self.numbered else None, written)

    def _report(self, path: Path, line: int, message: str, hint: str) -> None:
        self.problems.append(Problem(self._at(line), dotted(path), message, hint))

    def _at(self, line: int) -> str:
        return f"{self.place}:{line}" if self.numbered else self.place

"""Read a task file: YAML of bounded size, and its keys with their types. Imports no torch."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import yaml

from gendistill_evals.errors import EvalError
from gendistill_evals.items import TurnTemplate
from gendistill_evals.reading import is_well_formed, read_text, shorten

LONGEST_NAME = 100
_KEYS = (
    "name", "description", "kind", "judge", "items", "fields", "prompt", "answer", "gold", "gold_after", "metric",
    "max_new_tokens", "options", "stop", "examples", "group", "subject", "thought_tokens", "dataset", "generate",
)  # fmt: skip
_COLUMNS = {"id": "id", "gold": "gold", "options": "options", "distractors": "distractors"}
_ROLES = ("system", "user", "assistant")
_FORMAT = "the README of gendistill_evals shows task files"
# A task file has a few dozen values; aliases of aliases could stand for billions.
_MOST_VALUES = 10_000

Choice = TypeVar("Choice", bound=StrEnum)


def read_task_yaml(path: Path) -> dict[Any, Any]:
    """Read the keys and values of a task file.

    Raises:
        EvalError: It cannot be read, is not YAML, or is not a mapping.
    """
    hint = "correct the file; " + _FORMAT
    text = read_text(path, what="the task file", hint=hint)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_nodes(node, {})
        content = None if node is None else loader.construct_document(node)
    # Dates and numbers that do not exist are plain ValueErrors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvalError(f"cannot read the task: {error}", where=str(path), hint=hint) from error
    if not isinstance(content, dict):
        raise EvalError(
            f"a task file maps keys to values, got {shorten(content)}", where=str(path), hint=hint
        )
    return content


def _check_nodes(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the values that a YAML node stands for, each repetition of an alias counted.

    Raises:
        ValueError: More than a task file can mean, an alias inside itself, or a key that stands twice.
    """
    if id(node) in sizes:
        # 0 while the node's own values are being counted.
        if not sizes[id(node)]:
            raise ValueError("an alias stands inside what it names")
        return sizes[id(node)]
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.MappingNode):
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := next((key for key, count in counts.items() if count > 1 and key != "<<"), None):
            raise ValueError(f'the key "{repeated[:LONGEST_NAME]}" stands twice')
        size += sum(_check_nodes(key, sizes) + _check_nodes(value, sizes) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check_nodes(value, sizes) for value in node.value)
    if size > _MOST_VALUES:
        raise ValueError(f"it holds more than {_MOST_VALUES:,} values, aliases written out")
    sizes[id(node)] = size
    return size


class TaskKeys:
    """Typed keys of a task file; every error names the file."""

    def __init__(self, content: Mapping[Any, Any], where: str) -> None:
        self.content = content
        self.where = where
        for key in content:
            if key not in _KEYS:
                close = difflib.get_close_matches(str(key)[:LONGEST_NAME], _KEYS, n=1)
                hint = f'did you mean "{close[0]}"?' if close else f"allowed: {', '.join(_KEYS)}"
                shown = key[:LONGEST_NAME] if isinstance(key, str) else shorten(key)
                raise EvalError(f'unknown key "{shown}"', where=where, hint=hint)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.content.get(key, default)
        if not _is_text(value) or (default is None and not value):
            raise self._error(key, "a text", hint=f'write {key}: "..."')
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.content.get(key, [])
        if not isinstance(value, list) or not all(_is_text(text) and text for text in value):
            raise self._error(key, "a list of texts", hint="put words such as yes, no and 1 in quotes")
        return tuple(value)

    def prompt(self) -> str | tuple[TurnTemplate, ...]:
        """Read the prompt: a text, or turns of ``{role, content}``.

        Raises:
            EvalError: Neither, or turns that do not lead up to an answer.
        """
        value = self.content.get("prompt")
        if not isinstance(value, list):
            return self.text("prompt")
        turns = tuple(self._turn(turn, number) for number, turn in enumerate(value))
        roles = [turn.role for turn in turns]
        spoken = roles[1:] if roles[:1] == ["system"] else roles
        if len(spoken) % 2 == 0 or spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
            raise EvalError(
                f'the turns of "prompt" must be of user and assistant in turn, user first and last, after at most one '
                f"of system; got {', '.join(roles) or 'none'}",
                where=self.where,
                hint="leave the last answer out: it is what the model gives",
            )
        return turns

    def _turn(self, turn: Any, number: int) -> TurnTemplate:
        place = f"prompt.{number}"
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise EvalError(
                f'"{place}" must hold role and content, got {shorten(turn)}',
                where=self.where,
                hint='write - {role: user, content: "..."}',
            )
        role, content = turn["role"], turn["content"]
        if role not in _ROLES:
            raise EvalError(
                f'"{place}.role" must be one of {", ".join(_ROLES)}, got {shorten(role)}',
                where=self.where,
                hint='write - {role: user, content: "..."}',
            )
        if not _is_text(content) or not content.strip():
            raise EvalError(
                f'"{place}.content" must be a text, got {shorten(content)}',
                where=self.where,
                hint="put words such as yes, no and 1 in quotes",
            )
        return TurnTemplate(role, content)

    def options(self) -> tuple[str, ...]:
        if "options" not in self.content:
            return ()
        columns = self.content.get("fields")
        if isinstance(columns, dict) and "options" in columns:
            raise EvalError(
                "both options and fields.options are given",
                where=self.where,
                hint="keep options for the same options in every item, fields.options for columns",
            )
        if not self.content["options"]:
            raise self._error("options", "a list of 2 to 26 texts", hint="write options: [A, B, C, D]")
        return self.texts("options")

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.content.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(key, "a whole number above 0", hint=f"write {key}: 16")
        return value

    def choice(self, key: str, kinds: type[Choice], default: Choice | None = None) -> Choice:
        value = self.content.get(key, default)
        if value not in list(kinds):
            raise self._error(key, f"one of {', '.join(kinds)}", hint=f"write {key}: {next(iter(kinds))}")
        return kinds(value)

    def one_of(self, key: str, words: Collection[str], default: str) -> str:
        value = self.content.get(key, default)
        if not isinstance(value, str) or value not in words:
            close = difflib.get_close_matches(str(value)[:LONGEST_NAME], list(words), n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"write {key}: {default}, or leave it out"
            raise self._error(key, f"one of {', '.join(words)}", hint=hint)
        return value

    def fields(self) -> dict[str, str | list[str]]:
        value = self.content.get("fields", {})
        if not isinstance(value, dict) or not all(
            _is_text(name) and (_is_text(source) or (name == "options" and _is_texts(source)))
            for name, source in value.items()
        ):
            raise EvalError(
                f'"fields" maps names to columns, got {shorten(value)}',
                where=self.where,
                hint="a dotted path reaches inside a column; options may be a list of columns",
            )
        return {**_COLUMNS, **value}

    def _error(self, key: str, wanted: str, *, hint: str) -> EvalError:
        return EvalError(
            f'"{key}" must be {wanted}, got {shorten(self.content.get(key))}', where=self.where, hint=hint
        )


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and is_well_formed(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(text) for text in value)

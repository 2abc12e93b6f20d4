"""Turn rows of a .jsonl file into the items of a task. Imports no torch."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from gendistill_evals.errors import EvalError
from gendistill_evals.extract import normalise, parse_number

_LETTERS = string.ascii_uppercase


class Kind(StrEnum):
    """Name how a generated answer is judged."""

    MULTIPLE_CHOICE = "multiple_choice"
    NUMERIC = "numeric"
    EXACT_MATCH = "exact_match"


class AnswerForm(StrEnum):
    """Name what answers a multiple-choice item: an option's text or its letter."""

    TEXT = "text"
    LETTER = "letter"


class GoldForm(StrEnum):
    """Name what the gold column of a multiple-choice row holds: the text, its index from 0, or its letter."""

    TEXT = "text"
    INDEX = "index"
    LETTER = "letter"


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        id: Unique in its task.
        prompt: The user's message, the same under both protocols.
        gold: The right answer; one of ``options`` where there are any.
        options: Answers that log-likelihood ranks, or None.
        texts: What the options say: ``options`` itself unless those are letters.
    """

    id: str
    prompt: str
    gold: str
    options: tuple[str, ...] | None
    texts: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class ItemFormat:
    """Say how a row becomes an item.

    Attributes:
        kind: How a generated answer is judged.
        answer: What answers a multiple-choice item.
        gold: What its gold column holds.
        gold_after: What stands before the answer in the gold column; empty if nothing does.
        template: The prompt with ``{name}`` for columns, and ``{options}`` for the options as a list.
        fields: Column of each name: dotted paths; ``options`` may be several columns.
    """

    kind: Kind
    answer: AnswerForm
    gold: GoldForm
    gold_after: str
    template: str
    fields: Mapping[str, str | list[str]]

    def check(self, where: str) -> None:
        """Reject a template that is more than text with plain ``{name}``.

        Attributes, indices and format codes are refused because they could reach into objects.

        Args:
            where: Task file, for errors.
        Raises:
            EvalError: Anything else in braces.
        """
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise EvalError(
                f'"prompt" is no template: {error}', where=where, hint="write {{ for a brace"
            ) from error
        for _, name, code, conversion in parts:
            if name is not None and (not name.isidentifier() or code or conversion):
                raise EvalError(
                    f'"prompt" has "{{{name}}}"; only plain names of columns may stand in braces',
                    where=where,
                    hint="write {{ for a brace, and reach inside columns with fields: {name: a.b}",
                )


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the objects of a .jsonl file with their line numbers.

    Raises:
        EvalError: The file is missing or empty, or a line is no JSON object.
    """
    if not path.is_file():
        raise EvalError(
            f"the items are missing: {path}",
            where=str(path),
            hint="put the .jsonl file there; a task file names it relative to itself",
        )
    try:
        # Not splitlines(): JSON texts may hold the other line separators of Unicode unescaped.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"cannot read the items: {error}", where=str(path)) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvalError(f"the line is no JSON: {error}", where=f"{path}:{number}") from error
        if not isinstance(row, dict):
            raise EvalError("a line must hold one JSON object", where=f"{path}:{number}")
        rows.append((number, row))
    if not rows:
        raise EvalError("there are no items", where=str(path))
    return rows


def build_items(rows: Sequence[tuple[int, dict[str, Any]]], form: ItemFormat, path: Path) -> tuple[Item, ...]:
    """Turn rows into items.

    Args:
        rows: Objects with their line numbers, from ``read_rows``.
        form: How a row becomes an item.
        path: File of the rows, for errors.
    Raises:
        EvalError: A row that does not fit, naming its line.
    """
    items = tuple(_item(row, index, form, f"{path}:{line}") for index, (line, row) in enumerate(rows))
    reject_repeated_ids([item.id for item in items], path)
    bare = next((item.id for item in items if item.options is None), None)
    if bare is not None and any(item.options for item in items):
        raise EvalError(
            f'item "{bare}" has no distractors while others have',
            where=str(path),
            hint="give distractors to every item or to none",
        )
    return items


def reject_repeated_ids(identities: Sequence[str], path: Path) -> None:
    """Raise ``EvalError`` if two rows have the same id."""
    seen: set[str] = set()
    for identity in identities:
        if identity in seen:
            raise EvalError(f'the id "{identity}" stands twice', where=str(path))
        seen.add(identity)


def _item(row: Mapping[str, Any], index: int, form: ItemFormat, where: str) -> Item:
    gold = _column(row, form.fields["gold"], where, required=True)
    if form.kind is Kind.MULTIPLE_CHOICE:
        texts = _options(row, form, where)
        options = tuple(_LETTERS[: len(texts)]) if form.answer is AnswerForm.LETTER else texts
        answer = options[_gold_position(gold, texts, form.gold, where)]
    else:
        answer = _gold_text(gold, form, where)
        texts = options = _with_distractors(row, answer, index, form, where)
    variables = {name: _column(row, source, where, required=False) for name, source in form.fields.items()}
    shown = {**row, **variables, "options": _shown(texts, form.answer)}
    identity = variables["id"]
    return Item(
        id=str(index if identity is None else identity),
        prompt=_render(form.template, shown, where),
        gold=answer,
        options=options,
        texts=texts,
    )


def _column(row: Mapping[str, Any], source: str | list[str], where: str, *, required: bool) -> Any:
    if isinstance(source, list):
        return [_column(row, name, where, required=required) for name in source]
    value: Any = row
    for part in source.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None and required:
        raise EvalError(
            f'there is no column "{source}"; the row has {", ".join(row)}',
            where=where,
            hint="say which column is what with fields: {gold: <column>} in the task file",
        )
    return value


def _options(row: Mapping[str, Any], form: ItemFormat, where: str) -> tuple[str, ...]:
    texts = _texts(_column(row, form.fields["options"], where, required=True), where)
    if not 2 <= len(texts) <= len(_LETTERS):
        raise EvalError(f"a question needs 2 to {len(_LETTERS)} options, got {len(texts)}", where=where)
    _reject_equal(texts, where)
    if form.answer is AnswerForm.TEXT and len({normalise(text) for text in texts} - {""}) < len(texts):
        raise EvalError(
            f"options differ only in case or punctuation, or have no words: {', '.join(texts)}",
            where=where,
            hint="ask for letters with answer: letter",
        )
    return texts


def _with_distractors(
    row: Mapping[str, Any], answer: str, index: int, form: ItemFormat, where: str
) -> tuple[str, ...] | None:
    distractors = _column(row, form.fields["distractors"], where, required=False)
    if distractors is None:
        return None
    others = _texts(distractors, where)
    # The row's number decides the place, so that no place is right more often than another.
    place = index % (len(others) + 1)
    texts = (*others[:place], answer, *others[place:])
    _reject_equal(texts, where)
    return texts


def _texts(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise EvalError(
            f"options and distractors are lists with at least one entry, got {values!r}", where=where
        )
    texts = tuple(str(value).strip() for value in values)
    if not all(texts):
        raise EvalError("an option is empty", where=where)
    return texts


def _reject_equal(texts: Sequence[str], where: str) -> None:
    if len(set(texts)) < len(texts):
        raise EvalError(f"two options are the same: {', '.join(texts)}", where=where)


def _gold_position(gold: Any, texts: Sequence[str], form: GoldForm, where: str) -> int:
    if form is GoldForm.INDEX:
        if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(texts):
            return gold
        raise EvalError(f"gold must be an index from 0 to {len(texts) - 1}, got {gold!r}", where=where)
    known = list(_LETTERS[: len(texts)]) if form is GoldForm.LETTER else list(texts)
    wanted = str(gold).strip()
    if wanted in known:
        return known.index(wanted)
    raise EvalError(
        f"gold {gold!r} is none of {', '.join(known)}",
        where=where,
        hint="say what the gold column holds with gold: text | index | letter in the task file",
    )


def _gold_text(gold: Any, form: ItemFormat, where: str) -> str:
    text = str(gold)
    if form.gold_after:
        _, found, text = text.rpartition(form.gold_after)
        if not found:
            raise EvalError(f'the gold answer has no "{form.gold_after}"', where=where)
    text = text.strip()
    if form.kind is Kind.NUMERIC and parse_number(text) is None:
        raise EvalError(
            f"the gold answer {text!r} is no number",
            where=where,
            hint='if it ends a longer text, name what stands before it, as in gold_after: "####"',
        )
    if form.kind is Kind.EXACT_MATCH and not normalise(text):
        raise EvalError(f"the gold answer {text!r} has no words", where=where)
    return text


def _shown(texts: Sequence[str] | None, answer: AnswerForm) -> str | None:
    if texts is None:
        return None
    if answer is AnswerForm.LETTER:
        return "\n".join(f"{_LETTERS[index]}. {text}" for index, text in enumerate(texts))
    return f"{', '.join(texts[:-1])} or {texts[-1]}"


def _render(template: str, variables: Mapping[str, Any], where: str) -> str:
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = variables.get(name)
        if value is None:
            known = ", ".join(sorted(key for key, found in variables.items() if found is not None))
            raise EvalError(f'the prompt uses "{{{name}}}", which the row lacks; it has {known}', where=where)
        parts.append(str(value))
    return "".join(parts)

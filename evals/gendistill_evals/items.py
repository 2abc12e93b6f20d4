"""Turn rows of a .jsonl file into the items of a task. Imports no torch."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from gendistill_evals.errors import EvalError
from gendistill_evals.extract import normalise, parse_number
from gendistill_evals.reading import parse_json, read_text, shorten

LETTERS = string.ascii_uppercase
_GOLD = "say what the gold column holds with gold: text | index | letter in the task file"
_NAMED = "put the .jsonl file there; a task file names it relative to itself"


class Kind(StrEnum):
    """The form of a task's rows; unless the task names a judge, it decides how generated answers are judged."""

    MULTIPLE_CHOICE = "multiple_choice"
    NUMERIC = "numeric"
    EXACT_MATCH = "exact_match"


class AnswerForm(StrEnum):
    """The answer to a multiple-choice item: an option's text or its letter."""

    TEXT = "text"
    LETTER = "letter"


class GoldForm(StrEnum):
    """The content of the gold column of a multiple-choice row: the text, its index from 0, or its letter."""

    TEXT = "text"
    INDEX = "index"
    LETTER = "letter"


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it: ``role`` is system, user or assistant."""

    role: str
    content: str


# The user's message, or the turns before the answer.
Prompt = str | tuple[Message, ...]


def messages_of(prompt: Prompt) -> list[Message]:
    """Return the turns of a prompt; a text is one turn of the user's."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)


class TurnTemplate(NamedTuple):
    """A turn of a prompt whose content is a template."""

    role: str
    template: str


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        id: Unique in its task.
        prompt: The user's message or the turns before the answer, the same under every protocol.
        gold: The right answer; one of ``options`` where there are any.
        options: Answers that log-likelihood ranks, or None.
        texts: What the options say, where it is known: ``options`` itself, or the texts behind letters; empty
            for letters that only the prompt explains.
        listing: The words by which the prompt lists the options; None if it does not, or nobody knows how.
        group: Of the items that share a passage or a question, which intervals resample together; the id unless given.
        subject: What it is about, for a table by subject; None where the task does not say.
        cell: Length in tokens, and depth in percent or None, of a generated text; None of other items.
        worked: The answer as an example shows it, such as a solution that ends in ``gold``; ``gold`` unless given.
        reasoning: What leads to the answer in an example, without the answer itself; empty if nothing does.
    """

    id: str
    prompt: Prompt
    gold: str
    options: tuple[str, ...] | None
    texts: tuple[str, ...] | None
    listing: str | None = None
    group: str = ""
    subject: str | None = None
    worked: str = ""
    reasoning: str = ""
    cell: tuple[int, int | None] | None = None

    def __post_init__(self) -> None:
        # A frozen value completes itself once, here.
        object.__setattr__(self, "group", self.group or self.id)
        object.__setattr__(self, "worked", self.worked or self.gold)

    @property
    def messages(self) -> list[Message]:
        """The turns before the answer."""
        return messages_of(self.prompt)


@dataclass(frozen=True, slots=True)
class ItemFormat:
    """The way from a row to an item.

    Attributes:
        kind: What the rows hold.
        answer: What answers a multiple-choice item.
        gold: What its gold column holds.
        gold_after: What stands before the answer in the gold column; empty if nothing does.
        template: The prompt with ``{name}`` for columns, and ``{options}`` for the options as a list; or turns of
            such texts.
        fields: Column of each name: dotted paths; ``options`` may be several columns.
        options: Options of every item; empty where each row has its own.
        group, subject: Columns of the item's group and subject; empty for none.
    """

    kind: Kind
    answer: AnswerForm
    gold: GoldForm
    gold_after: str
    template: str | tuple[TurnTemplate, ...]
    fields: Mapping[str, str | list[str]]
    options: tuple[str, ...] = ()
    group: str = ""
    subject: str = ""

    def check(self, where: str) -> None:
        """Reject a template that is more than text with plain ``{name}``.

        Attributes, indices and format codes are refused because they could reach into objects.

        Args:
            where: Task file, for errors.
        Raises:
            EvalError: Anything else in braces.
        """
        turns = (
            [self.template] if isinstance(self.template, str) else [turn.template for turn in self.template]
        )
        for template in turns:
            _check_template(template, where)


def _check_template(template: str, where: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise EvalError(
            f'"prompt" is not a template: {error}', where=where, hint="write {{ for a brace"
        ) from error
    for _, name, code, conversion in parts:
        if name is not None and (not name.isidentifier() or code or conversion):
            raise EvalError(
                f'"prompt" has "{{{name}}}"; only plain names of columns may stand in braces',
                where=where,
                hint="write {{ for a brace, and reach inside columns with fields: {name: a.b}",
            )


def read_rows(path: Path, *, what: str = "the file of items") -> list[tuple[int, dict[str, Any]]]:
    """Read the objects of a .jsonl file with their line numbers.

    Args:
        path: The file.
        what: What it is, for errors.
    Raises:
        EvalError: The file is missing or empty, or a line is not a JSON object.
    """
    return parse_rows(read_text(path, what=what, hint=_NAMED), path)


def parse_rows(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the objects of a text with one on each line, as ``read_rows`` does; ``path`` is for errors."""
    # Not splitlines(): JSON texts may hold the other line separators of Unicode unescaped.
    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = parse_json(line, where=where, hint="correct the line, or leave it out")
        if not isinstance(row, dict):
            raise EvalError(
                f"a line must hold one JSON object, got {shorten(row)}",
                where=where,
                hint='write {"question": ..., ...} on one line',
            )
        rows.append((number, row))
    if not rows:
        raise EvalError("there are no items", where=str(path), hint="write one JSON object per line")
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
            raise EvalError(
                f"the id {shorten(identity)} stands twice",
                where=str(path),
                hint="give every row an id of its own",
            )
        seen.add(identity)


def _item(row: Mapping[str, Any], index: int, form: ItemFormat, where: str) -> Item:
    gold = _column(row, form.fields["gold"], where, required=True)
    reasoning = worked = ""
    if form.kind is Kind.MULTIPLE_CHOICE:
        texts = _options(row, form, where)
        options = tuple(LETTERS[: len(texts)]) if form.answer is AnswerForm.LETTER else texts
        answer = options[_gold_position(gold, texts, form.gold, where)]
        texts = () if form.options and texts == tuple(LETTERS[: len(texts)]) else texts
    else:
        answer = _gold_text(gold, form, where)
        if form.gold_after:
            worked = str(gold).strip()
            reasoning = worked.rpartition(form.gold_after)[0].strip()
        texts = options = _with_distractors(row, answer, index, form, where)
    variables = {name: _column(row, source, where, required=False) for name, source in form.fields.items()}
    listing = None if texts is None else list_options(texts or options or (), form.answer)
    shown = {**row, **variables, "options": listing}
    return Item(
        id=identity_of(variables["id"], index, where),
        prompt=_prompt(form.template, shown, where),
        gold=answer,
        options=options,
        texts=texts,
        listing=listing if _lists_options(form.template) else None,
        group=_label(row, form.group, "a group", where) or "",
        subject=_label(row, form.subject, "a subject", where),
        worked=worked,
        reasoning=reasoning,
    )


def _lists_options(template: str | tuple[TurnTemplate, ...]) -> bool:
    """Whether the turn that is asked shows the options."""
    asked = template if isinstance(template, str) else template[-1].template
    return any(name == "options" for _, name, _, _ in string.Formatter().parse(asked))


def _label(row: Mapping[str, Any], column: str, what: str, where: str) -> str | None:
    """Read the column that groups items; None where the task names none."""
    if not column:
        return None
    text = _text(_column(row, column, where, required=True), what, where).strip()
    if not text:
        raise EvalError(
            f"{what} is empty", where=where, hint="write it out, or leave the key out of the task file"
        )
    return text


def _column(row: Mapping[str, Any], source: str | list[str], where: str, *, required: bool) -> Any:
    if isinstance(source, list):
        return [_column(row, name, where, required=required) for name in source]
    value: Any = row
    for part in source.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None and required:
        raise EvalError(
            f'there is no column "{source}"; the row has {shorten(list(row))}',
            where=where,
            hint="say which column is what with fields: {gold: <column>} in the task file",
        )
    return value


def _options(row: Mapping[str, Any], form: ItemFormat, where: str) -> tuple[str, ...]:
    given = list(form.options) or _column(row, form.fields["options"], where, required=True)
    texts = _texts(given, where)
    if not 2 <= len(texts) <= len(LETTERS):
        raise EvalError(
            f"a question needs 2 to {len(LETTERS)} options, got {len(texts)}",
            where=where,
            hint="correct the row, or name another column with fields: {options: <column>} in the task file",
        )
    _reject_equal(texts, where)
    if form.answer is AnswerForm.TEXT and len({normalise(text) for text in texts} - {""}) < len(texts):
        raise EvalError(
            f"options differ only in case or punctuation, or have no words: {shorten(list(texts))}",
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
    _reject_equal(texts, where, [_judged_as(text, form.kind) for text in texts])
    return texts


def _judged_as(text: str, kind: Kind) -> Any:
    """Return what decides whether two answers are the same to a judge: 18.0 is 18, and "paris" is "Paris"."""
    number = parse_number(text) if kind is Kind.NUMERIC else None
    return (normalise(text) or text) if number is None else number


def _texts(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise EvalError(
            f"options and distractors are lists with at least one entry, got {shorten(values)}",
            where=where,
            hint="reach inside a column with fields: {options: choices.text} in the task file",
        )
    texts = tuple(_text(value, "an option", where).strip() for value in values)
    if not all(texts):
        raise EvalError("an option is empty", where=where, hint="write it out, or leave it out of the list")
    return texts


def _text(value: Any, what: str, where: str) -> str:
    """Read a text, a number or a truth value as it is shown to a model."""
    if isinstance(value, float):
        # Plain digits: "1e+20" is not a number that an answer is compared with.
        return format(Decimal(repr(value)), "f")
    if not isinstance(value, (str, int)):
        raise EvalError(
            f"{what} must be a text or a number, got {shorten(value)}",
            where=where,
            hint="reach inside a column with fields: {name: a.b} in the task file",
        )
    return str(value)


def identity_of(value: Any, index: int, where: str) -> str:
    """Read the id of a row; rows without one are called by their number.

    Raises:
        EvalError: An id that is neither a text nor a number.
    """
    return str(index) if value is None else _text(value, "an id", where)


def _reject_equal(texts: Sequence[str], where: str, judged_as: Sequence[Any] | None = None) -> None:
    if len(set(judged_as or texts)) < len(texts):
        raise EvalError(
            f"two options are the same answer: {shorten(list(texts))}",
            where=where,
            hint="change or remove one",
        )


def _gold_position(gold: Any, texts: Sequence[str], form: GoldForm, where: str) -> int:
    wanted = _text(gold, "gold", where).strip()
    if form is GoldForm.INDEX:
        if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(texts):
            return gold
        raise EvalError(
            f"gold must be an index from 0 to {len(texts) - 1}, got {shorten(gold)}", where=where, hint=_GOLD
        )
    known = list(LETTERS[: len(texts)]) if form is GoldForm.LETTER else list(texts)
    if wanted in known:
        return known.index(wanted)
    raise EvalError(
        f"gold {shorten(gold)} is none of {', '.join(map(_cut, known))}",
        where=where,
        hint=_GOLD,
    )


def _gold_text(gold: Any, form: ItemFormat, where: str) -> str:
    text = _text(gold, "the gold answer", where)
    if form.gold_after:
        _, found, text = text.rpartition(form.gold_after)
        if not found:
            raise EvalError(
                f'the gold answer has no "{form.gold_after}"',
                where=where,
                hint="correct the row or gold_after",
            )
    text = text.strip()
    if form.kind is Kind.NUMERIC and parse_number(text) is None:
        raise EvalError(
            f"the gold answer {shorten(text)} is not a number",
            where=where,
            hint='if it ends a longer text, name what stands before it, as in gold_after: "####"',
        )
    if form.kind is Kind.EXACT_MATCH and not normalise(text):
        raise EvalError(f"the gold answer {shorten(text)} has no words", where=where, hint="write it out")
    return text


def _cut(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:30]}..."


def list_options(texts: Sequence[str], answer: AnswerForm) -> str:
    """Write the options as a prompt shows them: a line for each letter, or a list of words.

    Words that are sentences, or that hold the commas and the "or" of a list, get a line each.
    """
    if answer is AnswerForm.LETTER:
        return "\n".join(f"{LETTERS[index]}. {text}" for index, text in enumerate(texts))
    if any(text.endswith((".", "!", "?")) or "," in text or " or " in text for text in texts):
        return "".join(f"\n- {text}" for text in texts)
    return f"{', '.join(texts[:-1])} or {texts[-1]}"


def _prompt(template: str | tuple[TurnTemplate, ...], variables: Mapping[str, Any], where: str) -> Prompt:
    if isinstance(template, str):
        return _render(template, variables, where)
    return tuple(
        Message(role=turn.role, content=_render(turn.template, variables, where)) for turn in template
    )


def _render(template: str, variables: Mapping[str, Any], where: str) -> str:
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = variables.get(name)
        if value is None:
            known = shorten(sorted(key for key, found in variables.items() if found is not None))
            raise EvalError(
                f'the prompt uses "{{{name}}}", which the row lacks; it has {known}',
                where=where,
                hint="say which column is meant with fields: {name: <column>} in the task file",
            )
        parts.append(_text(value, f'"{{{name}}}" in the prompt', where))
    return "".join(parts)

"""Files of prompts: JSON lines, or a prompt a line. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from gendistill.errors import DataError
from gendistill.paths import parse_json
from gendistill.records import read_bytes
from gendistill.text import printable
from gendistill_evals import Message

# what answers add to the fields of their prompts
ANSWER_FIELDS = ("answer", "tokens", "ended", "error", "fingerprint")
_JSON_LINES = (".jsonl", ".ndjson")
_HINT = 'a line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
# seeds are 64 bits wide on a device
_LARGEST = 2**63 - 1


_Text = Annotated[str, Field(min_length=1)]


class _Turn(TypedDict):
    """A turn before the answer."""

    role: _Text
    content: str


class _Row(TypedDict):
    """A line of a file of prompts; other fields may hold anything."""

    prompt: NotRequired[str]
    messages: NotRequired[Annotated[list[_Turn], Field(min_length=1)]]
    max_new_tokens: NotRequired[Annotated[int, Field(ge=1, le=10**9)] | None]
    stop: NotRequired[_Text | list[_Text] | None]
    seed: NotRequired[Annotated[int, Field(ge=0, le=_LARGEST)] | None]


@dataclass(frozen=True, slots=True)
class Line:
    """A prompt of a file.

    Attributes:
        number: Of its line, from 1.
        fields: All that the line holds.
        asked: The text, or the turns before the answer.
        max_new_tokens, stop, seed: Its own; None for those of the command.
    """

    number: int
    fields: dict[str, Any]
    asked: str | tuple[Message, ...]
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    seed: int | None = None


def read_prompts(path: Path) -> list[Line]:
    """Read a file of prompts: JSON lines if its name ends in .jsonl, else text with a prompt a line.

    Empty lines are left out.

    Raises:
        DataError: The file cannot be read, has no prompt, or has a line that is not one; names the line.
    """
    if path.suffix.lower() == ".json":
        raise DataError(
            "prompts are JSON lines, an object a line, or plain text, not a JSON document",
            where=str(path),
            hint="write an object a line into a file whose name ends in .jsonl",
        )
    content = read_bytes(path, error=DataError, hint="check the path of --prompts")
    rows = [
        (number, line.rstrip(b"\r"))
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError("the file has no prompt", where=str(path), hint="write a prompt a line into it")
    if path.suffix.lower() in _JSON_LINES:
        return [_json_line(line, number, f"{path}:{number}") for number, line in rows]
    if rows[0][1].replace(b" ", b"").startswith((b'{"prompt"', b'{"messages"')):
        raise DataError(
            "its first line is a JSON object, and lines of plain text are prompts as they are",
            where=str(path),
            hint="let the name of a file of JSON lines end in .jsonl",
        )
    return [_text_line(line, number, f"{path}:{number}") for number, line in rows]


def _text_line(line: bytes, number: int, where: str) -> Line:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the line is not UTF-8: {error.reason}", where=where, hint="save the file as UTF-8"
        ) from error
    return Line(number, {"prompt": text}, text)


def _json_line(line: bytes, number: int, where: str) -> Line:
    row = parse_json(line, where=where, hint=_HINT, shape=_Row, error=DataError)
    given = [name for name in ("prompt", "messages") if name in row]
    if len(given) != 1:
        fields = printable(", ".join(row)) or "none"
        raise DataError(
            f'a line needs either "prompt" or "messages"; its fields: {fields}', where=where, hint=_HINT
        )
    taken = [name for name in ANSWER_FIELDS if name in row]
    if taken:
        raise DataError(
            f'the line has a field "{taken[0]}", where what is answered is written; fields of answers: '
            f"{', '.join(ANSWER_FIELDS)}",
            where=where,
            hint="give the field another name",
        )
    stop = row.get("stop")
    return Line(
        number,
        row,
        row["prompt"] if "prompt" in row else _turns(row["messages"]),
        row.get("max_new_tokens"),
        None if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        row.get("seed"),
    )


def _turns(messages: Sequence[_Turn]) -> tuple[Message, ...]:
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in messages)

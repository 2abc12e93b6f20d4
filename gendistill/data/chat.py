"""Conversations: reading the shapes they come in, and finding what the assistant says in the rendered text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, str]
RenderChat = Callable[[list[Message], bool], str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}

# two turns of each: a template that treats the last answer otherwise than earlier ones must show it here
PROBE: list[Message] = [
    {"role": "user", "content": "Which colour is the sky?"},
    {"role": "assistant", "content": "Blue, on most days."},
    {"role": "user", "content": "And the grass?"},
    {"role": "assistant", "content": "Green, after rain."},
]

_BLANK = re.compile(r"\s*")


class RowDropped(Exception):
    """Leave a row out for a reason that is counted."""


def read_conversation(value: Any) -> list[Message]:
    """Bring a conversation to messages with a role and a content.

    Both ``{"role", "content"}`` and ShareGPT's ``{"from", "value"}`` are read. A trailing user turn is cut off,
    since nothing answers it.

    Raises:
        RowDropped: Not a conversation of alternating user and assistant turns, after at most one system message.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RowDropped("the conversation is empty or no list")
    messages = [_read_message(message) for message in value]
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    while turns and turns[-1]["role"] == "user":
        messages, turns = messages[:-1], turns[:-1]
    if not turns:
        raise RowDropped("no assistant turn")
    if turns[0]["role"] != "user":
        raise RowDropped("does not start with a user turn")
    if any(turn["role"] != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise RowDropped("user and assistant turns do not alternate")
    return messages


def _read_message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise RowDropped("a message is no object")
    sender = message.get("role") or message.get("from")
    role = ROLES.get(sender.lower()) if isinstance(sender, str) else None
    if role is None:
        raise RowDropped(f"unknown role {sender!r}"[:60])
    content = message.get("content")
    if content is None:
        content = message.get("value")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise RowDropped("a message is no text")
    if not content.strip():
        raise RowDropped("a message is blank")
    read = {"role": role, "content": content}
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and role == "assistant":
        read["reasoning_content"] = reasoning
    return read


def find_end_of_turn(render: RenderChat, special_tokens: list[str]) -> str | None:
    """Find the special token that a template writes after an answer; None if it writes none."""
    text = render(PROBE, False)
    _, found, tail = text.rpartition(PROBE[-1]["content"])
    tail = tail.lstrip()
    matches = [token for token in special_tokens if token and tail.startswith(token)]
    return max(matches, key=len) if found and matches else None


def assistant_spans(
    render: RenderChat, messages: list[Message], text: str, end_of_turn: str, *, stop: int | None = None
) -> list[tuple[int, int]] | None:
    """Find each answer in a rendered conversation: what follows its generation prompt, with its end of turn.

    A span starts where ``render(messages[:i], True)`` ends, so it holds exactly what the model must generate.
    Templates may change earlier answers once later turns exist (thinking is stripped), hence the end is found in
    ``text`` itself: the answer's content must follow at once, and the end of turn must follow the content.

    Args:
        render: Renders messages, with or without the generation prompt.
        messages: The conversation.
        text: ``render(messages, False)``.
        end_of_turn: Special token that ends an answer.
        stop: Character after which answers are not looked for; None: the end.
    Returns:
        Character spans, one per answer; None when one of them cannot be told for sure.
    """
    spans: list[tuple[int, int]] = []
    cursor = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if stop is not None and cursor >= stop:
            break
        prompt = render(messages[:index], True)
        span = _match_content(text, prompt, message, end_of_turn, cursor=cursor)
        if span is None:
            span = _match_prefix(text, prompt, render(messages[: index + 1], False), end_of_turn)
        if span is None or span[0] < cursor:
            return None
        spans.append(span)
        cursor = span[1]
    return spans


def _match_content(
    text: str, prompt: str, message: Message, end_of_turn: str, *, cursor: int
) -> tuple[int, int] | None:
    """Match the prompt, then the answer as written or trimmed, then the end of turn."""
    for start in _starts(text, prompt, cursor):
        for content in _spellings(message["content"]):
            for content_start in (start, _skip_blank(text, start)):
                end = content_start + len(content)
                if text.startswith(content, content_start) and text.startswith(end_of_turn, end):
                    return start, end + len(end_of_turn)
    return None


def _match_prefix(text: str, prompt: str, rendered: str, end_of_turn: str) -> tuple[int, int] | None:
    """Take the plain difference of two renderings, if both are prefixes of the whole."""
    if not (text.startswith(rendered) and rendered.startswith(prompt)):
        return None
    end = rendered.rfind(end_of_turn, len(prompt))
    return (len(prompt), end + len(end_of_turn)) if end >= 0 else None


def _starts(text: str, prompt: str, cursor: int) -> Iterator[int]:
    if text.startswith(prompt):
        yield len(prompt)
        return
    # a prompt may open a thinking block that the template strips from all answers but the last
    block = prompt.rfind("<think>")
    if block >= cursor and text.startswith(prompt[:block]):
        yield block


def _skip_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _spellings(content: str) -> Iterator[str]:
    yield content
    yield content.strip()
    # templates that show thinking apart cut the answer out of the content
    _, found, answer = content.rpartition("</think>")
    if found:
        yield answer.lstrip("\n")
        yield answer.strip()

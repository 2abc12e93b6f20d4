"""Conversations: reading the shapes they come in."""

from __future__ import annotations

from typing import Any

Message = dict[str, str]

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


class RowDropped(Exception):
    """A row that is left out, for a reason that is counted."""


def read_conversation(value: Any) -> list[Message]:
    """Bring a conversation to messages with a role and a content.

    Both ``{"role", "content"}`` and ShareGPT's ``{"from", "value"}`` are read. A trailing user turn is cut off,
    since nothing answers it, and a blank system message says nothing.

    Raises:
        RowDropped: Not a conversation of alternating user and assistant turns, after at most one system message.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RowDropped("the conversation is empty or no list")
    messages = [read for message in value if (read := _read_message(message)) is not None]
    if not messages:
        raise RowDropped("no assistant turn")
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


def _read_message(message: Any) -> Message | None:
    if not isinstance(message, dict):
        raise RowDropped("a message is not an object")
    sender = message.get("role") or message.get("from")
    role = ROLES.get(sender.lower()) if isinstance(sender, str) else None
    if role is None:
        known_kind = sender is None or isinstance(sender, str)
        raise RowDropped(f"unknown role {sender!r}"[:60] if known_kind else "a role is not text")
    if message.get("tool_calls") or message.get("function_call"):
        raise RowDropped("a message calls a tool")
    content = message.get("content")
    if content is None:
        content = message.get("value")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        texts = [part.get("text") or "" for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if role == "system" and (content is None or (isinstance(content, str) and not content.strip())):
        return None
    if not isinstance(content, str):
        raise RowDropped("a message is not text")
    if not content.strip():
        raise RowDropped("a message is blank")
    read = {"role": role, "content": content}
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and role == "assistant":
        read["reasoning_content"] = reasoning
    return read

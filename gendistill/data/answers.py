"""Find what the assistant says in a rendered conversation, and the tokens that stand for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gendistill.data.chat import Message

RenderChat = Callable[[list[Message], bool], str]

_BLANK = re.compile(r"\s*")
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# how vocabularies spell a space
_SPACES = ("\u0120", "\u2581")
# noncharacters of Unicode: no text holds them, and no template looks for them
_BEGIN, _END = "\ufdd0", "\ufdd1"


def marks_answers(template: str) -> bool:
    """Whether a chat template marks what the assistant says with ``{% generation %}`` blocks."""
    return _GENERATION_TAG.search(template) is not None


def with_visible_marks(template: str) -> str:
    """Rewrite a template so that its generation blocks write a mark where they begin and end.

    The replacement is a block too, so that the white space around it is treated as around the original.
    """

    def replaced(tag: re.Match[str]) -> str:
        before, is_end, after = tag.groups()
        return f"{{%{before} if true %}}{{{{ '{_END if is_end else _BEGIN}' }}}}{{% endif {after}%}}"

    return _GENERATION_TAG.sub(replaced, template)


def marked_spans(marked: str, text: str, end_of_turn: str | None) -> list[tuple[int, int]] | None:
    """Read the answers from a conversation rendered with visible marks.

    Args:
        marked: Rendered by the template that ``with_visible_marks`` made.
        text: Rendered by the template itself.
        end_of_turn: Special token that ends an answer; it belongs to an answer that it follows at once, unless the
            answer has it already.
    Returns:
        Character spans in ``text``; None when the marks have changed the text, or match no pairs.
    """
    pieces = re.split(f"([{_BEGIN}{_END}])", marked)
    if "".join(pieces[::2]) != text:
        return None
    spans: list[tuple[int, int]] = []
    at, begun = 0, None
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            at += len(piece)
        elif (piece == _BEGIN) != (begun is None):
            return None
        elif piece == _BEGIN:
            begun = at
        else:
            assert begun is not None
            spans.append((begun, at))
            begun = None
    if begun is not None:
        return None
    if end_of_turn:
        spans = [
            (start, end + len(end_of_turn))
            if text.startswith(end_of_turn, end) and not text[start:end].rstrip().endswith(end_of_turn)
            else (start, end)
            for start, end in spans
        ]
    return [span for span in spans if span[0] < span[1]] or None


def token_spans(
    tokens: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    text: str,
    spans: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    """Map character spans to the tokens that begin in them.

    A token that begins before a span is not one that a model would generate in it. Several tokens may stand for one
    character, and white space may have been trimmed from the offsets of the token that begins with it. Where a
    tokenizer makes no token of white space, it belongs to none.

    Args:
        tokens: As the vocabulary spells them.
        offsets: Characters of each token.
        text: What was encoded.
        spans: In order, apart.
    Returns: Ranges of tokens, none of them empty.
    """
    begins: list[int] = []
    reached = 0
    for token, (start, end) in zip(tokens, offsets, strict=True):
        if reached < start and not text[reached:start].strip():
            spaced = token.startswith(_SPACES) or token[:1].isspace()
            begins.append(reached if spaced else start)
        else:
            begins.append(start)
        if end > reached:
            reached = end
    edges = np.searchsorted(np.maximum.accumulate(begins) if begins else [], np.asarray(spans), side="left")
    return [(first, last) for first, last in edges.tolist() if first < last]


def find_end_of_turn(render: RenderChat, probe: list[Message], special_tokens: list[str]) -> str | None:
    """Find the special token that a template writes after the last answer of a conversation; None if it writes none."""
    _, found, tail = render(probe, False).rpartition(probe[-1]["content"])
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

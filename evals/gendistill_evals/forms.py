"""The forms in which a protocol asks an item: as its task writes it, by letter, thought first. Imports no torch.

A form makes an item of an item, so that whatever asks, ranks and judges sees the prompt, options and gold answer of
that form. Options in another order are such a form too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from gendistill_evals.items import LETTERS, AnswerForm, Item, Message, Prompt, list_options, messages_of
from gendistill_evals.verbatim import Verbatim

LETTER_REQUEST = "Answer with the letter."
THOUGHT_REQUEST = 'Think step by step, then end with "The answer is ...".'
THOUGHT_LETTER_REQUEST = 'Think step by step, then end with "The answer is X.", where X is the letter.'
# Options that speak of the others, which stand elsewhere in another order: "all of the above", "both A and B".
_JOINED = r"\W+(?:and|or|nor|&)\W+[a-z]\b"
_OF_OTHERS = re.compile(
    r"\bthe (?:above|preceding|foregoing)\b(?!-)"
    r"|\bof (?:the |these |those )?(?:other )?(?:options|answers|choices)\b"
    r"|\b(?:all|none|any|both|neither|either|some|one|two) of (?:these|those|them)\W*$"
    rf"|\b(?:both|neither|either|options?|answers?|choices?|only) \(?(?P<named>[a-z])\b(?:{_JOINED}|\)?,)"
    rf"|^\W*(?P<first>[a-z])\b(?:\W+[a-z]\b)*(?:{_JOINED}\W*(?:only)?|\W+only)\W*$",
    re.IGNORECASE,
)
_LISTED = re.compile(r"(\s*[(\[]?([A-Z])[.):\]]+\s+)(\S.*)")


class Form(StrEnum):
    """The way an item is asked.

    ``plain`` is the task's own prompt; ``letter`` lists the options as lines "A. ..." and asks for the letter;
    ``thought`` asks to think first and to end with "The answer is ...".
    """

    PLAIN = "plain"
    LETTER = "letter"
    THOUGHT = "thought"


def in_form(item: Item, form: Form) -> Item:
    """Return an item as a form asks it.

    Args:
        item: With options, where the form is ``letter``.
        form: The form.
    """
    if form is Form.LETTER:
        return by_letter(item)
    if form is Form.THOUGHT:
        request = THOUGHT_LETTER_REQUEST if has_letters(item) else THOUGHT_REQUEST
        return replace(item, prompt=_with_request(item.prompt, request))
    return item


def has_letters(item: Item) -> bool:
    """Whether an item is answered by a letter as its task writes it."""
    return bool(item.options) and item.options == tuple(LETTERS[: len(item.options or ())])


def by_letter(item: Item) -> Item:
    """List the options of an item as lines "A. ..." and make the letters its options.

    An item that is answered by letters already is asked as it is.
    """
    if has_letters(item):
        return item
    assert item.options is not None
    letters = tuple(LETTERS[: len(item.options)])
    listing = list_options(item.options, AnswerForm.LETTER)
    gold = letters[item.options.index(item.gold)]
    return replace(
        item,
        prompt=_with_request(item.prompt, f"{listing}\n{LETTER_REQUEST}"),
        options=letters,
        texts=item.options,
        gold=gold,
        listing=listing,
        worked=gold,
    )


def example_turns(example: Item, form: Form) -> tuple[Message, Message]:
    """Show an example as a question and its answer.

    Args:
        example: From ``Task.examples``.
        form: The form that the question after it is asked in.
    """
    asked = in_form(example, form)
    answer = asked.worked
    if form is Form.THOUGHT:
        answer = "\n".join(part for part in (asked.reasoning, f"The answer is {asked.gold}.") if part)
    return Message(role="user", content=asked.messages[-1]["content"]), Message(
        role="assistant", content=answer
    )


def reordered(item: Item, order: Sequence[int]) -> Item | None:
    """Put the options of an item into another order, in its prompt as well.

    Args:
        item: The item.
        order: For each place the former place of the option that stands there.
    Returns: The item whose right answer has moved with its text; None without options, where letters are explained
        by a prompt in which no lines "A. ..." are found, or where an option speaks of the others.
    """
    if not item.options or sorted(order) != list(range(len(item.options))):
        return None
    texts, listing = item.texts, item.listing
    if has_letters(item):
        if not (texts and listing):
            found = _find_listing(item.messages[-1]["content"], item.options)
            if found is None:
                return None
            listing, marks, texts = found
        else:
            marks = [f"{letter}. " for letter in item.options]
        moved = tuple(texts[place] for place in order)
        shown = "\n".join(f"{mark}{text}" for mark, text in zip(marks, moved, strict=True))
        gold = item.options[list(order).index(item.options.index(item.gold))]
        options, texts = item.options, moved if item.texts else item.texts
    else:
        options = moved = tuple(item.options[place] for place in order)
        shown, gold = list_options(options, AnswerForm.TEXT), item.gold
        texts = moved if texts else texts
    if any(_speaks_of_others(text, len(moved)) for text in moved):
        return None
    prompt = item.prompt
    if listing:
        asked = item.messages[-1]["content"].replace(listing, shown)
        if isinstance(prompt, Verbatim):
            prompt = prompt.asking(asked)
        else:
            prompt = _with_last_turn(prompt, asked)
    return replace(
        item,
        prompt=prompt,
        options=options,
        texts=texts,
        gold=gold,
        listing=shown if item.listing else None,
        worked=gold if item.worked == item.gold else item.worked,
    )


def _speaks_of_others(option: str, size: int) -> bool:
    """Whether the place of an option among ``size`` decides what it says."""
    letters = LETTERS[:size]
    return any(
        (found["named"] or found["first"] or letters[0]).upper() in letters
        for found in _OF_OTHERS.finditer(option)
    )


def _find_listing(text: str, letters: Sequence[str]) -> tuple[str, list[str], tuple[str, ...]] | None:
    """Find the last lines in a row that give each letter its text, in order.

    Returns: The lines, what stands before the text in each, and the texts.
    """
    lines = text.split("\n")
    for start in range(len(lines) - len(letters), -1, -1):
        block = lines[start : start + len(letters)]
        found = [_LISTED.fullmatch(line) for line in block]
        matches = [match for match in found if match is not None]
        if len(matches) == len(letters) and [match[2] for match in matches] == list(letters):
            return "\n".join(block), [match[1] for match in matches], tuple(match[3] for match in matches)
    return None


def _with_request(prompt: Prompt, request: str) -> Prompt:
    return _with_last_turn(prompt, f"{messages_of(prompt)[-1]['content']}\n{request}")


def _with_last_turn(prompt: Prompt, content: str) -> Prompt:
    if isinstance(prompt, str):
        return content
    return (*prompt[:-1], Message(role=prompt[-1]["role"], content=content))

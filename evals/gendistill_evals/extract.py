"""Find the answer in a generated text. Imports no torch.

An extraction that finds nothing, or cannot tell which of several options is meant, is a failure: it is counted,
and the item is wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_SAYS_ANSWER = r"\banswer(?:\s+is|\s*:)\s*"
_QUOTES = "\"'`*\u2018\u2019\u201c\u201d"
_EDGE = _QUOTES + ".!?,;: \n\t"


def parse_number(text: str) -> Decimal | None:
    """Read a text that is one number: ``1,234``, ``$3.50``, ``-7``, ``40%``; None if it is anything else."""
    stripped = text.strip().rstrip("%").strip()
    return _decimal(stripped) if _NUMBER.fullmatch(stripped) else None


def last_number(text: str) -> Decimal | None:
    """Find the answer among the numbers of a text.

    Args:
        text: A generated answer.
    Returns: The first number after the last ``####`` if there is one, else the last number, else None.
    """
    _, marker, after = text.rpartition("####")
    if marker and (found := _NUMBER.search(after)):
        return _decimal(found.group())
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def normalise(text: str) -> str:
    """Drop what never makes an answer wrong: case, width, runs of spaces, quotes and punctuation at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGE)


def find_option(text: str, options: Sequence[str]) -> str | None:
    """Find the one option that a text names.

    Args:
        text: A generated answer.
        options: The possible answers.
    Returns: The option after "answer is" if there is one, else the only option named as whole words (an option
        inside a longer one that is named does not count), else None.
    """
    plain = normalise(text)
    spellings = {normalise(option): option for option in options}
    # Longest first, so that "dark red" is found before "red" and uses up its letters.
    either = "|".join(re.escape(word) for word in sorted(spellings, key=len, reverse=True))
    option = rf"(?<!\w)({either})(?!\w)"
    stated = re.findall(_SAYS_ANSWER + rf"(?:the |an? )?[{_QUOTES}(]*" + option, plain)
    if stated:
        return spellings[stated[-1]]
    named = set(re.findall(option, plain))
    return spellings[named.pop()] if len(named) == 1 else None


def find_letter(text: str, letters: Sequence[str], texts: Sequence[str]) -> str | None:
    """Find the letter of the option that a text chooses.

    Args:
        text: A generated answer.
        letters: The letters on offer.
        texts: The options' texts, in the same order.
    Returns: A letter at the start that stands alone ("B", "B.", "(B) yellow", not the article in "A dog"), else
        the one after "answer is", else the only one in parentheses, else that of the only option named by its
        text, else None.
    """
    allowed = "".join(letters)
    start = re.match(rf"[\s{_QUOTES}(]*([{allowed}])(?:[.):,]|[\s{_QUOTES}]*(?:$|\n))", text)
    if start:
        return start.group(1)
    stated = re.findall(rf"(?i:{_SAYS_ANSWER})[\s{_QUOTES}(]*([{allowed}])(?!\w)", text)
    if stated:
        return stated[-1]
    marked = set(re.findall(rf"\(([{allowed}])\)", text))
    if len(marked) == 1:
        return marked.pop()
    named = find_option(text, texts)
    return None if named is None else letters[list(texts).index(named)]


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", "").replace("\u2212", "-"))

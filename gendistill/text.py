"""Text that others wrote, made fit to be shown on one line."""

from __future__ import annotations

import unicodedata

# they change the order in which the rest of a line is shown
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# control characters, halves of character pairs, ends of lines and paragraphs
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
_LONGEST = 200
_LONGEST_LINE = 10_000


def encodable(text: str) -> str:
    """Return a text that can be written as UTF-8: halves of character pairs become escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def printable(text: str, *, longest: int = _LONGEST) -> str:
    """Write a text on one line, with escapes for all that would steer a terminal, and cut if it is very long.

    Args:
        text: Any text: a name, a path, a line of a file.
        longest: Characters to keep.
    """
    shown = "".join(_visible(character) for character in text[:longest])
    return f"{shown}… ({len(text):,} characters)" if len(text) > longest else shown


def printable_lines(text: str) -> str:
    """Write each line of a message as ``printable`` does."""
    return "\n".join(printable(line, longest=_LONGEST_LINE) for line in text.split("\n"))


def _visible(character: str) -> str:
    if character in _DIRECTIONS or unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape").decode("ascii")
    return character


def harmless(text: str) -> str:
    """Write a text of several lines, or a piece of one, with escapes for all that would steer a terminal."""
    return "".join(each if each in "\n\t" else _visible(each) for each in text)

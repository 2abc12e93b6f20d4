"""Regular expressions of a recipe: bounded, because Python's matcher cannot be stopped. Imports no torch."""

from __future__ import annotations

import re
from re import _constants as codes  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Annotated, Any

from pydantic import AfterValidator

MOST_CHARACTERS = 1000
# a name of 60 characters is then searched in well under a second
MOST_WAYS = 10**7
# how often an open repeat such as * can match within a name
_MANY = 100
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


def check_pattern(pattern: str) -> str:
    """Return a regular expression that is valid and that no name can keep busy.

    A matcher that goes back tries every way to spread a text over the repeats and alternatives of a pattern. Their
    number is bounded by ``ways_to_match``: three of ``*`` or ``+`` pass, a repeat inside a repeat does not.

    Args:
        pattern: As written in the recipe.
    Raises:
        ValueError: It is not a regular expression, too long, or too slow.
    """
    shown = pattern if len(pattern) <= 80 else f"{pattern[:60]}..."
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(
            f'"{shown}" has {len(pattern):,} characters; a pattern has at most {MOST_CHARACTERS:,}'
        )
    try:
        parsed = parser.parse(pattern)
        ways = ways_to_match(parsed)
        if ways <= MOST_WAYS:
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f'"{shown}" is not a regular expression: {error}') from error
    if ways > MOST_WAYS:
        raise ValueError(
            f'"{shown}" could take minutes to match one name: it repeats a repeat or an alternative, or has more '
            "than three of * and +; write a plainer pattern, or several in the list"
        )
    return pattern


def ways_to_match(items: Any) -> int:
    """Bound the ways in which a parsed pattern can match one text, up to a little above ``MOST_WAYS``."""
    ways = 1
    for code, argument in items:
        ways *= _ways(code, argument)
        if ways > MOST_WAYS:
            return MOST_WAYS + 1
    return ways


def _ways(code: Any, argument: Any) -> int:
    if code in _REPEATS:
        least, most, inner = argument
        least, most = min(int(least), _MANY), min(int(most), _MANY)
        return (most - least + 1) * ways_to_match(inner) ** max(most, 1)
    if code is codes.BRANCH:
        return sum(ways_to_match(branch) for branch in argument[1])
    if code is codes.SUBPATTERN:
        return ways_to_match(argument[-1])
    if code is codes.ATOMIC_GROUP:
        return ways_to_match(argument)
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return ways_to_match(argument[1])
    if code is codes.GROUPREF_EXISTS:
        _, yes, no = argument
        return ways_to_match(yes) + (ways_to_match(no) if no else 1)
    return 1


Pattern = Annotated[str, AfterValidator(check_pattern)]

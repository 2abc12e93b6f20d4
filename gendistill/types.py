"""Counts of tokens and parameters as people read and write them. Imports no torch."""

from __future__ import annotations

import math
import re
from decimal import Decimal

_TOKENS = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?([kKmMbB]?)")
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def short_count(count: int) -> str:
    """Write a count of parameters or tokens with at most three digits: ``999``, ``1.23k``, ``597M``, ``1.2B``."""
    if count < 1000:
        return str(count)
    # what rounds to a thousand is one of the next unit
    power = next((power for power in (1, 2, 3) if count < 999.5 * 1000**power), 4)
    return f"{count / 1000**power:.3g}{'kMBT'[power - 1]}"


def parse_token_count(value: object) -> int:
    """Read ``500``, ``"20k"``, ``"30M"`` or ``"1.5B"`` as a whole number of tokens.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("a token count is a number or a text such as 30M")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a token count; write 500, 20k, 30M or 1.5B")
    if isinstance(value, (int, float)):
        return int(value)
    match = _TOKENS.fullmatch(value) if len(value) <= 40 else None
    if match is None:
        shown = value if len(value) <= 40 else f"{value[:40]}..."
        raise ValueError(f'"{shown}" is not a token count; write 500, 20k, 30M or 1.5B')
    number, power, letter = match.groups()
    return int(Decimal(number.replace("_", "") + (power or "")) * _SCALES[letter.lower()])

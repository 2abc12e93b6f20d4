"""A judge from outside: one file."""

from __future__ import annotations

from gendistill_evals import Item, Judgement


def judge_length(item: Item, text: str) -> Judgement:
    """Whether the answer has as many characters as gold says, or more."""
    found = str(len(text))
    return Judgement(found, len(text) >= int(item.gold))

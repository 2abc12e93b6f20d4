"""What an engine is asked, and what it answers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Prompt(NamedTuple):
    """A text to go on from.

    Attributes:
        token_ids: At least one.
        max_new_tokens: Longest answer, in tokens; at least one.
        stop: Texts that end the answer.
        seed: Of this answer's draws; the same seed, prompt and model draw the same answer, whatever runs beside it.
        name: What it is called in errors; empty for its number.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    seed: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said.

    Attributes:
        token_ids: Without the end token.
        text: Up to the first stop text, without special tokens.
        ended: Whether the model ended it: by an end token or a stop text.
        log_probs: Natural-log probability of every token that was chosen, at temperature 1; the end token's is the last
            where there was one.
        error: What kept the prompt from being answered; None if nothing did.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    ended: bool = False
    log_probs: tuple[float, ...] = ()
    error: str | None = None

    @property
    def truncated(self) -> bool:
        """Whether it was cut at the limit of new tokens."""
        return not self.ended


@dataclass(slots=True)
class Stats:
    """What a run of an engine did.

    Attributes:
        prompt_tokens: That were read; those of a row that was put back count again.
        new_tokens: Of all answers, end tokens included.
        steps: Decode steps.
        rows: Rows of all these steps, those without a sequence not included.
        put_back: How often a row had to give its memory to others and start again.
        halved: How often the engine ran out of memory and went on with half the rows.
        seconds: From the first prompt to the last answer, whoever took them meanwhile included.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    rows: int = 0
    put_back: int = 0
    halved: int = 0
    seconds: float = 0.0

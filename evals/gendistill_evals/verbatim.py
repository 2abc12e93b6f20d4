"""Prompts that are asked as they are where there is no chat template. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gendistill_evals.items import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Verbatim(tuple[Message, ...]):
    """Turns for a chat template, and the whole text that is asked where there is none.

    Whatever another package has made of a question is asked token for token, and what a model answers to it keeps the
    white space around it. A prompt that is made of its turns is an ordinary one.

    Attributes:
        text: What is asked without a chat template; nothing is put before or after it.
        lead: What stands between the text and an answer that is ranked.
    """

    text: str
    lead: str

    def __new__(cls, turns: Iterable[Message], text: str, lead: str = " ") -> Verbatim:
        """Make a prompt of its turns and its text."""
        made = super().__new__(cls, turns)
        made.text, made.lead = text, lead
        return made

    def asking(self, content: str) -> Verbatim:
        """Return the prompt with another last turn, which the text ends in."""
        *before, last = self
        text = self.text.removesuffix(last["content"]) + content
        return Verbatim((*before, Message(role=last["role"], content=content)), text, self.lead)


def whole_answer(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """Decode an answer up to its first stop text, with all of its white space and without special tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    # A tokenizer may decode half of a character pair, which no file can hold.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text[: min((text.find(words) for words in stop if words in text), default=len(text))]

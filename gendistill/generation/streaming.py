"""The text of an answer while it grows, for whoever reads along. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from gendistill.generation.stops import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Stream:
    """An answer's text, as far as nothing that comes later can change it: what was handed out is never taken back.

    Held back are half characters, what may become a stop text, and white space that may be the answer's last. All that
    is handed out, put together, is the text of the answer.

    Args:
        tokenizer: Decodes the answer.
        end_ids: Tokens that end it, which are not part of its text.
        stop: Texts that end it; it goes up to the first.
        strip: Whether white space around the answer is left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Container[int] = (),
        stop: Sequence[str] = (),
        strip: bool = True,
    ) -> None:
        self._text = Text(tokenizer)
        self._end_ids, self._stop, self._strip = end_ids, tuple(stop), strip
        self._begun = self._over = False
        # what may be the beginning of a stop text, and white space before it that may be the last
        self._open = self._space = ""

    def add(self, token: int) -> str:
        """Take the next token, and return the text that is certain now and was not before."""
        if self._over or token in self._end_ids:
            return ""
        return self._let_out(self._text.add(token), last=False)

    def rest(self) -> str:
        """Return what has been held back, at the end of the answer."""
        text = "" if self._over else self._let_out(self._text.rest(), last=True)
        self._over = True
        return text

    def _let_out(self, new: str, *, last: bool) -> str:
        text = self._open + new
        found = [text.find(words) for words in self._stop if words in text]
        if found:
            text, self._over = text[: min(found)], True
        kept = 0 if found or last else self._num_open(text)
        self._open = text[len(text) - kept :]
        return self._stripped(text[: len(text) - kept])

    def _num_open(self, text: str) -> int:
        """Count the last characters that a stop text may begin with."""
        for count in range(min(len(text), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(words.startswith(text[-count:]) for words in self._stop):
                return count
        return 0

    def _stripped(self, text: str) -> str:
        if not self._strip:
            return text
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return shown

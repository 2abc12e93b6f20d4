"""When an answer ends, and its text while it grows. Imports no torch.

An answer is fed token by token, for hundreds of rows at every step, so text is decoded only where a stop text could
have been completed, and then only its end. That is safe where text is the sum of what each token adds, which
``_Vocabulary`` says of a tokenizer; answers of other tokenizers are decoded as a whole each time.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gendistill.errors import RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# what decoders write for bytes that are not a character, or not yet
_BROKEN = "\ufffd"
# sets of stop texts to remember for a tokenizer
_MOST_SETS = 64


class Ending:
    """The end of one answer: by an end token, a stop text or the limit of new tokens.

    What is found out about a tokenizer's tokens is kept as long as it lives: its vocabulary must not change.

    Args:
        tokenizer: Decodes the answer.
        end_ids: Tokens that end it.
        stop: Texts that end it, none of them empty; one that is a special token is an end token.
        max_new_tokens: Longest answer, end token included.
    Attributes:
        ended: Whether an end token or a stop text has come.
    Raises:
        RecipeError: An empty stop text, or no room for a token.
    """

    __slots__ = (
        "_completing",
        "_end_ids",
        "_max_new_tokens",
        "_special_ids",
        "_stop",
        "_token_ids",
        "_tokenizer",
        "_vocabulary",
        "ended",
    )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Container[int],
        stop: tuple[str, ...],
        max_new_tokens: int,
    ) -> None:
        if "" in stop:
            raise RecipeError(
                f"a stop text must have a character, got {stop!r}",
                where="stop",
                hint="leave the empty text out",
            )
        if max_new_tokens < 1:
            raise RecipeError(
                f"max_new_tokens must be at least 1, got {max_new_tokens}", where="max_new_tokens"
            )
        self.ended = False
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        # text is decoded without special tokens, so that no stop text is found in it that is one
        self._special_ids = _special_ids(tokenizer, stop)
        self._stop = stop
        self._max_new_tokens = max_new_tokens
        self._token_ids: list[int] = []
        self._vocabulary = _vocabulary_of(tokenizer) if stop else None
        self._completing = self._vocabulary.completing(stop) if self._vocabulary else {}

    def add(self, token: int) -> bool:
        """Take the next token, and return whether the answer is over; after that, take no more."""
        if token in self._end_ids or token in self._special_ids:
            self.ended = True
            return True
        self._token_ids.append(token)
        if self._stop:
            completes = self._completing.get(token)
            if completes is None:
                completes = self._can_complete(token)
            if completes and self._is_stopped():
                self.ended = True
                return True
        return len(self._token_ids) >= self._max_new_tokens

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far, without the end token; the one that completed a stop text is the last."""
        return tuple(self._token_ids)

    @property
    def text(self) -> str:
        """The text so far up to the first stop text, without special tokens and surrounding white space."""
        return whole_text(self._tokenizer, self._token_ids, self._stop).strip()

    def _can_complete(self, token: int) -> bool:
        """Find out, once for each token and set of stop texts, whether one may end in what the token adds."""
        if self._vocabulary is None:
            return True
        found = self._vocabulary.piece(token).can_complete(self._stop)
        self._completing[token] = found
        return found

    def _is_stopped(self) -> bool:
        vocabulary = self._vocabulary
        if vocabulary is not None:
            start = vocabulary.start_of_end(self._token_ids, max(map(len, self._stop)) - 1)
            end = vocabulary.decode(self._token_ids[start:])
            if not any(words in end for words in self._stop):
                return False
        # the first token of a text decodes otherwise than later ones, so that its end may show what it does not hold
        text = _decode(self._tokenizer, self._token_ids)
        return any(words in text for words in self._stop)


def whole_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Return the text of an answer's tokens up to the first stop text, without special tokens."""
    text = _decode(tokenizer, token_ids)
    return text[: min((text.find(words) for words in stop if words in text), default=len(text))]


class Text:
    """The text of an answer while it grows, for those who watch.

    Text that later tokens could change is held back: bytes of a character that is not complete, and a run of tokens
    that are single bytes. Of tokenizers whose text is not the sum of what tokens add, all of it is.

    Args:
        tokenizer: Decodes the answer; its vocabulary must not change.
    """

    __slots__ = ("_held", "_shown", "_tokenizer", "_vocabulary")

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = _vocabulary_of(tokenizer)
        # the last tokens, and how much of their text has been handed out
        self._held: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """Take the next token, and return the text that is certain now and was not before."""
        self._held.append(token)
        if self._vocabulary is None:
            return ""
        piece = self._vocabulary.piece(token)
        # a token without text leaves open what the bytes before it become
        if piece.is_byte or not piece.later:
            return ""
        text = self._vocabulary.decode(self._held)
        certain = text.rstrip(_BROKEN)
        new = certain[self._shown :]
        if certain == text:
            # enough to decode what comes next as later text
            self._held, self._shown = [token], len(piece.first)
        else:
            self._shown = max(self._shown, len(certain))
        return new

    def rest(self) -> str:
        """Return what has been held back, at the end of the answer."""
        text = _decode(self._tokenizer, self._held)[self._shown :]
        self._shown += len(text)
        return text


class _Piece(NamedTuple):
    """The text that one token adds.

    Attributes:
        first: Where no text is before it.
        later: Where text is before it.
        is_byte: Whether it is a byte, and what it adds a matter of the bytes beside it.
        is_whole: Whether what it adds is the same everywhere but for the first text: all characters are complete.
    """

    first: str
    later: str
    is_byte: bool
    is_whole: bool

    def can_complete(self, stop: Sequence[str]) -> bool:
        """Tell whether a stop text may end in the text of this token."""
        # bytes become characters by the bytes beside them
        if not self.is_whole:
            return True
        begun = {text[: place + 1] for text in (self.first, self.later) for place in range(len(text))}
        return any(text.endswith(words) or words.endswith(text) for text in begun for words in stop)


class _Vocabulary:
    """The tokens of a tokenizer whose text is the sum of what each adds, but for its beginning and runs of bytes.

    Args:
        backend: The tokenizer.
        has_bytes: Whether its decoder joins tokens such as ``<0x0A>`` to characters.
    """

    def __init__(self, backend: Tokenizer, *, has_bytes: bool) -> None:
        self._backend = backend
        self._has_bytes = has_bytes
        self._pieces: dict[int, _Piece] = {}
        self._completing: dict[tuple[str, ...], dict[int, bool]] = {}

    def decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def completing(self, stop: tuple[str, ...]) -> dict[int, bool]:
        """Return what is known of which tokens can complete a stop text, to be added to."""
        if len(self._completing) >= _MOST_SETS and stop not in self._completing:
            self._completing.clear()
        return self._completing.setdefault(stop, {})

    def piece(self, token: int) -> _Piece:
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._find(token)
        return found

    def start_of_end(self, token_ids: Sequence[int], num_characters: int) -> int:
        """Find a place from which on tokens decode as they do in the whole, but for the first text there.

        Args:
            token_ids: All of them.
            num_characters: Least text between that first text and the last token; less only from the very start.
        Returns: The place, 0 if there is none.
        """
        place = len(token_ids) - 1
        while place > 0 and num_characters > 0:
            place -= 1
            piece = self.piece(token_ids[place])
            num_characters -= len(piece.later) if piece.is_whole else 0
        while place > 0:
            place -= 1
            piece = self.piece(token_ids[place])
            # what begins the text must have some, so that nothing of those after it is taken for the beginning
            if piece.is_whole and piece.later:
                break
        return place

    def _find(self, token: int) -> _Piece:
        first, both = self.decode([token]), self.decode([token, token])
        is_byte = self._has_bytes and _names_byte(self._backend.id_to_token(token) or "")
        is_whole = not is_byte and _BROKEN not in both and both.startswith(first)
        return _Piece(first, both[len(first) :], is_byte, is_whole)


_VOCABULARIES: weakref.WeakKeyDictionary[Any, _Vocabulary | None] = weakref.WeakKeyDictionary()


def _vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary | None:
    """Return the vocabulary of a tokenizer, None if its text is not the sum of what tokens add, or nobody knows."""
    if tokenizer not in _VOCABULARIES:
        _VOCABULARIES[tokenizer] = _read_vocabulary(tokenizer)
    return _VOCABULARIES[tokenizer]


def _read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary | None:
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or (kind.decode, kind._decode) != (
        PreTrainedTokenizerFast.decode,
        PreTrainedTokenizerFast._decode,
    ):
        return None
    backend = tokenizer.backend_tokenizer
    decoder = backend.decoder
    if decoder is None:
        return _Vocabulary(backend, has_bytes=False)
    try:
        settings = json.loads(decoder.__getstate__())
    except Exception:  # how a decoder written in Python says that it has none
        return None
    steps = settings["decoders"] if settings["type"] == "Sequence" else [settings]
    if len(steps) == 1 and steps[0]["type"] in ("ByteLevel", "Metaspace", "WordPiece"):
        return _Vocabulary(backend, has_bytes=False)
    if _is_sentencepiece(steps):
        return _Vocabulary(backend, has_bytes=any(step["type"] == "ByteFallback" for step in steps))
    return None


def _is_sentencepiece(steps: Sequence[dict[str, Any]]) -> bool:
    """Tell whether a decoder writes spaces for their sign, joins bytes, joins all, and strips beginnings."""
    kinds = [step["type"] for step in steps]
    order = ("Replace", "ByteFallback", "Fuse", "Strip")
    return (
        bool(kinds)
        and kinds == [kind for kind in order if kind in kinds]
        and all(step["pattern"] == {"String": "\u2581"} for step in steps if step["type"] == "Replace")
        # at most one character, so that any text before a token keeps what it adds whole
        and all((step["start"] <= 1, step["stop"]) == (True, 0) for step in steps if step["type"] == "Strip")
    )


def _names_byte(token: str) -> bool:
    # all that a decoder of bytes could take for one
    return len(token.encode()) == 6 and token.startswith("<0x") and token.endswith(">")


def _special_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> list[int]:
    """List the stop texts that are tokens which decoding leaves out."""
    vocabulary = [(words, tokenizer.convert_tokens_to_ids(words)) for words in stop]
    return [
        token
        for words, token in vocabulary
        # an unknown text has the id of another token, or none
        if isinstance(token, int)
        and tokenizer.convert_ids_to_tokens(token) == words
        and not _decode(tokenizer, [token])
    ]


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    # a tokenizer may decode half of a character pair, which no file can hold
    return text.encode("utf-8", "replace").decode("utf-8")

"""A language model whose every result is kept as soon as it is there. Imports no torch.

What decides a result is the model, the tokens it reads and how it decodes, so this is known here, where they meet. A
protocol asks as it asks any ``LanguageModel``, and what another protocol, task or process asked before is not asked of
the model again.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from gendistill_evals.errors import EvalError
from gendistill_evals.fingerprint import tokenizer_fingerprint
from gendistill_evals.model import Decoding, Generated, LanguageModel, ModelSetup, Pair, Request
from gendistill_evals.reading import shorten
from gendistill_evals.store import KEY_BYTES, ResultStore
from gendistill_evals.task import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised whenever the same question to the same model may get another answer than before; ``protocols.RULES`` with it.
RULES = 1
_Result = TypeVar("_Result")


class KeepingModel:
    """A language model that keeps its results in a folder, and asks for what it does not hold.

    It is a ``LanguageModel`` itself, with the identity and the limits of the one inside. Results that were kept come
    first. Equal questions are asked once, so what tells two samples of a prompt apart, such as a seed, belongs to the
    request or the decoding. Several models, processes and evaluations may share a folder.

    Args:
        model: Any language model; its weights stay as they are while this is in use.
        folder: Where results are kept; made when the first is there.
    Raises:
        EvalError: Weights that no result could come from.
    """

    def __init__(self, model: LanguageModel, folder: str | Path) -> None:
        self.model = model
        # The tokenizer decides the text of an answer and where a stop text ends it.
        owner = sha256_of([RULES, model.identity(), tokenizer_fingerprint(model.tokenizer)])
        self._owner = owner
        self._folder = Path(folder)
        self._stores: dict[str, ResultStore] = {}
        self._seconds: dict[bytes, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring what is kept to the disk."""
        for store in self._stores.values():
            store.close()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.model.tokenizer

    @property
    def max_tokens(self) -> int | None:
        """The model's."""
        return self.model.max_tokens

    @property
    def vocab_size(self) -> int | None:
        """The model's."""
        return self.model.vocab_size

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """The model's."""
        return self.model.generation_defaults

    def identity(self) -> dict[str, Any]:
        """Return the model's identity."""
        return self.model.identity()

    def setup(self) -> ModelSetup:
        """Return what the model runs on."""
        return self.model.setup()

    def take_seconds(self) -> float:
        """Return how long the model took, in whichever run, for what was asked since this was last called."""
        seconds = math.fsum(self._seconds.values())
        self._seconds.clear()
        return seconds

    def log_probs(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[float]]]:
        """Yield the natural-log probability of every token of each continuation.

        Raises:
            EvalError: As the model; or a log-probability that is not finite, or a result that cannot be kept.
        """
        keys, context, packed = [], None, b""
        for pair in pairs:
            # The options of an item have one prompt between them.
            if pair.context is not context:
                context, packed = pair.context, _packed(pair.context)
            keys.append(self._key(len(packed).to_bytes(8), packed, _packed(pair.continuation)))
        return self._results(
            "log_probs",
            keys,
            names=[pair.name for pair in pairs],
            ask=lambda wanted: self.model.log_probs([pairs[index] for index in wanted]),
            plain=lambda values: {"log_probs": [float(value) for value in values]},
            read=lambda stored, index: _read_log_probs(stored, len(pairs[index].continuation)),
        )

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[int, Generated]]:
        """Yield the answer to each prompt.

        Raises:
            EvalError: As the model; or a result that cannot be kept.
        """
        # Hashed once for all requests that are alike.
        settings = cache(lambda *asked: bytes.fromhex(sha256_of([decoding.settings(), asked])))

        def key(request: Request) -> bytes:
            # Everything but what it is called.
            asked = request._replace(prompt=(), name="")
            return self._key(settings(*asked), _packed(request.prompt))

        return self._results(
            "generate",
            [key(request) for request in requests],
            names=[request.name for request in requests],
            ask=lambda wanted: self.model.generate([requests[index] for index in wanted], decoding),
            plain=_plain_answer,
            read=lambda stored, index: _read_answer(stored),
        )

    def _key(self, *parts: bytes) -> bytes:
        """Hash what decides a result of this model."""
        return hashlib.sha256(b"".join((self._owner.encode(), *parts))).digest()[:KEY_BYTES]

    def _store(self, kind: str) -> ResultStore:
        """Return the store of a kind of results, which is looked through when it is first needed."""
        if kind not in self._stores:
            self._stores[kind] = ResultStore(self._folder, f"{kind}-{self._owner[:16]}")
        return self._stores[kind]

    def _results(
        self,
        kind: str,
        keys: Sequence[bytes],
        *,
        names: Sequence[str],
        ask: Callable[[Sequence[int]], Iterator[tuple[int, _Result]]],
        plain: Callable[[_Result], dict[str, Any]],
        read: Callable[[Any, int], _Result],
    ) -> Iterator[tuple[int, _Result]]:
        """Yield what is kept, then ask for the rest.

        Args:
            kind: ``log_probs`` or ``generate``.
            keys: What decides each result.
            names: What the questions are called.
            ask: Asks the model for some of them, by index.
            plain: Makes plain data of a result.
            read: Makes the result of an index of plain data; raises ``ValueError`` if it cannot be one.
        """
        store = self._store(kind)
        places: dict[bytes, list[int]] = {}
        for index, key in enumerate(keys):
            places.setdefault(key, []).append(index)
        for key, stored in store.read(list(places)):
            try:
                result, seconds = read(stored, places[key][0]), float(stored["seconds"])
            except (ValueError, TypeError, KeyError):
                # Intact, but not ours: it is asked for and kept anew.
                continue
            self._seconds[key] = seconds
            for index in places.pop(key):
                yield index, result
        wanted = [indices[0] for indices in places.values()]
        if not wanted:
            return
        started = time.perf_counter()
        for number, given in ask(wanted):
            index, seconds = wanted[number], round(time.perf_counter() - started, 6)
            try:
                stored = {**plain(given), "seconds": seconds}
                # An uninterrupted run sees what an interrupted one will read.
                result = read(stored, index)
                store.add(keys[index], stored)
            except (ValueError, TypeError) as error:
                raise EvalError(
                    f"the model's {kind} gives {shorten(given)}, which is not a result",
                    where=names[index] or f"question {index}",
                    hint="it must be a finite number for each token, or the tokens and the text of an answer; "
                    "check the model's weights, or load it in float32",
                ) from error
            self._seconds[keys[index]] = seconds
            for each in places.pop(keys[index], ()):
                yield each, result
            # What the caller does with a result is not the model's time.
            started = time.perf_counter()
        if places:
            index = next(iter(places.values()))[0]
            raise EvalError(
                f"the model gave no result for {len(places):,} of {len(wanted):,} questions",
                where=names[index] or f"question {index}",
                hint=f"{type(self.model).__name__}.{kind} must yield every index once",
            )


def _packed(tokens: Sequence[int]) -> bytes:
    return array("q", tokens).tobytes()


def _read_log_probs(stored: Any, length: int) -> list[float]:
    values = stored["log_probs"]
    if (
        not isinstance(values, list)
        or len(values) != length
        or not all(isinstance(each, float) for each in values)
    ):
        raise ValueError
    return values


def _plain_answer(answer: Generated) -> dict[str, Any]:
    return {
        "token_ids": [int(token) for token in answer.token_ids],
        # Half of a character pair does not survive a file.
        "text": answer.text.encode("utf-8", "replace").decode("utf-8"),
        "ended": bool(answer.ended),
    }


def _read_answer(stored: Any) -> Generated:
    tokens, text, ended = stored["token_ids"], stored["text"], stored["ended"]
    if not isinstance(tokens, list) or not isinstance(text, str) or not isinstance(ended, bool):
        raise ValueError
    return Generated(tuple(tokens), text, ended)

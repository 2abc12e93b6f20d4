"""What the evaluation asks of a language model, whatever runs it. Imports no torch.

``hf.py`` answers it for every Hugging Face causal language model, slowly and plainly. Another engine that has these
members can be given to ``evaluate_model`` in its place; it inherits from nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from gendistill_evals.errors import EvalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pair(NamedTuple):
    """A continuation to score after its context.

    Attributes:
        context, continuation: Token ids, at least one each.
        name: What it is called in errors; empty for its number.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    name: str = ""


class Request(NamedTuple):
    """A prompt to answer.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: Longest answer, in tokens.
        stop: Texts that end the answer.
        name: What it is called in errors; empty for its number.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Generated:
    """One generated answer.

    Attributes:
        token_ids: Tokens of the answer, without the end token.
        text: The answer up to the first stop text, without special tokens.
        ended: Whether the model ended it: by an end token or a stop text.
    """

    token_ids: tuple[int, ...]
    text: str
    ended: bool

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut at the limit of new tokens."""
        return not self.ended


@dataclass(frozen=True, slots=True)
class Decoding:
    """The rules by which answers are generated.

    Attributes:
        fields: Every decoding field that decides a token.
        eos_token_ids: Tokens that end an answer: those of the checkpoint, the tokenizer's, and those that end a
            turn in the chat template.
        pad_token_id: The tokenizer's pad token, else the first end token, else 0.
        overrode: What the checkpoint's generation config asked for and did not get.
    """

    fields: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    overrode: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """Return what decides tokens, for the record."""
        return {
            **self.fields,
            "eos_token_id": list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }


class ModelSetup(NamedTuple):
    """The device, precision and versions that a model runs on, for the record; none of them may decide a score.

    Attributes:
        device: In words.
        dtype: Of the weights, as in ``float32``.
        versions: Version by package.
        batch_size: Sequences at once; None where that is not fixed.
    """

    device: str
    dtype: str
    versions: Mapping[str, str]
    batch_size: int | None


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model that scores continuations and answers prompts.

    Results come as ``(index, result)`` in the order in which they finish, so that a scheduler may choose the order;
    every index comes once. What is asked together does not change what comes out beyond rounding.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that prompts are made with."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that it reads, prompt and answer; None if it declares no limit."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """How many token ids it can both read and predict; None if it does not say."""
        ...

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """What the checkpoint's generation config asks for, its end tokens among it, where it is not the default."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return plain data that differs when the model's numbers may: a hash of its weights, their precision.

        Results are kept under it, so that equal identities share them.

        Raises:
            EvalError: Weights that no score could come from.
        """
        ...

    def setup(self) -> ModelSetup:
        """Return what the model runs on."""
        ...

    def log_probs(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[float]]]:
        """Yield the natural-log probability of every token of each continuation.

        Raises:
            EvalError: A sequence that is too long, or a probability that is not a number.
        """
        ...

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[int, Generated]]:
        """Yield the answer to each prompt.

        Raises:
            EvalError: A prompt that is too long with its answer, or logits that are not numbers.
        """
        ...


class Limits(NamedTuple):
    """The most that a model can read, where there is no model yet; None where it declares no limit.

    Attributes:
        max_tokens: Longest sequence.
        vocab_size: Token ids that it knows.
    """

    max_tokens: int | None
    vocab_size: int | None


def check_fits(
    model: LanguageModel | Limits, sequences: Sequence[Sequence[int]], *, where: str, num_new_tokens: int = 0
) -> None:
    """Check that a model can read sequences, before any of them is run.

    Args:
        model: A model, or what is known of one that is not loaded.
        sequences: Token ids of each item.
        where: Task and protocol, for errors.
        num_new_tokens: Tokens that are generated after each.
    Raises:
        EvalError: Sequences longer than the model's positions, or tokens that it has no embeddings for.
    """
    positions, known = model.max_tokens, model.vocab_size
    lengths = [len(ids) + num_new_tokens for ids in sequences]
    if positions is not None and (too_long := [length for length in lengths if length > positions]):
        new = f", {num_new_tokens:,} new ones included," if num_new_tokens else ""
        raise EvalError(
            f"{len(too_long):,} of {len(lengths):,} items are too long for the model: they have up to "
            f"{max(too_long):,} tokens{new} and it has {positions:,} positions",
            where=where,
            hint="use shorter items, a lower max_new_tokens, or a model with more positions",
        )
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    if known is not None and largest >= known:
        raise EvalError(
            f"the tokenizer makes token {largest:,} of an item, and the model has embeddings for {known:,} tokens",
            where=where,
            hint="score the model with its own tokenizer, or resize its embeddings",
        )

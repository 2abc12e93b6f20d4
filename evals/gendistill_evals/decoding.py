"""Greedy decoding with every setting said aloud, whatever the checkpoint's own defaults are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gendistill_evals.errors import EvalError
from gendistill_evals.prompts import Prompter
from gendistill_evals.reading import shorten
from gendistill_evals.scoring import check_length, device_of, inference, num_embeddings

# Tokens that end a turn in common chat templates. One ends an answer if the model's template writes it.
_TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>", "<|endoftext|>",
    "<|eot|>", "<turn|>", "</s>",
)  # fmt: skip
# What shapes sampling has no effect on greedy decoding; it stands at the library's neutral values for the record.
_NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "use_cache": True,
}
# Bookkeeping of the checkpoint that decides no token, and lengths and token ids, which are chosen below.
_NO_OVERRIDE = {
    "transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "max_length",
    "max_new_tokens", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decoding:
    """Fix how answers are generated.

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


def greedy_decoding(model: PreTrainedModel, prompter: Prompter) -> Decoding:
    """Choose the decoding of a model: greedy, with nothing taken over from the checkpoint but its end tokens.

    Args:
        model: Causal language model; its generation config is read, not changed.
        prompter: Renders the model's prompts.
    """
    tokenizer = prompter.tokenizer
    config = model.generation_config
    asked = config.to_diff_dict() if config else {}
    ends = _as_ids(asked.get("eos_token_id")) + _as_ids(tokenizer.eos_token_id)
    if prompter.template:
        vocabulary = tokenizer.get_vocab()
        ends += [vocabulary[text] for text in _TURN_ENDS if text in prompter.template and text in vocabulary]
    eos = tuple(dict.fromkeys(ends))
    # A pad token is read but counts for nothing: any token that the model has an embedding for will do.
    size = num_embeddings(model)
    pads = [
        token for token in (*_as_ids(tokenizer.pad_token_id), *eos, 0) if size is None or 0 <= token < size
    ]
    return Decoding(
        fields=dict(_NEUTRAL),
        eos_token_ids=eos,
        pad_token_id=pads[0],
        overrode={
            key: value
            for key, value in sorted(asked.items())
            if key not in _NO_OVERRIDE and value is not None and value != _NEUTRAL.get(key)
        },
    )


def generate_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    names: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Answer prompts greedily, in left-padded batches of similar length.

    Args:
        model: Causal language model with ``generate``.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        decoding: From ``greedy_decoding``.
        max_new_tokens: Longest answer, in tokens.
        stop: Texts that end an answer.
        batch_size: Prompts per batch.
        names: What each prompt is called in errors; empty for their numbers.
        progress: Called with the number of prompts done.
    Returns: One answer per prompt, in the order of the prompts.
    Raises:
        EvalError: A prompt longer than the model's positions allow, or logits that are not numbers.
    """
    check_length(model, max(map(len, prompts), default=0) + max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Generated] = {}
    with inference(model), _own_generation_config(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[index] for index in chosen]
            called = [names[index] if names else f"prompt {index}" for index in chosen]
            found = _batch(model, tokenizer, batch, decoding, max_new_tokens, stop, called)
            answers.update(zip(chosen, found, strict=True))
            if progress:
                progress(len(answers))
    return [answers[index] for index in range(len(prompts))]


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    max_new_tokens: int,
    stop: Sequence[str],
    names: Sequence[str],
) -> list[Generated]:
    width = max(map(len, prompts))
    device = device_of(model)
    pad = decoding.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    stopper = _StopText(tokenizer, stop, width, len(prompts))
    output = cast(Any, model).generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            **decoding.fields,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(decoding.eos_token_ids) or None,
            pad_token_id=pad,
        ),
        logits_processor=LogitsProcessorList([_Finite(names)]),
        stopping_criteria=StoppingCriteriaList([stopper] if stop else []),
    )
    assert isinstance(output, Tensor)
    rows = output[:, width:].tolist()
    return [_finish(tokenizer, row, decoding, stop, stopper.ends[place]) for place, row in enumerate(rows)]


def _finish(
    tokenizer: PreTrainedTokenizerBase,
    row: Sequence[int],
    decoding: Decoding,
    stop: Sequence[str],
    stopped_at: int | None,
) -> Generated:
    end = next((place for place, token in enumerate(row) if token in decoding.eos_token_ids), None)
    ended = end is not None or stopped_at is not None
    # A row that stopped at a text is filled with pad tokens, which may be end tokens: what came first counts.
    length = min(place for place in (end, stopped_at, len(row)) if place is not None)
    kept = tuple(row[:length])
    text = _decode(tokenizer, kept)
    cut = min((text.find(words) for words in stop if words in text), default=len(text))
    return Generated(kept, text[:cut].strip(), ended)


class _StopText(StoppingCriteria):
    """End each row once its new text contains a stop text, and remember after how many tokens that was."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_width: int, num_rows: int
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_width = prompt_width
        self.ends: list[int | None] = [None] * num_rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self.prompt_width :].tolist()
        for place, row in enumerate(rows):
            if self.ends[place] is None and any(words in _decode(self.tokenizer, row) for words in self.stop):
                self.ends[place] = len(row)
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


class _Finite(LogitsProcessor):
    """Refusal of logits that have no largest: NaN, infinity, or nothing but minus infinity."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = torch.isfinite(scores.amax(-1))
        if not finite.all():
            raise EvalError(
                "the model gives logits that are not finite",
                where=self.names[int(finite.int().argmin())],
                hint="check its weights, or load it in float32",
            )
        return scores


@contextmanager
def _own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's generation config: ``generate`` fills every field left at None from it."""
    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    # A tokenizer may decode half of a character pair, which no file can hold.
    return text.encode("utf-8", "replace").decode("utf-8")


def _as_ids(value: Any) -> list[int]:
    """Read a token id, a list of them, or None."""
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise EvalError(
            f"an end or pad token must be a token id or a list of them, got {shorten(value)}",
            where="generation_config.json or the tokenizer",
            hint="write the ids as numbers",
        )
    return list(ids)

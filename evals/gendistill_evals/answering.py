"""Greedy answers of a Hugging Face model, by its own ``generate`` in left-padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from gendistill_evals.model import Decoding, Generated, Request
from gendistill_evals.scoring import check_length, device_of, inference


def generate_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    batch_size: int = 8,
) -> Iterator[tuple[int, Generated]]:
    """Answer prompts greedily, in batches of similar length, the longest first.

    Args:
        model: Causal language model with ``generate``.
        tokenizer: Its tokenizer.
        requests: Prompts; those of one batch have the same length of answer and the same stop texts.
        decoding: From ``greedy_decoding``.
        batch_size: Prompts per batch.
    Yields: Index and answer of each prompt, a batch at a time.
    Raises:
        EvalError: A prompt longer than the model's positions allow, or logits that are not numbers.
    """
    check_length(model, max((len(each.prompt) + each.max_new_tokens for each in requests), default=0))
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt), reverse=True)
    alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for index in order:
        alike.setdefault((requests[index].max_new_tokens, requests[index].stop), []).append(index)
    for (max_new_tokens, stop), indices in alike.items():
        # A special token is not in the text that stop texts are looked for in: it ends an answer as end tokens do.
        ends = (*decoding.eos_token_ids, *_special_ids(tokenizer, stop))
        ending = replace(decoding, eos_token_ids=tuple(dict.fromkeys(ends)))
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            prompts = [requests[index].prompt for index in chosen]
            names = [requests[index].name or f"prompt {index}" for index in chosen]
            # Left before the answers are handed out: whoever takes them may train.
            with inference(model), _own_generation_config(model):
                found = _batch(model, tokenizer, prompts, ending, max_new_tokens, stop, names)
            yield from zip(chosen, found, strict=True)


def _special_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> list[int]:
    """List the stop texts that are tokens which decoding leaves out."""
    vocabulary = [(words, tokenizer.convert_tokens_to_ids(words)) for words in stop]
    return [
        token
        for words, token in vocabulary
        # An unknown text has the id of another token, or none.
        if isinstance(token, int)
        and tokenizer.convert_ids_to_tokens(token) == words
        and not _decode(tokenizer, [token])
    ]


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
    """An end for each row whose new text contains a stop text, and after how many tokens it came."""

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

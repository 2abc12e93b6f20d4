"""Greedy decoding with every setting said aloud, whatever the checkpoint's own defaults are. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gendistill_evals.errors import EvalError
from gendistill_evals.model import Decoding, LanguageModel
from gendistill_evals.prompts import Prompter
from gendistill_evals.reading import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def greedy_decoding(model: LanguageModel, prompter: Prompter) -> Decoding:
    """Choose the decoding of a model: greedy, with nothing taken over from the checkpoint but its end tokens.

    Args:
        model: Its generation defaults are read, not changed.
        prompter: Renders the model's prompts.
    """
    tokenizer = prompter.tokenizer
    asked = model.generation_defaults
    eos = end_tokens(tokenizer, prompter.template, asked)
    # A pad token is read but counts for nothing: any token that the model has an embedding for will do.
    size = model.vocab_size
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


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str | None, generation_defaults: Mapping[str, Any]
) -> tuple[int, ...]:
    """List the tokens that end an answer: the checkpoint's, the tokenizer's, and those that end a turn of a chat.

    Args:
        tokenizer: Of the model.
        template: Chat template that prompts are made with; None where they are plain text.
        generation_defaults: As a language model says them.
    Returns: Token ids, each once; none where nobody names one.
    Raises:
        EvalError: An end token that is not a token id.
    """
    ends = _as_ids(generation_defaults.get("eos_token_id")) + _as_ids(tokenizer.eos_token_id)
    if template:
        vocabulary = tokenizer.get_vocab()
        ends += [vocabulary[text] for text in _TURN_ENDS if text in template and text in vocabulary]
    return tuple(dict.fromkeys(ends))


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

"""Hash how a tokenizer turns text into tokens and back. Imports no torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gendistill_evals.task import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A call may leave these behind in a fast tokenizer, and every call sets them again.
_LEFT_BY_CALLS = ("truncation", "padding")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides a tokenizer's tokens and texts: its backend where it is a fast one, else its vocabulary."""
    # Imported here: with a model of another engine there need be no torch to load.
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in _LEFT_BY_CALLS:
            backend.pop(key, None)
    else:
        added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        backend = [type(tokenizer).__name__, tokenizer.get_vocab(), added]
    # Decoding leaves special tokens out of a text, and templates write them by name.
    return sha256_of([backend, tokenizer.special_tokens_map, sorted(tokenizer.all_special_ids)])

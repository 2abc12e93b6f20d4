"""The language model of the protocols, for every Hugging Face causal language model."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gendistill_evals.answering import generate_greedily
from gendistill_evals.model import Decoding, Generated, ModelSetup, Pair, Request
from gendistill_evals.scoring import continuation_scores, device_of, num_embeddings, num_positions
from gendistill_evals.weights import weights_fingerprint


class HFModel:
    """A Hugging Face causal language model with its tokenizer, as a ``LanguageModel``.

    Args:
        model: On the device and in the dtype to score it with; it is left as it was found.
        tokenizer: Its tokenizer.
        batch_size: Sequences per forward; a matter of memory.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @property
    def max_tokens(self) -> int | None:
        """Positions that the model declares; None if it declares no limit."""
        return num_positions(self.model)

    @property
    def vocab_size(self) -> int | None:
        """Rows of its embeddings; None if it does not say."""
        return num_embeddings(self.model)

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """The checkpoint's generation config, where it differs from the library's."""
        config = self.model.generation_config
        return config.to_diff_dict() if config else {}

    def identity(self) -> dict[str, Any]:
        """Return a hash of configuration and weights, and the dtype.

        Raises:
            EvalError: A weight is NaN or infinite; names its tensor.
        """
        return {"weights": weights_fingerprint(self.model), "dtype": str(self.model.dtype)}

    def setup(self) -> ModelSetup:
        """Return device, dtype, versions and batch size."""
        device = device_of(self.model)
        return ModelSetup(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            dtype=str(self.model.dtype).removeprefix("torch."),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            batch_size=self.batch_size,
        )

    def log_probs(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[float]]]:
        """Yield the natural-log probability of every token of each continuation, in float32."""
        for index, values, _ in self.scores(pairs):
            yield index, values

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[float], bool]]:
        """Yield as ``log_probs`` does, and whether greedy decoding of the context gives the continuation."""
        return continuation_scores(self.model, pairs, batch_size=self.batch_size)

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[int, Generated]]:
        """Yield the answer to each prompt, the longest prompts first."""
        return generate_greedily(self.model, self.tokenizer, requests, decoding, batch_size=self.batch_size)

"""Log-probabilities by a Hugging Face model, without logits for positions that nobody asks about."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gendistill_evals.errors import EvalError
from gendistill_evals.model import Pair


@dataclass(slots=True)
class _Row:
    """One sequence to run, and the pairs whose tokens it predicts."""

    ids: tuple[int, ...]
    pairs: list[int] = field(default_factory=list)


def continuation_scores(
    model: PreTrainedModel, pairs: Sequence[Pair], *, batch_size: int = 8
) -> Iterator[tuple[int, list[float], bool]]:
    """Compute the log-probability of every token of each continuation after its context, and whether it is greedy.

    The last token of a continuation is predicted, never read, so pairs that share a prompt often share a
    sequence: options of one token each cost one row, not one row each.

    Args:
        model: Causal language model; runs without its cache.
        pairs: Contexts and continuations.
        batch_size: Rows per forward.
    Yields: Index of each pair, natural-log probabilities of its continuation's tokens, in float32, and whether greedy
        decoding of the context gives the continuation.
    Raises:
        EvalError: A sequence longer than the model's positions, or a probability that is not a number.
    """
    rows = _rows(pairs)
    check_length(model, max((len(row.ids) for row in rows), default=0))
    for start in range(0, len(rows), batch_size):
        # Left before the numbers are handed out: whoever takes them may train.
        with inference(model):
            scored = list(_score_batch(model, rows[start : start + batch_size], pairs))
        for index, values, greedy in scored:
            if not all(map(math.isfinite, values)):
                raise EvalError(
                    "the model gives log-probabilities that are not finite",
                    where=pairs[index].name or f"pair {index}",
                    hint="check its weights, or load it in float32",
                )
            yield index, values, greedy


def check_length(model: nn.Module, num_tokens: int) -> None:
    """Raise ``EvalError`` if a sequence is longer than the model has positions."""
    limit = num_positions(model)
    if limit is not None and num_tokens > limit:
        raise EvalError(
            f"a sequence of {num_tokens:,} tokens exceeds the model's {limit:,} positions",
            hint="use shorter items or fewer new tokens",
        )


def num_positions(model: nn.Module) -> int | None:
    """Return how many positions a model declares; None if it declares no limit, as one without positions."""
    config = model.config
    assert isinstance(config, PretrainedConfig)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def num_embeddings(model: nn.Module) -> int | None:
    """Return how many tokens a model can both read and predict; None if it does not say."""
    sizes = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            # Models of other makers need not name these layers.
            continue
        if isinstance(layer, (nn.Embedding, nn.Linear)):
            sizes.append(layer.weight.shape[0])
    return min(sizes, default=None)


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off and gradients too; put the model back as it was."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: tensors that the model caches must remain usable in training.
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device that inputs go to."""
    return next(model.parameters()).device


def _rows(pairs: Sequence[Pair]) -> list[_Row]:
    """Merge inputs that begin other inputs, longest rows first."""
    inputs = [(*pair.context, *pair.continuation[:-1]) for pair in pairs]
    rows: list[_Row] = []
    # In descending order an input comes right after those that it begins.
    for index in sorted(range(len(pairs)), key=inputs.__getitem__, reverse=True):
        ids = inputs[index]
        if not rows or rows[-1].ids[: len(ids)] != ids:
            rows.append(_Row(ids))
        rows[-1].pairs.append(index)
    return sorted(rows, key=lambda row: len(row.ids), reverse=True)


def _score_batch(
    model: PreTrainedModel, batch: Sequence[_Row], pairs: Sequence[Pair]
) -> Iterator[tuple[int, list[float], bool]]:
    device = device_of(model)
    width = len(batch[0].ids)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for place, row in enumerate(batch):
        input_ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
    wanted = sorted({at for row in batch for index in row.pairs for at in _positions(pairs[index])})
    logits = _logits_at(model, input_ids.to(device), mask.to(device), torch.tensor(wanted, device=device))
    column = {at: number for number, at in enumerate(wanted)}
    for place, row in enumerate(batch):
        for index in row.pairs:
            columns = [column[at] for at in _positions(pairs[index])]
            targets = torch.tensor(list(pairs[index].continuation), device=device)
            log_probs = logits[place, columns].float().log_softmax(-1)
            greedy = bool((log_probs.argmax(-1) == targets).all())
            yield index, log_probs.gather(-1, targets[:, None])[:, 0].tolist(), greedy


def _positions(pair: Pair) -> range:
    """Positions whose logits predict the continuation."""
    first = len(pair.context) - 1
    return range(first, first + len(pair.continuation))


def _logits_at(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Run the model, returning logits ``[B, len(positions), V]``."""
    inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
    # Models that cannot restrict their logits return all of them.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]

"""What the evaluation asks its questions: a model on our engine, or on transformers where the engine cannot run it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gendistill.generation.engine import Engine
from gendistill.generation.request import Prompt
from gendistill.generation.runner import why_not
from gendistill_evals.errors import EvalError
from gendistill_evals.hf import HFModel
from gendistill_evals.model import Decoding, Generated, ModelSetup, Pair, Request
from gendistill_evals.scoring import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EngineModel(HFModel):
    """A causal language model on our engine, as a ``LanguageModel``.

    Args:
        engine: Open.
        model: That it runs.
        tokenizer: Its tokenizer.
    """

    def __init__(self, engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model, tokenizer)
        self.engine = engine

    def setup(self) -> ModelSetup:
        """Return device, dtype and versions; how many sequences run at a time is not fixed."""
        return super().setup()._replace(batch_size=None)

    def log_probs(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[float]]]:
        """Yield the natural-log probability of every token of each continuation, in float32."""
        for index, values, _ in self.scores(pairs):
            yield index, values

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[float], bool]]:
        """Yield as ``log_probs`` does, and whether greedy decoding of the context gives the continuation."""
        check_length(
            self.model, max((len(each.context) + len(each.continuation) - 1 for each in pairs), default=0)
        )
        found = self.engine.scores([(each.context, each.continuation) for each in pairs])
        for index, values, greedy in found:
            if not all(map(math.isfinite, values)):
                raise EvalError(
                    "the model gives log-probabilities that are not finite",
                    where=pairs[index].name or f"pair {index}",
                    hint="check its weights, or load it in float32",
                )
            yield index, values, greedy

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[int, Generated]]:
        """Yield the answer to each prompt as it ends; what cannot be answered is said when all others are."""
        prompts = [
            Prompt(each.prompt, each.max_new_tokens, each.stop, name=each.name or f"prompt {index}")
            for index, each in enumerate(requests)
        ]
        # the longest first: what is read together is of similar length
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_ids), reverse=True)
        errors = []
        for place, answer in self.engine.generate(
            [prompts[index] for index in order], end_ids=frozenset(decoding.eos_token_ids)
        ):
            index = order[place]
            if answer.error is not None:
                errors.append((prompts[index].name, answer.error))
            else:
                yield index, Generated(answer.token_ids, answer.text, answer.ended)
        if errors:
            raise EvalError(
                errors[0][1],
                where=errors[0][0],
                hint=f"{len(errors)} of {len(prompts)} prompts have no answer; the others are finished",
            )


@contextmanager
def asked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | None,
    learns: bool = False,
    say: Callable[[str], None] | None = None,
) -> Iterator[HFModel]:
    """Open the engine on a model for a while, or take transformers where it cannot run the model.

    Args:
        model: On the device and in the dtype to ask it with.
        tokenizer: Its tokenizer.
        batch_size: Sequences at a time; None for as many as memory allows.
        learns: Whether the model is being trained.
        say: Told why the engine cannot run the model.
    """
    reason = why_not(model)
    if reason is not None:
        if say is not None:
            say(f"generates with transformers, because our engine cannot run this model: {reason}")
        yield HFModel(model, tokenizer, batch_size=batch_size or 8)
        return
    with Engine(model, tokenizer, max_rows=batch_size, learns=learns) as engine:
        yield EngineModel(engine, model, tokenizer)

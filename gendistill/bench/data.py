"""How fast a recipe's data is read, tokenized and packed on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gendistill.bench.step_parts import documents
from gendistill.config.schema import Recipe
from gendistill.data.stream import build_stream
from gendistill.results.table import ResultRow

_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, slots=True)
class StreamSpeed:
    """How fast the steps of a stage are made, none ahead.

    Attributes:
        stage: Its name and mask.
        one_core: Tokens for each second of one core.
        python: Seconds a token in which the interpreter is held.
        mean_tokens: Of a document.
        documents: That were looked at.
    """

    stage: str
    one_core: float
    python: float
    mean_tokens: float
    documents: int

    def __str__(self) -> str:
        return (
            f"{self.stage}: {self.one_core:,.0f} tokens/s on one core, of which Python is "
            f"{1e6 * self.python:.2f} µs a token; documents of {self.mean_tokens:,.0f} tokens"
        )

    def rows(self) -> list[ResultRow]:
        """Return rows of a results file."""
        about: dict[str, Any] = {"n": self.documents, "note": f"documents of {self.mean_tokens:,.0f} tokens"}
        speed: dict[str, Any] = {"unit": "tokens/s", "better": "higher", **about}
        python: dict[str, Any] = {"unit": "µs a token", "better": "lower", **about}
        return [
            ResultRow(name=f"{self.stage}: tokens/s of one core", value=self.one_core, **speed),
            ResultRow(name=f"{self.stage}: Python", value=1e6 * self.python, **python),
        ]


def time_stream(recipe: Recipe, stage: str, tokenizer: Any, *, seconds: float) -> StreamSpeed:
    """Make steps of a stage for a while.

    Times are those of the processor, so that other work on it does not count. The interpreter's part is measured with a
    tokenizer that works in threads of its own.

    Args:
        recipe: The recipe.
        stage: Name of the stage.
        tokenizer: The teacher's.
        seconds: How long each, at least; the first step does not count.
    """
    engine = recipe.engine.model_copy(update={"prefetch": 0})
    stream = build_stream(recipe.model_copy(update={"engine": engine}), stage, tokenizer)

    def run() -> tuple[list[int], float, float]:
        next(stream)
        lengths: list[int] = []
        until = time.perf_counter() + seconds
        process, thread = time.process_time(), time.thread_time()
        while time.perf_counter() < until:
            lengths += documents(next(stream))
        return lengths, time.process_time() - process, time.thread_time() - thread

    with _tokenizer_threads("false"):
        alone, process, _ = run()
    with _tokenizer_threads("true"):
        lengths, _, thread = run()
    return StreamSpeed(
        stage=f"{recipe.name}, {stage}, mask {recipe.stages[stage].mask}",
        one_core=sum(alone) / process,
        python=thread / sum(lengths),
        mean_tokens=sum(alone + lengths) / len(alone + lengths),
        documents=len(alone + lengths),
    )


@contextmanager
def _tokenizer_threads(word: str) -> Iterator[None]:
    """Set what the tokenizer looks up at every call."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = word
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before

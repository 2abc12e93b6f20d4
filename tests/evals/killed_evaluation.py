"""An evaluation that can be killed between two answers: ``python killed_evaluation.py FOLDER OUT STOP``.

Before answer number STOP it waits for a line, or to be killed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from gendistill_evals import evaluate_model
from gendistill_evals.model import Generated, ModelSetup


class Slow:
    """A model that answers one question after the other, the last first.

    Args:
        tokenizer: Makes its prompts.
        before: Called with the number of the answer and the name of the question before it is answered.
    """

    max_tokens = vocab_size = None
    generation_defaults = {}  # noqa: RUF012

    def __init__(self, tokenizer, before: Callable[[int, str], None]) -> None:
        self.tokenizer = tokenizer
        self.before = before
        self.asked: list[str] = []

    def identity(self):
        return {"weights": "slow"}

    def setup(self):
        return ModelSetup("paper", "float32", {}, None)

    def log_probs(self, pairs):
        for index in reversed(range(len(pairs))):
            self._ask(pairs[index].name)
            # Numbers whose digits a file could lose.
            yield index, [-1 / (token + 3) for token in pairs[index].continuation]

    def generate(self, requests, decoding):
        for index in reversed(range(len(requests))):
            self._ask(requests[index].name)
            words = self.tokenizer.decode(requests[index].prompt[-9:-4])
            yield (
                index,
                Generated(tuple(requests[index].prompt[-5:]), f"{words}: Bär 🐻", ended=index % 3 > 0),
            )

    def _ask(self, name: str) -> None:
        self.before(len(self.asked), name)
        self.asked.append(name)


def evaluate(folder: Path, out: Path, model: Slow, limit: int | None = None) -> None:
    evaluate_model(
        model,
        tasks=[folder / "colors.yaml"],
        questions=folder / "open.jsonl",
        out_dir=out,
        parts_dir=out.parent / "kept" / out.name,
        model_name="slow",
        teacher=model,
        limit=limit,
    )


def main(folder: str, out: str, stop: str) -> None:
    def wait(number: int, name: str) -> None:
        if number == int(stop):
            print("waiting", flush=True)
            sys.stdin.readline()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{folder}/tokenizer")
    evaluate(Path(folder), Path(out), Slow(tokenizer, wait))


if __name__ == "__main__":
    main(*sys.argv[1:])

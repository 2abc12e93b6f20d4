"""Documents of random tokens whose lengths are spread like those of web text, packed by the training stream itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from gendistill.data.batch import Batch
from gendistill.data.mixture import Mixture
from gendistill.data.packing import pack
from gendistill.data.render import TokenizedSample
from gendistill.data.stream import BatchStream

# standard deviation of the logarithm of a length; web text has about 1
SPREAD = 1.0
SHORTEST = 8
_NAME = "synthetic"


class Documents:
    """Rows that are the numbers of documents, without end."""

    num_rows = None

    def __init__(self) -> None:
        self.number = 0

    def __next__(self) -> dict[str, int]:
        self.number += 1
        return {"number": self.number}

    def state_dict(self) -> dict[str, Any]:
        """Return the documents drawn."""
        return {"number": self.number, "epoch": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the documents drawn."""
        self.number = state["number"]


class Drawer:
    """From the number of a document to its tokens, in the place of a renderer.

    Lengths are log-normal: half of the documents are shorter than ``mean / exp(SPREAD**2 / 2)``, which is 0.61 of the
    mean. They are cut to ``SHORTEST`` and to the row, so that the mean of what is drawn is a little lower. Ids are
    uniform; all tokens count.

    Args:
        vocab_size: Ids are below it.
        seq_len: Tokens of a row: the longest document.
        mean_tokens: Of a document, before the cut.
        seed: Of lengths and ids.
    """

    def __init__(self, *, vocab_size: int, seq_len: int, mean_tokens: int, seed: int) -> None:
        self.vocab_size, self.seq_len, self.seed = vocab_size, seq_len, seed
        self.centre = math.log(mean_tokens) - SPREAD**2 / 2
        self.rows = 0
        self.dropped: Counter[str] = Counter()

    def draw(self, number: int) -> TokenizedSample:
        """Draw a document, which its number and the seed alone decide."""
        chance = np.random.default_rng((self.seed, number))
        length = int(np.clip(math.exp(chance.normal(self.centre, SPREAD)), SHORTEST, self.seq_len))
        return TokenizedSample(chance.integers(self.vocab_size, size=length), np.ones(length, dtype=bool))

    def render(self, rows: Sequence[Any]) -> list[list[TokenizedSample]]:
        """Draw the documents of these rows."""
        self.rows += len(rows)
        return [[self.draw(row["number"])] for row in rows]


def synthetic_stream(
    *,
    vocab_size: int,
    seq_len: int,
    mean_tokens: int,
    rows: int,
    micro_batch: int,
    seed: int,
    **settings: Any,
) -> BatchStream:
    """Build the stream of training over synthetic documents.

    Args:
        rows: Of a step.
        micro_batch: Rows of a micro-batch.
        settings: Further arguments of the stream.
    """
    drawer: Any = Drawer(vocab_size=vocab_size, seq_len=seq_len, mean_tokens=mean_tokens, seed=seed)
    source: Any = Documents()
    return BatchStream(
        Mixture({_NAME: source}, {_NAME: 1.0}),
        {_NAME: drawer},
        seq_len=seq_len,
        batch_size=rows,
        micro_batch_size=micro_batch,
        pad_id=0,
        **settings,
    )


def synthetic_batch(*, vocab_size: int, seq_len: int, mean_tokens: int, rows: int, seed: int) -> Batch:
    """Draw one batch of full rows that no step sees."""
    drawer = Drawer(vocab_size=vocab_size, seq_len=seq_len, mean_tokens=mean_tokens, seed=seed)
    samples = (drawer.draw(2**32 - number) for number in range(1, 2**16))
    return next(pack(samples, seq_len=seq_len, rows_per_batch=rows, pad_id=0))

"""Token sequences that a small model can learn, drawn from a seed: recall, copying and a Markov chain.

All tasks are about the symbols 2 to 33, and sizes differ from row to row, so that neither place nor symbol gives an
answer away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gendistill.data.batch import IGNORE, Batch
from gendistill.ops import Segments

START, SEPARATOR = 0, 1
_FIRST, _SYMBOLS = 2, 32
VOCABULARY = _FIRST + _SYMBOLS
_NEXT_STATES = 4
# every chain is the same; seeds choose walks on it
_CHAIN_SEED = 20_601


def _integers(generator: torch.Generator, number: int) -> Tensor:
    return _FIRST + torch.randint(_SYMBOLS, (number,), generator=generator)


def _between(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, max(low, high) + 1, (), generator=generator))


def recall_row(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Show keys with values, then ask for the values of keys in random order; what was asked is told."""
    pairs = _between(generator, 2, min(_SYMBOLS, tokens // 16))
    keys = _FIRST + torch.randperm(_SYMBOLS, generator=generator)[:pairs]
    values = _integers(generator, pairs)
    asked = torch.randint(pairs, (tokens // 2 + 1,), generator=generator)
    shown = torch.stack([keys, values], 1).flatten()
    questions = torch.stack([keys[asked], values[asked]], 1).flatten()
    row = torch.cat([torch.tensor([START]), shown, torch.tensor([SEPARATOR]), questions])[: tokens + 1]
    counted = torch.zeros(tokens, dtype=torch.bool)
    counted[2 * pairs + 2 :: 2] = True
    return row, counted


def copy_row(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Show random symbols, then the same again and again."""
    length = _between(generator, 4, tokens // 8)
    text = torch.cat([torch.tensor([SEPARATOR]), _integers(generator, length)])
    row = torch.cat([torch.tensor([START]), text.repeat(tokens // length + 1)])[: tokens + 1]
    counted = torch.zeros(tokens, dtype=torch.bool)
    counted[length + 2 :] = True
    return row, counted


def _chain() -> tuple[Tensor, Tensor]:
    """Draw where every state may lead, and the cumulative probabilities."""
    generator = torch.Generator().manual_seed(_CHAIN_SEED)
    noise = torch.rand(_SYMBOLS, _SYMBOLS, generator=generator)
    weights = torch.rand(_SYMBOLS, _NEXT_STATES, generator=generator) + 0.1
    return noise.topk(_NEXT_STATES).indices, (weights / weights.sum(1, keepdim=True)).cumsum(1)


def chain_row(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Walk a Markov chain of 32 states, each with four that may follow."""
    nexts, bounds = (part.tolist() for part in _chain())
    draws = torch.rand(tokens, generator=generator).tolist()
    state = int(torch.randint(_SYMBOLS, (), generator=generator))
    walk = [state]
    for draw in draws[1:]:
        chosen = sum(draw > bound for bound in bounds[state][:-1])
        state = nexts[state][chosen]
        walk.append(state)
    row = torch.cat([torch.tensor([START]), _FIRST + torch.tensor(walk)])
    counted = torch.ones(tokens, dtype=torch.bool)
    counted[0] = False
    return row, counted


TASKS = (recall_row, copy_row, chain_row)


def draw_batch(rows: int, tokens: int, *, seed: Sequence[int]) -> Batch:
    """Draw rows, of every task in turn.

    Args:
        rows: How many.
        tokens: Of each row.
        seed: Numbers below a million that name the batch.
    """
    number = 0
    for part in seed:
        number = number * 1_000_003 + part
    generator = torch.Generator().manual_seed(number % 2**63)
    drawn = [TASKS[index % len(TASKS)](tokens, generator) for index in range(rows)]
    whole = torch.stack([row for row, _ in drawn])
    counted = torch.stack([each for _, each in drawn])
    return Batch(
        input_ids=whole[:, :-1].contiguous(),
        labels=whole[:, 1:].masked_fill(~counted, IGNORE),
        position_ids=torch.arange(tokens).expand(rows, tokens).contiguous(),
        segments=Segments([tokens] * rows),
        num_labels=int(counted.sum()),
        num_tokens=rows * tokens,
    )


class TaskStream:
    """A stream of one micro-batch per step, which its number and the seed alone decide."""

    def __init__(self, rows: int, tokens: int, *, seed: int) -> None:
        self.rows, self.tokens, self.seed = rows, tokens, seed
        self.step = 0
        self.dropped: dict[str, dict[str, int]] = {}
        self.notes: list[str] = []

    def __next__(self) -> list[Batch]:
        self.step += 1
        return [draw_batch(self.rows, self.tokens, seed=(self.seed, self.step))]

    def state_dict(self) -> dict[str, Any]:
        """Return the steps drawn."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps drawn."""
        self.step = state["step"]

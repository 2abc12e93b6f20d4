"""Log-probabilities of continuations, from packed passes of similar length and without logits that nobody asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gendistill.mixers.base import SequenceInfo
from gendistill.ops.types import Segments

Pair = tuple[Sequence[int], Sequence[int]]


class Reading(NamedTuple):
    """A sequence to read, and the pairs of which it has context and continuation.

    Attributes:
        token_ids: The longest of their inputs, which the others begin.
        pairs: By their number.
    """

    token_ids: tuple[int, ...]
    pairs: list[int]


def readings(pairs: Sequence[Pair]) -> list[Reading]:
    """Merge inputs that begin other inputs; the longest come first.

    The last token of a continuation is predicted and never read, so that answers of one token to one question are a
    single sequence.

    Args:
        pairs: Context and continuation of each.
    """
    inputs = [(*context, *continuation[:-1]) for context, continuation in pairs]
    found: list[Reading] = []
    # in descending order an input comes right behind one that it begins
    for number in sorted(range(len(pairs)), key=inputs.__getitem__, reverse=True):
        ids = inputs[number]
        if not found or found[-1].token_ids[: len(ids)] != ids:
            found.append(Reading(ids, []))
        found[-1].pairs.append(number)
    return sorted(found, key=lambda reading: len(reading.token_ids), reverse=True)


def passes(found: Sequence[Reading], most: int) -> Iterator[list[Reading]]:
    """Cut readings, in order, into passes of at most so many tokens; one that is longer is a pass of its own."""
    taken: list[Reading] = []
    room = most
    for reading in found:
        if taken and len(reading.token_ids) > room:
            yield taken
            taken, room = [], most
        taken.append(reading)
        room -= len(reading.token_ids)
    if taken:
        yield taken


class Pass(NamedTuple):
    """A pass on the device.

    Attributes:
        input_ids, position_ids: ``[1, N]`` int64.
        sequences: Its readings.
        places: ``[M]`` int64, of the tokens before those that are scored.
        targets: ``[M]`` int64, the tokens that are scored.
        pairs: Number and length of each continuation, in the order of ``targets``.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequences: SequenceInfo
    places: Tensor
    targets: Tensor
    pairs: list[tuple[int, int]]

    @classmethod
    def of(cls, taken: Sequence[Reading], pairs: Sequence[Pair], device: torch.device) -> Pass:
        """Lay readings end to end."""
        tokens: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        scored: list[tuple[int, int]] = []
        for reading in taken:
            for number in reading.pairs:
                context, continuation = pairs[number]
                first = len(tokens) + len(context) - 1
                places += range(first, first + len(continuation))
                targets += continuation
                scored.append((number, len(continuation)))
            tokens += reading.token_ids
            positions += range(len(reading.token_ids))

        def on_device(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)

        lengths = [len(reading.token_ids) for reading in taken]
        return cls(
            on_device(tokens)[None],
            on_device(positions)[None],
            SequenceInfo(Segments(lengths, device=device)),
            on_device(places),
            on_device(targets),
            scored,
        )

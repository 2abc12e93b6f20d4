"""A small keeper of pages, for the tests of paged attention: sequences that grow, their pages in no order."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from gendistill.ops.block import attend
from gendistill.ops.paged import PAGE, Pages, paged_attend
from gendistill.ops.types import Segments


class Inputs(NamedTuple):
    """What whole documents, end to end, give to attention."""

    qkv: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor

    def rows(self, index):
        """Return some of the tokens."""
        return self._replace(qkv=self.qkv[index], cos=self.cos[index], sin=self.sin[index])


def draw(lengths, *, H=4, KV=2, D=16, norm=True, dtype=torch.float64, device="cpu", seed=0):
    """Draw documents of these lengths; angles are those of positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    position = torch.cat([torch.arange(length) for length in lengths])
    angle = position[:, None] / 100 ** (torch.arange(D // 2, dtype=torch.float64) / D)
    angle = torch.cat([angle, angle], -1)
    weights = (1 + 0.2 * normal(D), 1 + 0.2 * normal(D)) if norm else (None, None)
    parts = (normal(sum(lengths), (H + 2 * KV) * D), *weights, angle.cos(), angle.sin())
    return Inputs(*(None if part is None else part.to(device, dtype) for part in parts))


def whole(inputs, lengths, *, heads, window=None, eps=1e-6):
    """Attend within whole documents, by the op of training."""
    segments = Segments(lengths, device=inputs.qkv.device)
    return attend(*inputs, heads=heads, eps=eps, window=window, segments=segments)


class Keeper:
    """Keep sequences in pages and attend to them, a few tokens at a time.

    Args:
        inputs, lengths: Whole documents; what is asked for is taken from them.
        heads, window, impl: Of attention.
        more: Columns of the table, more than the longest needs.
    """

    def __init__(self, inputs, lengths, *, heads, window=None, impl="reference", more=1, eps=1e-6, seed=0):
        self.inputs, self.lengths, self.heads = inputs, lengths, heads
        self.window, self.impl, self.eps = window, impl, eps
        device, dtype = inputs.qkv.device, inputs.qkv.dtype
        needed = [-(-length // PAGE) for length in lengths]
        # page 0 is a bin; every page number has a home, in no order
        numbers = [*range(1, 1 + sum(needed) + 3)]
        random.Random(seed).shuffle(numbers)
        self.table = torch.randint(0, len(numbers), (len(lengths), max(needed) + more)).int()
        for row, number in enumerate(needed):
            self.table[row, :number] = torch.tensor([numbers.pop() for _ in range(number)])
        shape = (2, 1 + sum(needed) + 3, PAGE, heads[1], inputs.qkv.shape[1] // (heads[0] + 2 * heads[1]))
        # what was never written must never be read
        self.keys, self.values = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.done = [0] * len(lengths)
        self.starts = [sum(lengths[:row]) for row in range(len(lengths))]
        self.out = torch.full((sum(lengths), heads[0] * shape[-1]), float("nan"), dtype=dtype, device=device)

    def index(self, row, number):
        """Return the places of a document's next tokens."""
        first = self.starts[row] + self.done[row]
        return range(first, first + number)

    def pages(self, rows, numbers, *, single=False):
        """Describe a call with the next so many tokens of some sequences; row -1 is without a sequence."""
        lengths, starts, cells, table = [], [0], [], []
        for row, number in zip(rows, numbers, strict=True):
            first = 0 if row < 0 else self.done[row]
            lengths.append(0 if row < 0 else first + number)
            starts.append(starts[-1] + number)
            table.append(self.table[row] if row >= 0 else torch.zeros_like(self.table[0]))
            for position in range(first, first + number):
                page = 0 if row < 0 else int(self.table[row, position // PAGE])
                cells.append(page * PAGE + position % PAGE)
        device = self.inputs.qkv.device
        return Pages(
            torch.stack(table).to(device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(cells, dtype=torch.int64, device=device),
            single,
        )

    def call(self, inputs, pages):
        """Attend, and return what was found."""
        return paged_attend(
            *inputs,
            self.keys,
            self.values,
            heads=self.heads,
            eps=self.eps,
            window=self.window,
            pages=pages,
            impl=self.impl,
        )

    def advance(self, rows, numbers, *, single=False):
        """Take the next so many tokens of some sequences, and keep what attention finds for them."""
        places = [
            [0] * number if row < 0 else self.index(row, number)
            for row, number in zip(rows, numbers, strict=True)
        ]
        index = torch.tensor([place for some in places for place in some], dtype=torch.int64)
        index = index.to(self.inputs.qkv.device)
        found = self.call(self.inputs.rows(index), self.pages(rows, numbers, single=single))
        start = 0
        for row, number in zip(rows, numbers, strict=True):
            if row >= 0:
                self.out[self.index(row, number)] = found[start : start + number]
                self.done[row] += number
            else:
                assert not found[start : start + number].any(), "a row without a sequence gives zeros"
            start += number

    def prefill(self, chunk, until=None):
        """Take all sequences in chunks that are shared by several of them, up to some tokens of each."""
        until = self.lengths if until is None else until
        while any(done < end for done, end in zip(self.done, until, strict=True)):
            room, rows, numbers = chunk, [], []
            for row, end in enumerate(until):
                number = min(room, end - self.done[row])
                if number:
                    rows.append(row)
                    numbers.append(number)
                    room -= number
            self.advance(rows, numbers)

    def decode(self, dead=0):
        """Take the rest token by token, a row each; those that are done, and some more, are without a sequence."""
        while any(done < length for done, length in zip(self.done, self.lengths, strict=True)):
            rows = [row if self.done[row] < length else -1 for row, length in enumerate(self.lengths)]
            rows += [-1] * dead
            self.advance(rows, [1] * len(rows), single=True)

"""Tables of tiles whose length depends on no sequence's, so that a launch that was recorded fits other sequences."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# tokens of a tile, of every kernel that cuts packed sequences up
TILE = 64


def num_tiles(lengths: Iterable[int]) -> int:
    """Count the tiles of sequences of these lengths; an empty one has none."""
    return sum(-(-length // TILE) for length in lengths)


def fill(entries: Tensor, number: int, dead: int) -> Tensor:
    """Append rows of ``dead`` until there are ``number``."""
    missing = number - entries.shape[0]
    if missing < 0:
        raise ValueError(f"the sequences have {entries.shape[0]} tiles, and there is room for {number}")
    return torch.cat([entries, entries.new_full((missing, *entries.shape[1:]), dead)])

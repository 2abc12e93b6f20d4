"""Tables of tiles whose length depends on no sequence's, so that a launch that was recorded fits other sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def most_tiles(tokens: int, sequences: int, size: int) -> int:
    """Bound the tiles of ``size`` tokens that so many sequences of any lengths have; an empty one may have one."""
    # one of l tokens has at most floor(l / size) + 1, and the floors add up to at most that of the sum
    return tokens // size + sequences


def fill(entries: Tensor, number: int, dead: int) -> Tensor:
    """Append rows of ``dead`` until there are ``number``."""
    missing = number - entries.shape[0]
    assert missing >= 0, f"{entries.shape[0]} entries do not fit in {number}"
    return torch.cat([entries, entries.new_full((missing, *entries.shape[1:]), dead)])

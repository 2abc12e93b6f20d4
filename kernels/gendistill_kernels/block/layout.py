"""How packed documents are cut up for attention, in words that torch alone understands: no triton here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gendistill_kernels.runtime.room import TILE, fill


class Tiles(NamedTuple):
    """Where the tiles of documents that lie end to end are.

    Attributes:
        places: ``[tiles, 3]`` int32 on the device: first query, first and one past the last token of its document;
            those with the most keys come first.
    """

    places: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Tiles:
        """Cut documents of these lengths; zero is allowed."""
        tiles, start = [], 0
        for length in lengths:
            tiles += [(start + first, start, start + length) for first in range(0, length, TILE)]
            start += length
        tiles.sort(key=lambda tile: tile[1] - tile[0])
        places = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3)
        return cls(places.to(device, non_blocking=True))

    def filled(self, tiles: int, documents: int, longest: int | None = None) -> Tiles:
        """Append dead tiles, of no query, until there are ``tiles``."""
        return Tiles(fill(self.places, tiles, 0))

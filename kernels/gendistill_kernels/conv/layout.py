"""How packed sequences are cut up, and what comes back, in words that torch alone understands: no triton here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gendistill_kernels.runtime.room import TILE, fill


class Tiles(NamedTuple):
    """Where the tiles of packed sequences are; all int32 on the device.

    Attributes:
        cu_seqlens: ``[N + 1]`` ends of the sequences.
        owners: ``[tiles]`` sequence of every tile.
        firsts: ``[tiles]`` its first token, counted from the start of the sequence.
    """

    cu_seqlens: Tensor | None
    owners: Tensor | None
    firsts: Tensor | None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Tiles:
        """Cut sequences of these lengths, laid end to end. One without tokens has a tile too: its state is copied."""
        ends, owners, firsts = [0], [], []
        for sequence, length in enumerate(lengths):
            parts = range(0, max(length, 1), TILE)
            owners.extend([sequence] * len(parts))
            firsts.extend(parts)
            ends.append(ends[-1] + length)
        return cls(
            *(
                torch.tensor(part, dtype=torch.int32).to(device, non_blocking=True)
                for part in (ends, owners, firsts)
            )
        )

    def filled(self, tiles: int, sequences: int, longest: int | None = None) -> Tiles:
        """Append dead tiles until there are ``tiles`` and one for every sequence, as if all were empty.

        A dead tile is one more of the last sequence, which must be empty: it copies the same state once more.
        """
        assert self.owners is not None
        assert self.firsts is not None
        number = tiles + sequences
        return self._replace(
            owners=fill(self.owners, number, sequences - 1), firsts=fill(self.firsts, number, 0)
        )


class Gradients(NamedTuple):
    """The gradients of the inputs, in their shapes and dtypes; None where there was no input."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None

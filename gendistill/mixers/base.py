"""What a mixer needs to know about its input, and what it remembers between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gendistill.ops.types import Segments


class MixerState(NamedTuple):
    """Hold what a linear mixer remembers of ``N`` sequences.

    Attributes:
        conv: ``[N, C, W - 1]`` last inputs of the short convolution, or None for a mixer without one.
        recurrent: ``[N, H, K, V]`` float32 memory.
        owned: Whether a mixer may write to these tensors instead of making new ones, as a cache allows. Only where no
            gradient is recorded.
    """

    conv: Tensor | None
    recurrent: Tensor
    owned: bool = False


class SequenceInfo:
    """Say which cells of a ``[B, T]`` grid are tokens and which tokens belong together.

    Args:
        segments: The sequences, in row-major order of their tokens.
        tokens: ``[num_tokens]`` int64, row-major index of every real token; None when every cell is one.
    """

    def __init__(self, segments: Segments, tokens: Tensor | None = None) -> None:
        self.segments = segments
        self.tokens = tokens

    @classmethod
    def from_mask(cls, mask: Tensor) -> SequenceInfo:
        """Drop padding: ``mask`` ``[B, T]`` is zero there. Each row stays one sequence, possibly empty."""
        kept = mask.bool()
        return cls(
            Segments(kept.sum(1).tolist(), device=mask.device), kept.flatten().nonzero(as_tuple=True)[0]
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> SequenceInfo:
        """Separate packed documents, given their ends ``[N + 1]`` in the row-major grid."""
        return cls(Segments.from_cu_seqlens(cu_seqlens))

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> SequenceInfo | None:
        """Separate documents wherever ``position_ids`` ``[B, T]`` do not count on; None when they always do."""
        length = position_ids.shape[1]
        starts = cls.document_starts(position_ids)
        if int(starts.sum()) == position_ids.shape[0]:
            return None
        first = starts.flatten().nonzero(as_tuple=True)[0]
        end = first.new_tensor([position_ids.shape[0] * length])
        return cls.from_cu_seqlens(torch.cat([first, end]))

    @staticmethod
    def document_starts(position_ids: Tensor) -> Tensor:
        """Mark, in ``[B, T]``, where ``position_ids`` do not count on from the cell before."""
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        return starts

    def gather(self, grid: Tensor) -> Tensor:
        """Take ``[B, T, ...]`` to ``[1, num_tokens, ...]``."""
        flat = grid.flatten(0, 1)
        return (flat if self.tokens is None else flat[self.tokens])[None]

    def scatter(self, packed: Tensor, batch: int, length: int) -> Tensor:
        """Take ``[1, num_tokens, ...]`` back to ``[B, T, ...]`` with zeros at padding."""
        flat = packed[0]
        if self.tokens is not None:
            flat = flat.new_zeros(batch * length, *flat.shape[1:]).index_copy(0, self.tokens, flat)
        return flat.unflatten(0, (batch, length))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[B, T, H, D]`` by position; ``cos`` and ``sin`` ``[B, T, D]`` hold each angle twice.

    Source: arXiv 2104.09864, in the half-split layout of Llama-family checkpoints.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, :, None].to(x.dtype) + turned * sin[:, :, None].to(x.dtype)

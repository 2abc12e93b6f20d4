"""The one unit of data that training, probing and the loss agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gendistill.mixers.base import SequenceInfo
from gendistill.ops import Segments
from gendistill.ops.types import UnknownLengths
from gendistill_kernels.runtime.room import num_tiles

IGNORE = -100
PADDING = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows of documents, with everything needed to keep the documents apart.

    Attributes:
        input_ids: ``[B, T]`` int64.
        labels: ``[B, T]`` int64, already shifted: ``labels[b, t]`` is the token that position ``t`` must
            predict, or ``IGNORE``. The last token of a document predicts nothing.
        position_ids: ``[B, T]`` int64, restarting at 0 with every document.
        segments: The documents in the row-major ``[B * T]`` order, their lengths known on the host. Row starts and
            the padding at a row's end are boundaries too.
        num_labels: Labels that count. Known without asking the device.
        num_tokens: Tokens that are not padding.
        document_ids: A number for every segment that its tokens alone decide (``document_id``), or ``PADDING``.
            What a teacher says about a document depends on nothing else. Empty for a batch made by hand.
        places: Positions that a loss takes, at least ``num_labels``; the surplus counts nothing. None: exactly those
            whose label counts.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: Segments
    num_labels: int
    num_tokens: int
    document_ids: tuple[int, ...] = ()
    places: int | None = None

    @property
    def cu_seqlens(self) -> Tensor:
        """``[N + 1]`` int32, document ends from 0 to ``B * T``."""
        return self.segments.cu_seqlens

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors to a device; a batch that is there already stays as it is, with its index tables."""
        names = ("input_ids", "labels", "position_ids")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        if all(moved[name] is getattr(self, name) for name in names):
            return self
        segments = Segments(self.segments.lengths, device=device, room=self.segments.room)
        return replace(self, **moved, segments=segments)


def with_room(batch: Batch) -> Batch:
    """Make the shapes of a batch those of many others: of all with as many rows and about as many documents and labels.

    At least one empty document is appended, and more up to a number of which there are few: multiples of 16 up to 64,
    of 32 up to 128, and so on, always of a quarter to a half, since empty ones cost nothing. Dead tiles of documents
    cost as much as others: there are 4 at most, or an eighth of up to 128, of more 16, or a thirty-second part.
    ``places`` is set to a sixteenth of the positions or a multiple of it, also where no label counts. Tokens, labels
    and what any document gives stay what they are. A batch with room stays as it is.
    """
    lengths = batch.segments.lengths
    if batch.segments.room:
        return batch
    least = len(lengths) + 1
    step = max(16, (1 << (least.bit_length() - 1)) // 2)
    tiles = num_tiles(lengths)
    size = 1 << (tiles.bit_length() - 1)
    room = _round_up(tiles, max(4, min(16, size // 8), size // 32))
    empty = _round_up(least, step) - len(lengths)
    positions = batch.labels.numel()
    return replace(
        batch,
        segments=Segments([*lengths, *[0] * empty], device=batch.segments.device, room=room),
        document_ids=batch.document_ids and (*batch.document_ids, *[PADDING] * empty),
        places=min(_round_up(max(batch.num_labels, 1), math.ceil(positions / 16)), positions),
    )


def without_surplus(batch: Batch) -> Batch:
    """Have a loss take only the positions whose label counts, where shapes need not be those of other batches."""
    return batch if batch.places is None else replace(batch, places=None)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class Unknown:
    """A number of a batch that the host does not know: whoever looks at it gets an error."""

    def _refuse(self, *_: object) -> Any:
        raise UnknownLengths

    __bool__ = __eq__ = __hash__ = __int__ = __index__ = __float__ = __lt__ = __le__ = __gt__ = __ge__ = (
        _refuse
    )


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Build the keyword arguments that isolate packed documents in teacher and student alike.

    Stock attention keeps packed documents apart only when positions restart, no attention mask is given and
    no cache is used; linear mixers take the same boundaries from ``sequences``, which no device has to be asked for.
    """
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": None,
        "use_cache": False,
        **boundaries(batch),
    }


def boundaries(batch: Batch) -> dict[str, Any]:
    """Build the keyword arguments that tell every kind of layer where documents end."""
    return {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "sequences": SequenceInfo(batch.segments),
    }

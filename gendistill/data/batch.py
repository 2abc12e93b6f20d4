"""The one unit of data that training, probing and the loss agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows of documents, with everything needed to keep the documents apart.

    Attributes:
        input_ids: ``[B, T]`` int64.
        labels: ``[B, T]`` int64, already shifted: ``labels[b, t]`` is the token that position ``t`` must
            predict, or ``IGNORE``. The last token of a document predicts nothing.
        position_ids: ``[B, T]`` int64, restarting at 0 with every document.
        cu_seqlens: ``[N + 1]`` int32, document ends in the row-major ``[B * T]`` order, from 0 to ``B * T``.
            Row starts and the padding at a row's end are boundaries too.
        num_labels: Labels that count. Known without asking the device.
        num_tokens: Tokens that are no padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    num_labels: int
    num_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors to a device."""
        move = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "labels", "position_ids", "cu_seqlens")
        }
        return Batch(**move, num_labels=self.num_labels, num_tokens=self.num_tokens)


def model_inputs(batch: Batch) -> dict[str, Tensor | bool | None]:
    """Build the keyword arguments that isolate packed documents in teacher and student alike.

    Stock attention keeps packed documents apart only when positions restart, no attention mask is given and
    no cache is used; linear mixers read the same boundaries from ``cu_seq_lens_q``.
    """
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": None,
        "use_cache": False,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
    }

"""Which cells of a batch are tokens and which tokens belong together: one rule for attention and linear layers.

Documents packed in a row are told apart by ``position_ids`` that restart. They come without an attention mask and
without a cache, beside which attention does not keep them apart; ``cu_seq_lens_q`` and ``cu_seq_lens_k`` may say the
same as the positions, which spares a search. What a mask leaves out changes no state and is seen by no token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from gendistill.mixers.base import SequenceInfo
from gendistill.models.configuration import HybridConfig
from gendistill.ops.types import Segments

_ATTENTION_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def layer_masks(
    config: HybridConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Make the mask of every kind of layer: what attention wants, and ``[B, T]`` or None for linear layers.

    Args:
        inputs_embeds: ``[B, T, ...]``, of which shape, dtype and device count.
        attention_mask: ``[B, past + T]``, zero at padding, or None.
        position_ids: ``[B, T]``; without mask and cache, attention separates documents where they restart.
    """
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    masks: dict[str, Any] = {}
    for word in dict.fromkeys(config.layer_types or []):
        if word in _ATTENTION_MASKS:
            masks[word] = _ATTENTION_MASKS[word](**arguments)
        else:
            masks[word] = None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
    return masks


def check_inputs(
    batch: int,
    length: int,
    attention_mask: Tensor | dict[str, Any] | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    *,
    has_linear: bool,
) -> None:
    """Refuse masks and positions whose shapes say something else than the input."""
    if position_ids is not None and position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids must be {[batch, length]} or {[1, length]}, got {list(position_ids.shape)}"
        )
    if attention_mask is None or isinstance(attention_mask, dict):
        return
    if len(attention_mask.shape) == 4:
        if has_linear:
            raise ValueError(
                "a linear layer cannot follow a 4-D attention_mask; pass [B, past + T] with zeros at padding, or a "
                'dictionary such as {"full_attention": that mask, "linear_attention": None}'
            )
        return
    seen = 0 if cache is None else cache.get_seq_length()
    # a static cache counts on the device
    if isinstance(seen, int) and attention_mask.shape != (batch, seen + length):
        raise ValueError(
            f"attention_mask must be {[batch, seen + length]}: {seen} cached positions and {length} new ones, got "
            f"{list(attention_mask.shape)}"
        )


def find_sequences(
    mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: list[Tensor],
    cache: Cache | None,
    *,
    batch: int,
    length: int,
) -> SequenceInfo | None:
    """Work out padding and packed documents of a ``[batch, length]`` grid.

    Args:
        mask: ``[B, T]``, zero at padding, or None.
        position_ids: ``[B, T]`` or ``[1, T]``; restarts mean packed documents. None counts on.
        cu_seqlens: Document ends ``[N + 1]`` in the row-major grid, each saying what ``position_ids`` say.
        cache: The cache in use.
    Returns: None when every row is one sequence without padding.
    Raises:
        ValueError: Documents are packed beside a mask or a cache, or described in two ways that differ.
    """
    restarts_possible = position_ids is not None and length > 1
    if mask is None and not cu_seqlens and not restarts_possible:
        return None
    if position_ids is not None:
        position_ids = position_ids.expand(batch, -1)
    return _read(mask, position_ids, cu_seqlens, cache, batch, length)


@torch.compiler.disable(
    reason="padding and packed documents are read on the host: leave them out of a full graph"
)
def _read(
    mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: list[Tensor],
    cache: Cache | None,
    batch: int,
    length: int,
) -> SequenceInfo | None:
    if cu_seqlens:
        _refuse_company(mask, cache, "cu_seq_lens_q says that documents are packed")
        return SequenceInfo(_segments(cu_seqlens, position_ids, batch, length))
    if mask is None and cache is None:
        assert position_ids is not None
        return SequenceInfo.from_position_ids(position_ids)
    device = mask.device if mask is not None else None
    yes, no = torch.tensor(True, device=device), torch.tensor(False, device=device)
    facts = [yes, yes, no] if mask is None else [(mask == 1).all(), ((mask == 0) | (mask == 1)).all(), no]
    if position_ids is not None and length > 1:
        facts[2] = _restarts(mask, position_ids).to(facts[0].device)
    # one question to the device
    is_whole, is_binary, restarts = torch.stack(facts).tolist()
    if not is_binary:
        raise ValueError(
            "attention_mask must hold ones at tokens and zeros at padding; to keep packed documents apart leave it "
            "out and pass position_ids that restart"
        )
    if restarts:
        _refuse_company(mask, cache, "position_ids restart inside a row: documents are packed")
    return None if mask is None or is_whole else SequenceInfo.from_mask(mask)


def check_sequences(
    sequences: SequenceInfo,
    mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    *,
    batch: int,
    length: int,
) -> SequenceInfo:
    """Take documents whose lengths the caller knows on the host, which the device then need not be asked for.

    Args:
        sequences: The documents of the ``[batch, length]`` grid; ``position_ids`` must restart where they do.
    Raises:
        ValueError: They come beside a mask or a cache, without positions, or do not fill the grid.
    """
    _refuse_company(mask, cache, "sequences say that documents are packed")
    if sequences.tokens is not None or sequences.segments.num_tokens != batch * length:
        raise ValueError(
            f"sequences must cover the {batch * length} cells of {batch} rows of {length}, got "
            f"{sequences.segments.num_tokens} tokens"
        )
    number = len(sequences.segments.lengths)
    if position_ids is None and number > batch:
        raise ValueError(
            f"{number} documents in {batch} rows need position_ids that restart where they do: attention tells them "
            "apart by these"
        )
    return sequences


def _restarts(mask: Tensor | None, position_ids: Tensor) -> Tensor:
    """Say whether a token's position does not lie behind those of all tokens before it in the row."""
    position_ids = position_ids.long()
    if mask is None:
        return (position_ids[:, 1:] <= position_ids[:, :-1]).any()
    real = mask.bool().to(position_ids.device)
    before = position_ids.masked_fill(~real, torch.iinfo(torch.int64).min).cummax(1).values[:, :-1]
    return (real[:, 1:] & (position_ids[:, 1:] <= before)).any()


def _refuse_company(mask: Tensor | None, cache: Cache | None, reason: str) -> None:
    for name, given, fix in (
        ("an attention mask", mask, "leave out attention_mask"),
        ("a cache", cache, "pass use_cache=False and no past_key_values"),
    ):
        if given is not None:
            raise ValueError(f"{reason}; attention does not keep them apart beside {name}: {fix}")


def _segments(cu_seqlens: list[Tensor], position_ids: Tensor | None, batch: int, length: int) -> Segments:
    """Read document ends, given once or twice, and compare them with the positions in one go."""
    first = cu_seqlens[0]
    for ends in cu_seqlens:
        if ends.dim() != 1 or ends.shape != first.shape or ends.shape[0] < 2 or ends.is_floating_point():
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k must be the same integers [N + 1], got shapes "
                f"{[list(part.shape) for part in cu_seqlens]} of {[str(part.dtype) for part in cu_seqlens]}"
            )
    if position_ids is None:
        position_ids = torch.arange(length, device=first.device).expand(batch, -1)
    starts = SequenceInfo.document_starts(position_ids).flatten()
    marked = starts[first[:-1].long().clamp(0, batch * length - 1).to(starts.device)]
    parts = [*cu_seqlens, marked, starts.sum()[None]]
    numbers = torch.cat([part.long().to(first.device) for part in parts]).tolist()
    size = first.shape[0]
    found, other = numbers[:size], numbers[size * (len(cu_seqlens) - 1) : size * len(cu_seqlens)]
    if found[0] != 0 or found[-1] != batch * length or any(b < a for a, b in pairwise(found)):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to {batch * length}, the cells of {batch} rows of {length}, got "
            f"{found[:8]}{'...' if size > 8 else ''}"
        )
    if other != found:
        raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q; pass the same ends, or position_ids only")
    *flags, number = numbers[size * len(cu_seqlens) :]
    filled = [flag for flag, (a, b) in zip(flags, pairwise(found), strict=True) if b > a]
    if number != len(filled) or not all(filled):
        raise ValueError(
            f"cu_seq_lens_q ends {len(filled)} documents where position_ids start {number}, or elsewhere; pass "
            "position_ids that start anew at every document, and leave out cu_seq_lens_q if in doubt"
        )
    return Segments([b - a for a, b in pairwise(found)], device=first.device)

"""Depthwise causal convolution over a few tokens, with a state and packed documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gendistill.ops.types import OpOutput, Segments


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "identity",
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> OpOutput:
    """Convolve every channel with its own ``W`` taps, in ``x.dtype``; as :func:`gendistill.ops.causal_conv`."""
    batch, length, channels = x.shape
    taps = weight.shape[-1]
    history = taps - 1
    number = batch if segments is None else len(segments.lengths)
    if state is None:
        state = x.new_zeros(number, channels, history)
    elif tuple(state.shape) != (number, channels, history):
        raise ValueError(f"state must have shape {(number, channels, history)}, got {tuple(state.shape)}")
    before = state.to(x.dtype).transpose(1, 2)
    if segments is None:
        extended = torch.cat([before, x], dim=1)
        out = _convolve(extended, weight, length)
        new_state = extended[:, length:].transpose(1, 2)
    else:
        if batch != 1 or segments.num_tokens != length:
            raise ValueError(
                f"packed input must be one row of {segments.num_tokens} tokens, got {batch} rows of {length}"
            )
        token, history_slots, last = segments.taps(history)
        flat = x.new_zeros(length + number * history, channels)
        flat = flat.index_copy(0, token, x[0]).index_copy(0, history_slots.flatten(), before.flatten(0, 1))
        # the slot of a token is the end of its window, so convolve everywhere and pick the tokens' slots
        out = _convolve(flat[None], weight, flat.shape[0] - history)[:, (token - history)]
        new_state = flat[last].transpose(1, 2)
    if bias is not None:
        out = out + bias.to(out.dtype)
    if activation == "silu":
        out = F.silu(out)
    elif activation != "identity":
        raise ValueError(f'activation must be identity or silu, got "{activation}"')
    return OpOutput(out, new_state)


def _convolve(extended: Tensor, weight: Tensor, length: int) -> Tensor:
    weight = weight.to(extended.dtype)
    out = extended[:, :length] * weight[:, 0]
    for tap in range(1, weight.shape[-1]):
        out = out + extended[:, tap : tap + length] * weight[:, tap]
    return out

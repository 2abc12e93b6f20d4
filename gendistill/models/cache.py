"""The cache of a hybrid student: keys and values where attention stayed, a fixed-size state elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from gendistill.mixers.base import MixerState
from gendistill.models.configuration import HybridConfig


class RecurrentLayer(LinearAttentionLayer):
    """Hold one linear layer's state and count its tokens, so that a cache without attention knows its length."""

    # transformers would otherwise compile the decoding of pure-linear students without being asked
    is_compileable = False
    keys = None
    values = None

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    def get_seq_length(self) -> int:
        """Positions seen, padding included."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask over this layer would cover."""
        return self.num_tokens + query_length, 0

    def tensors(self) -> list[Tensor]:
        """The tensors that the layer owns now."""
        states = (self.conv_states[0], self.recurrent_states[0])
        return [state for state in states if state is not None]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is not None:
                states[0] = states[0][indices.to(states[0].device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is not None:
                states[0] = states[0].repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.num_tokens = 0


class HybridCache(DynamicCache):
    """Cache any placement of mixers, pure-linear ones included.

    Args:
        config: The student's configuration.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config=config)
        self._config = config
        self.layers = [
            RecurrentLayer() if isinstance(layer, LinearAttentionLayer) else layer for layer in self.layers
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen by any layer; linear layers count theirs, so every index is allowed."""
        return self.layers[layer_idx].get_seq_length()  # pyright: ignore[reportAttributeAccessIssue]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for ``layer_idx`` covers."""
        return self.layers[layer_idx].get_mask_sizes(query_length)  # pyright: ignore[reportAttributeAccessIssue]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a recurrent state cannot forget its last tokens."""
        raise ValueError(
            f"cannot remove {tokens_to_remove} tokens: a linear mixer's state cannot be cropped; take a snapshot() "
            "before the tokens and restore() it"
        )

    def reset(self) -> None:
        """Forget everything, as if newly made."""
        self.__init__(self._config)

    def snapshot(self) -> list[Any]:
        """Copy the whole content, to be given to :meth:`restore` later, any number of times."""
        with torch.no_grad():
            return copy.deepcopy(self.layers)

    def restore(self, snapshot: list[Any]) -> None:
        """Return to the content at :meth:`snapshot`."""
        with torch.no_grad():
            self.layers = copy.deepcopy(snapshot)

    @property
    def nbytes(self) -> int:
        """Bytes of all cached tensors."""
        total = 0
        for layer in self.layers:
            owned = layer.tensors() if isinstance(layer, RecurrentLayer) else (layer.keys, layer.values)
            total += sum(tensor.numel() * tensor.element_size() for tensor in owned if tensor is not None)
        return total


def read_state(cache: Cache | None, layer_idx: int) -> MixerState | None:
    """Fetch a linear layer's state from any of transformers' caches; None before the first token.

    Raises:
        ValueError: The cache has no recurrent state at that layer.
    """
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, LinearAttentionLayer):
        kind = "no layer" if layer is None else type(layer).__name__
        raise ValueError(
            f"layer {layer_idx} is linear and needs a recurrent state, but this {type(cache).__name__} has {kind} "
            "there; make the cache with HybridCache(model.config)"
        )
    if not layer.has_previous_state[0]:
        return None
    recurrent = layer.recurrent_states[0]
    assert recurrent is not None
    return MixerState(layer.conv_states[0], recurrent, owned=True)


def write_state(cache: Cache | None, layer_idx: int, state: MixerState, num_positions: int) -> None:
    """Store a linear layer's new state after ``num_positions`` more positions."""
    if cache is None:
        return
    layer: Any = cache.layers[layer_idx]
    if state.conv is not None:
        cache.update_conv_state(state.conv, layer_idx)
    else:  # only the convolution's update marks the layer as used
        layer.has_previous_state[0] = True
        layer.device = state.recurrent.device
    cache.update_recurrent_state(state.recurrent, layer_idx)
    if isinstance(layer, RecurrentLayer):
        layer.num_tokens += num_positions

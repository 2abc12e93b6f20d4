"""The cache of a hybrid student: keys and values where attention stayed, a fixed-size state elsewhere."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from gendistill.mixers.base import ASIDE
from gendistill.models.configuration import HybridConfig

S = TypeVar("S", bound=Any)


class RecurrentLayer(LinearAttentionLayer):
    """The state of one mixer of ours and its count of tokens: a cache without attention still knows its length."""

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
        states = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in states if state is not None]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        for states in (self.conv_states, self.recurrent_states):
            for at, state in states.items():
                if state is not None:
                    states[at] = state[indices.to(state.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for states in (self.conv_states, self.recurrent_states):
            for at, state in states.items():
                if state is not None:
                    states[at] = state.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.num_tokens = 0


class HybridCache(DynamicCache):
    """A cache for any placement of mixers, pure-linear ones included.

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
        """Refuse: a state of fixed size cannot forget its last tokens."""
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


# transformers keeps inputs of a convolution apart from other tensors of fixed size
_CONV = "conv"


def read_state(cache: Cache | None, layer_idx: int, state_type: type[S]) -> S | None:
    """Fetch a mixer's state from any of transformers' caches; None before the first token.

    Raises:
        ValueError: The cache keeps no state at that layer.
    """
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, LinearAttentionLayer):
        kind = "no layer" if layer is None else type(layer).__name__
        raise ValueError(
            f"layer {layer_idx} has a mixer with a state of its own, but this {type(cache).__name__} has {kind} "
            "there; make the cache with HybridCache(model.config)"
        )
    if not layer.has_previous_state[0]:
        return None
    names = _names(state_type)
    found: dict[str, Any] = {name: layer.recurrent_states[at] for at, name in enumerate(names)}
    if _CONV in state_type._fields:
        found[_CONV] = layer.conv_states[0]
    return state_type(**found, owned=True)


def write_state(cache: Cache | None, layer_idx: int, state: Any, num_positions: int) -> None:
    """Store a mixer's new state after ``num_positions`` more positions."""
    if cache is None:
        return
    layer: Any = cache.layers[layer_idx]
    conv, names = getattr(state, _CONV, None), _names(type(state))
    _make_room(layer, len(names))
    if conv is not None:
        cache.update_conv_state(conv, layer_idx)
    else:  # only the convolution's update marks the layer as used
        layer.has_previous_state[0] = True
        layer.device = next(part.device for part in state if isinstance(part, Tensor))
    for at, name in enumerate(names):
        part = getattr(state, name)
        if part is not None:
            cache.update_recurrent_state(part, layer_idx, at)
        if at:
            layer.has_previous_state[at] = True
    if isinstance(layer, RecurrentLayer):
        layer.num_tokens += num_positions


def _names(state_type: type[Any]) -> list[str]:
    """Name the tensors of a state other than the inputs of a convolution, in order."""
    return [name for name in state_type._fields if name not in (_CONV, *ASIDE)]


def _make_room(layer: LinearAttentionLayer, number: int) -> None:
    """Let a layer hold so many tensors: configurations can ask transformers for one only."""
    for at in range(layer.number_of_states, number):
        for states in (layer.conv_states, layer.recurrent_states, layer.conv_kernel_size):
            states[at] = None
        for marks in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized):
            marks[at] = False
    layer.number_of_states = max(layer.number_of_states, number)

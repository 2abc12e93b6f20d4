"""The linear mixers as a decoder layer calls its attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gendistill.mixers.base import MixerState, SequenceInfo
from gendistill.mixers.kda import KDA
from gendistill.models.cache import read_state, write_state
from gendistill.models.configuration import HybridConfig
from gendistill.models.sequences import find_sequences

# settings that say how a mixer was converted, not how it computes
_CONVERSION_ONLY = ("init", "qk_norm")


class HybridKDA(KDA):
    """Answer the call that a decoder layer makes to its attention, with Kimi Delta Attention.

    Adds no level to parameter names: ``layers.3.self_attn.q_proj.weight`` stays what it was in the teacher.
    """

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        settings = dict((config.mixer_configs or {}).get("kda", {}))
        for name in _CONVERSION_ONLY:
            settings.pop(name, None)
        qkv_bias, output_bias = config.attention_biases
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            norm_eps=config.rms_norm_eps,
            impl=config.impl,
            initializer_range=config.initializer_range,
            **settings,
        )
        self.layer_idx = layer_idx

    def forward(  # the decoder layer's protocol instead of the plain mixer's
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        sequences: SequenceInfo | Literal["unknown"] | None = "unknown",
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Mix ``[B, T, hidden_size]``; the state is read from and written to ``past_key_values``.

        Args:
            sequences: What the model found out for all layers; ``unknown``: look at mask, positions and ends here.
        """
        batch, length = hidden_states.shape[:2]
        if isinstance(sequences, str):
            ends = [] if cu_seq_lens_q is None else [cu_seq_lens_q]
            sequences = find_sequences(
                attention_mask, position_ids, ends, past_key_values, batch=batch, length=length
            )
        state = read_state(past_key_values, self.layer_idx)
        settings = {"state": state, "position_embeddings": position_embeddings}
        if sequences is None:
            out, state = super().forward(hidden_states, **settings)
        else:
            out, state = self._mix_eagerly(hidden_states, sequences=sequences, **settings)
        write_state(past_key_values, self.layer_idx, state, length)
        return out, None

    # lengths of documents differ from batch to batch, and a compiler would compile the layer anew for each
    @torch.compiler.disable(reason="padding and packed documents are laid out on the host")
    def _mix_eagerly(self, *args: Any, **kwargs: Any) -> tuple[Tensor, MixerState]:
        return super().forward(*args, **kwargs)


LINEAR_LAYERS = {"kda": HybridKDA}

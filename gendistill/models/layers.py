"""The mixers of ours as a decoder layer calls its attention."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gendistill.anatomy.family import geometry_of
from gendistill.anatomy.mixers import mixer_class
from gendistill.anatomy.student import mixer_settings
from gendistill.mixers.base import Mixer, SequenceInfo, States
from gendistill.models.cache import read_state, write_state
from gendistill.models.configuration import HybridConfig
from gendistill.models.sequences import find_sequences

_Base = Mixer if TYPE_CHECKING else object


class AttentionCall(_Base):
    """The answer of a mixer to the call that a decoder layer makes to its attention.

    Adds no level to parameter names: ``layers.3.self_attn.q_proj.weight`` stays what it was in the teacher.
    """

    layer_idx: int

    def forward(  # the decoder layer's protocol instead of the plain mixer's
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        sequences: SequenceInfo | Literal["unknown"] | None = "unknown",
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        states: States | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Mix ``[B, T, hidden_size]``; the state is read from and written to ``past_key_values``, or to ``states``.

        Args:
            sequences: What the model found out for all layers; ``unknown``: look at mask, positions and ends here.
        """
        batch, length = hidden_states.shape[:2]
        if isinstance(sequences, str):
            ends = [] if cu_seq_lens_q is None else [cu_seq_lens_q]
            sequences = find_sequences(
                attention_mask, position_ids, ends, past_key_values, batch=batch, length=length
            )
        if states is not None:
            state = states.read(self.layer_idx)
        else:
            state = read_state(past_key_values, self.layer_idx, self.state_type)
        settings = {"state": state, "position_embeddings": position_embeddings}
        if sequences is None:
            out, state = super().forward(hidden_states, **settings)
        else:
            out, state = self._mix_eagerly(hidden_states, sequences=sequences, **settings)
        if states is not None:
            states.write(self.layer_idx, state)
        else:
            write_state(past_key_values, self.layer_idx, state, length)
        return out, None

    # lengths of documents differ from batch to batch, and a compiler would compile the layer anew for each
    @torch.compiler.disable(reason="padding and packed documents are laid out on the host")
    def _mix_eagerly(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return super().forward(*args, **kwargs)


@functools.cache
def _in_a_decoder(mixer: type[Mixer]) -> type[Any]:
    """Return the class of a mixer that answers a decoder layer's call."""
    return type(f"Hybrid{mixer.__name__}", (AttentionCall, mixer), {"__module__": __name__})


def make_mixer(config: HybridConfig, layer_idx: int) -> Mixer:
    """Make the mixer of a layer that does not keep its attention."""
    assert config.mixers is not None
    kind, plain = config.mixers[layer_idx], config.to_dict()
    layer = _in_a_decoder(mixer_class(kind)).of(
        geometry_of(plain), mixer_settings(plain, kind), impl=config.impl
    )
    layer.layer_idx = layer_idx
    return layer

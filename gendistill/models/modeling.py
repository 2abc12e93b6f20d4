"""The student as a Hugging Face model: the family's own decoder layers, with some mixers replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as weight_init
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from gendistill.mixers.base import SequenceInfo
from gendistill.mixers.init import initial_value
from gendistill.mixers.kda import KDA
from gendistill.models.cache import HybridCache, read_state, write_state
from gendistill.models.configuration import HybridConfig

_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "linear_attention": create_recurrent_attention_mask,
}
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
        sequences: SequenceInfo | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Mix ``[B, T, hidden_size]``; the state is read from and written to ``past_key_values``."""
        if sequences is None:
            sequences = find_sequences(attention_mask, position_ids, cu_seq_lens_q, past_key_values)
        state = read_state(past_key_values, self.layer_idx)
        out, state = super().forward(
            hidden_states, sequences=sequences, state=state, position_embeddings=position_embeddings
        )
        write_state(past_key_values, self.layer_idx, state, hidden_states.shape[1])
        return out, None


LINEAR_LAYERS = {"kda": HybridKDA}


def find_sequences(
    mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None, cache: Cache | None
) -> SequenceInfo | None:
    """Work out padding and packed documents from what transformers, TRL and our trainer pass.

    Args:
        mask: ``[B, T]``, zero at padding, or None.
        position_ids: ``[B, T]``; restarts mean packed documents when there is neither mask nor cache.
        cu_seqlens: ``[N + 1]`` document ends in the row-major grid; spares the search through ``position_ids``.
        cache: A cache in use; its rows are single sequences.
    Returns: None when every row is one sequence without padding.
    """
    if mask is not None and mask.dim() == 2:
        return SequenceInfo.from_mask(mask)
    if cache is not None:
        return None
    if cu_seqlens is not None:
        return SequenceInfo.from_cu_seqlens(cu_seqlens)
    if mask is None and position_ids is not None and position_ids.shape[1] > 1:
        return SequenceInfo.from_position_ids(position_ids)
    return None


class HybridPreTrainedModel(PreTrainedModel):
    """Hold what transformers needs to know about every hybrid student."""

    config: HybridConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": OutputRecorder(GradientCheckpointingLayer)}  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KDA):
            for name, parameter in module.named_parameters():
                spec = module._table[name]
                weight_init.copy_(parameter, initial_value(spec.init, spec.shape).to(parameter))


class HybridModel(HybridPreTrainedModel):
    """Run the decoder: embeddings, the family's layers with their mixers, the final norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        family: Any = MODEL_MAPPING[CONFIG_MAPPING[config.base_model_type]]
        base = family(config)
        self._no_split_modules = base._no_split_modules
        self.embed_tokens = base.embed_tokens
        self.layers = base.layers
        self.norm = base.norm
        self.rotary_emb = base.rotary_emb
        self.gradient_checkpointing = False
        for layer_idx in config.linear_layers:
            assert config.mixers is not None
            self.layers[layer_idx].self_attn = LINEAR_LAYERS[config.mixers[layer_idx]](config, layer_idx)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states ``[B, T, hidden_size]`` and the cache.

        Args:
            input_ids: ``[B, T]``; or give ``inputs_embeds`` ``[B, T, hidden_size]``.
            attention_mask: ``[B, T]`` or ``[B, past + T]``, zero at padding; or masks by layer type.
            position_ids: ``[B, T]``. Without mask and cache, restarts separate packed documents; ``cu_seq_lens_q``
                ``[N + 1]`` says where without a search.
            past_key_values: Cache to continue; made here when ``use_cache``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = HybridCache(self.config)
        self._check(past_key_values)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        layer_types = self.config.layer_types or []
        masks: dict[str, Any]
        if isinstance(attention_mask, dict):  # generate() prepares masks for static caches
            masks = attention_mask
        else:
            arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            masks = {word: _MASKS[word](**arguments) for word in dict.fromkeys(layer_types)}

        sequences = None
        if "linear_attention" in masks:  # once for all layers: it may ask the device for lengths
            # a 4-D mask already says what belongs together, but only to attention
            searched = position_ids if attention_mask is None else None
            sequences = find_sequences(
                masks["linear_attention"], searched, kwargs.get("cu_seq_lens_q"), past_key_values
            )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, word in zip(self.layers, layer_types, strict=True):
            extra = {**kwargs, "sequences": sequences} if word == "linear_attention" else kwargs
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[word],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **extra,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _check(self, cache: Cache | None) -> None:
        """Refuse caches and attention kernels that would give wrong results without saying so."""
        if isinstance(cache, QuantizedCache):
            raise ValueError(
                "a quantized cache cannot hold a linear mixer's state; use HybridCache(model.config)"
            )
        pure = set(self.config.layer_types or ()) == {"linear_attention"}
        if pure and cache is not None and not isinstance(cache, HybridCache):
            raise ValueError(
                f"a student without attention layers cannot use a {type(cache).__name__}, which counts tokens in "
                "attention layers only; use HybridCache(model.config)"
            )
        windowed = "swa" in (self.config.mixers or ()) and self.config.base_model_type in ("llama", "mistral")
        if windowed and "flash" in (self.config._attn_implementation or ""):
            raise ValueError(
                f'{self.config.base_model_type} passes no per-layer window to "{self.config._attn_implementation}"; '
                'load the student with attn_implementation="sdpa"'
            )


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """Predict the next token with a hybrid student."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits ``[B, kept, vocab_size]``; arguments as :meth:`HybridModel.forward`.

        Args:
            labels: ``[B, T]`` token ids, shifted here; -100 does not count.
            logits_to_keep: Positions from the end that get logits (0: all), or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as every transformers model does; refuses what a recurrent state cannot do."""
        settings = kwargs.get("generation_config")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if kwargs.get(name) is not None or getattr(settings, name, None) is not None:
                raise ValueError(
                    f"assisted decoding ({name}) needs a cache that can be cropped; a linear mixer's state cannot"
                )
        implementation = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
        pure = set(self.config.layer_types or ()) == {"linear_attention"}
        if implementation == "quantized" or (pure and implementation not in (None, "dynamic")):
            raise ValueError(
                f'cache_implementation="{implementation}" cannot hold this student\'s states; leave it out'
            )
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, which pages keys and values only."""
        raise ValueError(
            "continuous batching does not support linear mixers; use generate() with a padded batch"
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        prepare = super()._prepare_cache_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs["past_key_values"] = HybridCache(self.config)
        return result

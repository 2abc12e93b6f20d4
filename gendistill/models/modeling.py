"""The student as a Hugging Face model: the family's own decoder layers, with some mixers replaced."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as weight_init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, QuantizedCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.student import mixer_names
from gendistill.mixers.base import Mixer, SequenceInfo
from gendistill.models.cache import HybridCache
from gendistill.models.configuration import HybridConfig
from gendistill.models.generation import HybridGeneration
from gendistill.models.layers import make_mixer
from gendistill.models.sequences import check_inputs, check_sequences, find_sequences, layer_masks


class HybridPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every hybrid student."""

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
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(GradientCheckpointingLayer),
        # by name: the families' attention modules have no class in common
        "attentions": OutputRecorder(None, index=1, class_name=".self_attn"),  # pyright: ignore[reportArgumentType]
    }

    def __init__(self, config: HybridConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        names = mixer_names(config.to_dict(), lambda spec: spec.float32)
        # transformers looks for these expressions anywhere in the names of tensors
        self._keep_in_fp32_modules_strict = {rf"\b{re.escape(name)}$" for name in names}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):
            for name, parameter in module.named_parameters():
                weight_init.copy_(parameter, module.initial(name).to(parameter))


class HybridModel(HybridPreTrainedModel):
    """The decoder: embeddings, the family's layers with their mixers, the final norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        if config.hidden_act not in ACT2FN:
            raise ValueError(f'hidden_act "{config.hidden_act}" is unknown; allowed: {", ".join(ACT2FN)}')
        family: Any = MODEL_MAPPING[CONFIG_MAPPING[config.base_model_type]]
        base = family(config)
        self._no_split_modules = base._no_split_modules
        self.embed_tokens = base.embed_tokens
        self.layers = base.layers
        self.norm = base.norm
        self.rotary_emb = base.rotary_emb
        self.gradient_checkpointing = False
        for layer_idx in config.converted_layers:
            self.layers[layer_idx].self_attn = make_mixer(config, layer_idx)
        self.post_init()

    @can_return_tuple
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
            attention_mask: ``[B, past + T]``, zero at padding; or masks by layer type. Masked tokens change no state.
            position_ids: ``[B, T]`` or ``[1, T]``. Restarts separate packed documents; these come without mask and
                cache (``use_cache=False``). ``cu_seq_lens_q`` and ``cu_seq_lens_k``, ``[N + 1]`` ends in the row-major
                grid, may say the same without a search, and a ``SequenceInfo`` as ``sequences`` without the device.
            past_key_values: Cache to continue; made here when ``use_cache``.
            output_attentions: Also return the attentions of kept layers, ``[B, H, T, past + T]``, with None in place of
                linear ones. Needs ``attn_implementation="eager"``.
        Raises:
            ValueError: Inputs contradict each other, or the cache or attention kernel cannot give what they ask for.
        """
        outputs = self._run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if outputs.attentions is not None:
            found = iter(outputs.attentions)
            words = self.config.layer_types or []
            placed: Any = tuple(None if word == "linear_attention" else next(found) for word in words)
            outputs.attentions = placed
        return outputs

    @merge_with_config_defaults
    @capture_outputs
    def _run(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = HybridCache(self.config)
        self._check(past_key_values, kwargs.get("output_attentions", self.config.output_attentions))
        layer_types = self.config.layer_types or []
        given: SequenceInfo | None = kwargs.pop("sequences", None)
        masks, sequences = self._lay_out(
            inputs_embeds, attention_mask, position_ids, past_key_values, kwargs, given
        )
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
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

    def _lay_out(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
        given: SequenceInfo | None,
    ) -> tuple[dict[str, Any], SequenceInfo | None]:
        """Return the masks by layer type, and the sequences for all linear layers at once."""
        batch, length = inputs_embeds.shape[:2]
        words = self.config.layer_types or []
        check_inputs(
            batch, length, attention_mask, position_ids, cache, has_linear="linear_attention" in words
        )
        padding: Any = attention_mask
        if isinstance(attention_mask, dict):  # generate() prepares masks for static caches
            padding = attention_mask.get("linear_attention")
        elif attention_mask is not None:
            padding = attention_mask[:, -length:] if len(attention_mask.shape) == 2 else None
        ends = [kwargs[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k") if kwargs.get(name) is not None]
        if given is None:
            sequences = find_sequences(padding, position_ids, ends, cache, batch=batch, length=length)
        else:
            sequences = check_sequences(given, padding, position_ids, cache, batch=batch, length=length)
        if isinstance(attention_mask, dict):
            return attention_mask, sequences
        return layer_masks(self.config, inputs_embeds, attention_mask, cache, position_ids), sequences

    def _check(self, cache: Cache | None, output_attentions: bool | None) -> None:
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
        kernel = self.config._attn_implementation
        if output_attentions and len(self.config.converted_layers) < len(self.layers) and kernel != "eager":
            raise ValueError(
                f'output_attentions needs attention that keeps its weights, which "{kernel}" does not; load the '
                'student with attn_implementation="eager"'
            )
        kinds = [MIXERS[kind].layer_type for kind in self.config.mixers or ()]
        windowed = "sliding_attention" in kinds and self.config.base_model_type in ("llama", "mistral")
        if windowed and "flash" in (kernel or ""):
            raise ValueError(
                f'{self.config.base_model_type} passes no per-layer window to "{kernel}"; '
                'load the student with attn_implementation="sdpa"'
            )


# transformers looks for GenerationMixin among the direct bases
class GendistillForCausalLM(HybridPreTrainedModel, HybridGeneration, GenerationMixin):
    """A hybrid student that predicts the next token."""

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


# the name in students saved by earlier versions
HybridForCausalLM = GendistillForCausalLM

"""The student's configuration: the teacher's, flat, plus what each layer became."""

from __future__ import annotations

import copy
import os
from typing import Any

import transformers
from packaging.version import Version

LEAST_TRANSFORMERS = "5.17"
# before the imports that an older one lacks: this module is the first that a saved student's code imports
if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    raise ImportError(
        f"this model needs transformers {LEAST_TRANSFORMERS} or newer, {transformers.__version__} is installed; run: "
        f'pip install "transformers>={LEAST_TRANSFORMERS}"'
    )

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters  # noqa: E402

from gendistill.anatomy.family import FAMILIES  # noqa: E402
from gendistill.anatomy.full import FULL  # noqa: E402
from gendistill.anatomy.mixers import MIXERS  # noqa: E402
from gendistill.models.config_checks import check_fields, check_rope  # noqa: E402

LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")


@strict
class HybridConfig(PreTrainedConfig):
    """The configuration of a hybrid student.

    One flat object serves the family's modules, the cache and the masks. Fields of the family that are not declared
    here survive as attributes.

    Attributes:
        base_model_type: Family whose decoder layers are used: llama, mistral, qwen2 or qwen3.
        mixers: Kind of every layer, by its name in the catalogue of mixers: ``full``, ``swa``, ...
        mixer_configs: Settings per kind, as in the recipe's ``student.mixers``.
        layer_types: Transformers' word for every layer; follows from ``mixers`` when absent.
        impl: Implementation of the mixers that have several: ``auto``, ``reference`` or ``triton``.
    """

    model_type = "gendistill"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    base_model_type: str = "llama"
    mixers: list[str] | None = None
    mixer_configs: dict[str, Any] | None = None
    layer_types: list[str] | None = None
    impl: str = "auto"

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mixers is None:
            self.mixers = [FULL.kind] * self.num_hidden_layers
        if self.mixer_configs is None:
            self.mixer_configs = {}
        if self.layer_types is None:
            # what is unknown is refused below
            known = [MIXERS.get(mixer, FULL) for mixer in self.mixers]
            self.layer_types = [spec.layer_type for spec in known]
        self.validate_architecture()
        try:
            super().__post_init__(**kwargs)
            check_rope(self.rope_parameters, ROPE_INIT_FUNCTIONS)
            self.validate_rope()
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"rope_parameters must describe a rotary embedding that transformers knows, got "
                f"{self.rope_parameters!r}: {error}"
            ) from error

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the configuration; whoever loads it chooses the implementation, which is not part of the student."""
        stored = copy.deepcopy(self)
        stored.impl = "auto"
        super(HybridConfig, stored).to_json_file(json_file_path, use_diff)

    def validate_architecture(self) -> None:
        """Refuse layer lists that disagree; called whenever a configuration is made or saved."""
        check_fields(self)
        if self.base_model_type not in FAMILIES:
            raise ValueError(
                f'base_model_type "{self.base_model_type}" is not supported; allowed: {", ".join(FAMILIES)}'
            )
        for name, values, allowed in (
            ("mixers", self.mixers, tuple(MIXERS)),
            ("layer_types", self.layer_types, LAYER_TYPES),
        ):
            if len(values or ()) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} lists {len(values or ())} layers, the model has {self.num_hidden_layers}"
                )
            unknown = sorted(set(values or ()) - set(allowed))
            if unknown:
                raise ValueError(f"{name} holds {unknown}; allowed: {', '.join(allowed)}")
        for layer, (mixer, word) in enumerate(zip(self.mixers or (), self.layer_types or (), strict=True)):
            if MIXERS[mixer].replaces_attention != (word == "linear_attention"):
                raise ValueError(f'layer {layer} is "{mixer}" in mixers but "{word}" in layer_types')
        if "sliding_attention" in (self.layer_types or ()) and not self.sliding_window:
            raise ValueError("a sliding_attention layer needs sliding_window")

    @property
    def converted_layers(self) -> list[int]:
        """Indices of the layers whose attention is replaced by a mixer of ours."""
        return [index for index, kind in enumerate(self.mixers or ()) if MIXERS[kind].replaces_attention]

"""What the fields of a student's configuration may hold: a config.json may be broken by hand or by a crash."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.settings import read_settings

# far above any model; keeps a wrong number from filling the memory
_MOST_LAYERS, _LARGEST_SIZE = 1000, 2**31 - 1
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
_FLAGS = ("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias")
_WORDS = ("base_model_type", "hidden_act", "impl")
_IMPLS = ("auto", "reference", "triton")


def check_fields(config: Any) -> None:
    """Refuse fields of a wrong type or out of range, before anything is computed from them.

    Args:
        config: Holds the fields of a HybridConfig as attributes.
    Raises:
        ValueError: Names the field, what it holds and what is allowed.
    """
    _integer("num_hidden_layers", config.num_hidden_layers, 1, _MOST_LAYERS)
    for name in _SIZES:
        _integer(name, getattr(config, name), 1, _LARGEST_SIZE)
    for name in _OPTIONAL_SIZES:
        if getattr(config, name) is not None:
            _integer(name, getattr(config, name), 1, _LARGEST_SIZE)
    for name in _FLAGS:
        _require(isinstance(getattr(config, name), bool), name, getattr(config, name), "true or false")
    for name in _WORDS:
        _require(isinstance(getattr(config, name), str), name, getattr(config, name), "a word")
    _require(config.impl in _IMPLS, "impl", config.impl, " or ".join(_IMPLS))
    for name in ("rms_norm_eps", "initializer_range"):
        value = getattr(config, name)
        _require(_is_number(value) and value >= 0, name, value, "a number, 0 or more")
    dropout, pad = config.attention_dropout, config.pad_token_id
    _require(
        dropout is None or (_is_number(dropout) and 0 <= dropout <= 1), "attention_dropout", dropout, "0 to 1"
    )
    if pad is not None:
        _integer("pad_token_id", pad, -config.vocab_size, config.vocab_size - 1)
    heads = config.num_attention_heads
    groups = heads if config.num_key_value_heads is None else config.num_key_value_heads
    _require(heads % groups == 0, "num_key_value_heads", groups, f"a divisor of the {heads} attention heads")
    channels = config.hidden_size // heads if config.head_dim is None else config.head_dim
    _require(channels > 0 and channels % 2 == 0, "head_dim", channels, "an even number of channels")
    for name in ("mixers", "layer_types"):
        value = getattr(config, name)
        words = value is None or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value))
        _require(words, name, value, "a list with one word per layer")
    rope = config.rope_parameters
    _require(rope is None or isinstance(rope, Mapping), "rope_parameters", rope, "a dictionary")
    _check_mixer_configs(config.mixer_configs)


def check_rope(rope: Mapping[str, Any] | None, known: Collection[str]) -> None:
    """Refuse rotary settings, in transformers' present spelling, that no embedding can be made from.

    Raises:
        ValueError: Names what is allowed.
    """
    if not rope:
        return
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 1.0)
    right = isinstance(kind, str) and (kind == "default" or kind in known)
    _require(right, "rope_parameters.rope_type", kind, " or ".join(sorted({"default", *known})))
    _require(_is_number(theta) and theta > 0, "rope_parameters.rope_theta", theta, "a number above 0")


def _check_mixer_configs(configs: Any) -> None:
    _require(
        configs is None or isinstance(configs, Mapping), "mixer_configs", configs, "a dictionary by mixer"
    )
    kinds = {kind: spec.settings for kind, spec in MIXERS.items() if spec.settings is not None}
    for kind, given in (configs or {}).items():
        place, settings = f"mixer_configs.{kind}", kinds.get(kind)
        if settings is None:
            raise ValueError(
                f"mixer_configs must be settings of {' or '.join(sorted(kinds))}, got {kind!r:.77}"
            )
        _require(isinstance(given, Mapping), place, given, "a dictionary of settings")
        read_settings(settings, given, where=place)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(right, name, value, f"a whole number from {low:,} to {high:,}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(right: bool, name: str, value: Any, allowed: str) -> None:
    if not right:
        given = repr(value)
        raise ValueError(f"{name} must be {allowed}, got {given if len(given) < 80 else given[:77] + '...'}")

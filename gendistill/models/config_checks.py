"""What the fields of a student's configuration may hold: a config.json may be broken by hand or by a crash."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

# far above any model; keeps a wrong number from filling the memory
_MOST_LAYERS, _LARGEST_SIZE = 1000, 2**31 - 1
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
_FLAGS = ("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias")
_WORDS = ("base_model_type", "hidden_act", "impl")
_IMPLS = ("auto", "reference", "triton")
_GATES = {"bounded": ("log_uniform",), "softplus": ("log_uniform", "mamba", "slow", "g6")}
_CHOICES = {
    "conv_activation": ("identity", "silu"),
    "gate": tuple(_GATES),
    "decay_init": _GATES["softplus"],
    "output_gate": ("silu", "sigmoid", "none"),
    "qk_norm": ("fold", "drop"),
    "init": ("qkvo", "vo", "random"),
}
_KDA_FLAGS = ("conv_bias", "output_norm", "rope")
_KDA_RANKS = ("gate_rank", "output_gate_rank")
_KDA_SETTINGS = (*_CHOICES, *_KDA_FLAGS, *_KDA_RANKS, "conv_size", "gate_lower_bound", "half_life")


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
    for mixer, settings in (configs or {}).items():
        place = f"mixer_configs.{mixer}"
        _require(mixer in ("kda", "swa"), "mixer_configs", mixer, "settings of kda or swa")
        _require(isinstance(settings, Mapping), place, settings, "a dictionary of settings")
        if mixer == "kda":
            _check_kda(place, settings)
            continue
        for name, value in settings.items():
            _require(name == "window", place, name, "window")
            _integer(f"{place}.{name}", value, 1, _LARGEST_SIZE)


def _check_kda(place: str, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        where = f"{place}.{name}"
        _require(name in _KDA_SETTINGS, place, name, "settings among " + ", ".join(sorted(_KDA_SETTINGS)))
        if name in _CHOICES:
            _require(
                isinstance(value, str) and value in _CHOICES[name], where, value, " or ".join(_CHOICES[name])
            )
        elif name in _KDA_FLAGS:
            _require(isinstance(value, bool), where, value, "true or false")
        elif name in _KDA_RANKS:
            if value is not None:
                _integer(where, value, 1, _LARGEST_SIZE)
        elif name == "conv_size":
            _integer(where, value, 0, 16)
        elif name == "gate_lower_bound":
            _require(_is_number(value) and -20 <= value < 0, where, value, "a number from -20 to below 0")
        else:
            pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
            _require(
                pair and 0 < value[0] <= value[1], where, value, "[low, high] in tokens, 0 < low <= high"
            )
    gate, start = settings.get("gate", "bounded"), settings.get("decay_init", "log_uniform")
    _require(
        start in _GATES[gate], f"{place}.decay_init", start, f"{' or '.join(_GATES[gate])} with gate {gate}"
    )


def _integer(name: str, value: Any, low: int, high: int) -> None:
    right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(right, name, value, f"a whole number from {low:,} to {high:,}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(right: bool, name: str, value: Any, allowed: str) -> None:
    if not right:
        given = repr(value)
        raise ValueError(f"{name} must be {allowed}, got {given if len(given) < 80 else given[:77] + '...'}")

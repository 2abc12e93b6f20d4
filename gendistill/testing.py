"""Tiny random models for tests, the doctor and anyone who wants to try an idea in a second."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gendistill.models import HybridConfig, HybridForCausalLM

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PLACEMENTS = {
    "mixed": ["kda", "full", "kda", "full"],
    "attention first": ["full", "kda", "kda", "full"],
    "pure": ["kda", "kda", "kda", "kda"],
    "window": ["swa", "kda", "full", "kda"],
}
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny_teacher(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Make a random float32 transformer of 4 layers; ``overrides`` go to its configuration."""
    settings = {**_SIZES, "tie_word_embeddings": False, **overrides}
    if family == "mistral":
        settings.setdefault("sliding_window", None)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).float().eval()


def tiny_student(
    family: str = "llama",
    placement: str = "mixed",
    *,
    seed: int = 0,
    kda: dict[str, Any] | None = None,
    **overrides: Any,
) -> HybridForCausalLM:
    """Make a random float32 student.

    Weights are large enough that greedy text does not repeat one token, and convolutions and gates are moved away
    from their starting values, where they would do nothing.

    Args:
        family: llama, mistral, qwen2 or qwen3.
        placement: A name in ``PLACEMENTS``.
        seed: Of the weights.
        kda: Settings of the KDA layers.
        overrides: Other fields of the configuration.
    """
    mixers = PLACEMENTS[placement]
    settings = {
        **_SIZES,
        "base_model_type": family,
        "mixers": mixers,
        "mixer_configs": {"kda": {"half_life": [1.0, 64.0], **(kda or {})}},
        "sliding_window": 6 if "swa" in mixers else None,
        **overrides,
    }
    torch.manual_seed(seed)
    model = HybridForCausalLM(HybridConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv1d" in name or name.endswith(("dt_bias", "A_log", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model

"""Tiny random models for tests, the doctor and anyone who wants to try an idea in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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


def save_tiny_checkpoint(
    folder: Path, family: str = "qwen3", *, vocab_size: int = 260, **overrides: Any
) -> Path:
    """Save a random teacher with a tokenizer of single bytes and a chat template; ``overrides`` as above.

    Returns: ``folder``.
    """
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = tiny_teacher(family, vocab_size=vocab_size, eos_token_id=2, **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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

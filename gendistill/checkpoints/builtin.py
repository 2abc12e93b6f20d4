"""The tiny random teacher that ``builtin:tiny`` names, made where it is asked for: no download, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from gendistill.checkpoints.tensors import SINGLE_NAME
from gendistill.errors import CheckpointError
from gendistill.paths import cache_dir, new_folder

PREFIX = "builtin:"
_FORMAT = 1  # raise it when the teacher changes, so that cached folders are made anew
TINY_SIZES: dict[str, Any] = {
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


def builtin_checkpoint(name: str, *, where: str) -> Path:
    """Return the folder of a built-in teacher, made in the cache folder on the first call.

    Args:
        name: What follows ``builtin:``.
        where: Name of the setting, for errors.
    Raises:
        CheckpointError: There is none of this name.
    """
    if name != "tiny":
        raise CheckpointError(
            f'there is no built-in model "{name}"; there is: tiny', where=where, hint=f"write {PREFIX}tiny"
        )
    folder = cache_dir() / "builtin" / f"{name}-v{_FORMAT}"
    if not folder.is_dir():
        with new_folder(folder) as partial, torch.random.fork_rng(devices=[]):
            save_tiny_checkpoint(partial)
    return folder


def tiny_teacher(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Make a random float32 transformer of 4 layers; ``overrides`` go to its configuration."""
    settings = {**TINY_SIZES, "tie_word_embeddings": False, **overrides}
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
    # model.save_pretrained() writes on the first of several processes only, and each machine has a cache of its own
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    # tied ones once
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_file(weights, folder / SINGLE_NAME, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder

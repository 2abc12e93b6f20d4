"""Read config.json: what it must not ask for, sizes that a model can have, and the defaults of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gendistill.anatomy.family import FAMILIES
from gendistill.errors import CheckpointError
from gendistill.paths import check_shape, read_json

_MAX_BYTES = 1 << 24
# the largest that is believed: a typing error must not make anybody allocate terabytes
_SIZES = {
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 26,
    "vocab_size": 1 << 28,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 20,
    "max_position_embeddings": 1 << 48,
}
# entries that transformers does not check for every family
_UNCHECKED = {"sliding_window": 1 << 48, "num_labels": 1 << 20}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def library_errors() -> tuple[type[Exception], ...]:
    """List what transformers, torch and safetensors raise for files that they cannot use."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    builtin = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)
    return (*builtin, AssertionError, ImportError, StrictDataclassError, SafetensorError)


def first_line(error: BaseException) -> str:
    """Return what an error says in one line, with its name where the text alone says little."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {lines[0]}"


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """Read the config of a checkpoint folder, with all defaults filled in and old spellings brought up to date.

    Args:
        folder: Holds config.json.
        where: Name of the setting, for errors.
    Raises:
        CheckpointError: No config, a broken one, one that asks for code or files from elsewhere, or sizes that no
            model can have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a checkpoint folder",
            where=where,
            hint="point to the folder that holds config.json and model.safetensors",
        )
    if path.stat().st_size > _MAX_BYTES:
        raise _unusable(path, f"it has {path.stat().st_size:,} bytes; a config has a few thousand", where)
    try:
        raw = read_json(path, error=CheckpointError, hint="", shape=dict[str, Any])
    except CheckpointError as error:
        raise _unusable(path, error.message, where) from error
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise _unusable(path, f"model_type must be a text such as llama, got {family!r:.40}", where)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), which names another model to be put on",
            where=where,
            hint="merge the adapter into its model and save that, or delete adapter_config.json in a copy",
        )
    _check_requests(folder, raw, where)
    _check_numbers(path, raw, where)
    _check_generation(folder / "generation_config.json")
    config = _with_defaults(path, family, where)
    _check_layers(path, config, where)
    return config


def _unusable(path: Path, reason: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a model config: {reason}", where=where, hint="correct the file, or download it again"
    )


def _check_requests(folder: Path, raw: dict[str, Any], where: str) -> None:
    quantised = raw.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{folder} is quantised ({method or 'unknown method'})",
            where=where,
            hint="use the checkpoint it was made from; GGUF files are the one quantised format that is read",
        )
    if "transformers_weights" in raw:
        reason = "transformers_weights names another file with weights; model.safetensors is read"
        raise _unusable(folder / "config.json", reason, where)
    for name in _IMPLEMENTATIONS:
        value = raw.get(name)
        chosen = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(each, str) and "/" in each for each in chosen):
            reason = f"{name} names code of another repository; code from a checkpoint is never run"
            raise _unusable(folder / "config.json", reason, where)


def _check_numbers(path: Path, raw: dict[str, Any], where: str) -> None:
    for name, largest in _SIZES.items():
        value = raw.get(name)
        # transformers refuses what is not a number
        if isinstance(value, int | float) and (type(value) is not int or not 1 <= value <= largest):
            raise _unusable(
                path, f"{name} must be a whole number from 1 to {largest:,}, got {value!r:.40}", where
            )
    for name, largest in _UNCHECKED.items():
        value = raw.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise _unusable(
                path, f"{name} must be a whole number from 1 to {largest:,}, got {value!r:.40}", where
            )
    for place in (raw, *(raw.get(name) for name in _ROPE)):
        if not isinstance(place, dict):
            continue
        for name in _ROPE_NUMBERS:
            value = place.get(name)
            if value is not None and (type(value) not in (int, float) or value <= 0):
                raise _unusable(path, f"{name} must be a number above 0, got {value!r:.40}", where)


def _check_generation(path: Path) -> None:
    if not path.is_file():
        return
    hint = "correct the file, or download it again"
    content = read_json(path, shape=dict[str, Any], error=CheckpointError, hint=hint)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_shape(
            content.get(name),
            int | list[int] | None,
            error=CheckpointError,
            where=f"{path}: {name}",
            hint=hint,
        )


def _check_layers(path: Path, config: dict[str, Any], where: str) -> None:
    if config.get("return_dict") is False:
        raise _unusable(path, "return_dict must be true", where)
    words = config.get("layer_types")
    if config["model_type"] not in FAMILIES or not isinstance(words, list):
        return
    unknown = [word for word in words if word not in _LAYER_TYPES]
    if unknown:
        reason = f"layer_types holds {unknown[0]!r:.40}; allowed: {', '.join(_LAYER_TYPES)}"
        raise _unusable(path, reason, where)
    if "sliding_attention" in words and not config.get("sliding_window"):
        raise _unusable(path, "layer_types has sliding_attention, but there is no sliding_window", where)


def _with_defaults(path: Path, family: str, where: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING, AutoConfig

    if family == "gendistill":
        import gendistill.models  # noqa: F401  registers the class
    elif family not in CONFIG_MAPPING:
        raise CheckpointError(
            f'the model family "{family:.80}" is unknown to transformers; code from a checkpoint is never run',
            where=where,
            hint="use a checkpoint of the families llama, mistral, qwen2 or qwen3",
        )
    try:
        return AutoConfig.from_pretrained(
            path.parent, trust_remote_code=False, local_files_only=True
        ).to_dict()
    except library_errors() as error:
        raise CheckpointError(
            f"transformers cannot read {path}: {first_line(error)}", where=where, hint="correct the file"
        ) from error

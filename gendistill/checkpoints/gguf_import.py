"""Dequantise a GGUF file into a float32 safetensors folder, once.

Float32, because a student trains from float32 masters: rounding the already rounded weights once more gains nothing
but disk space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from transformers import CONFIG_MAPPING, GenerationConfig

from gendistill.checkpoints.config_file import first_line, library_errors
from gendistill.checkpoints.gguf_file import GGUFHeader, GGUFTensor, read_gguf_header
from gendistill.checkpoints.gguf_tokenizer import build_tokenizer, token_id
from gendistill.checkpoints.progress import byte_progress
from gendistill.checkpoints.tensors import NewTensor, write_shards
from gendistill.checkpoints.tokenizer import tokenizer_errors
from gendistill.errors import CheckpointError
from gendistill.paths import library_writing

# architecture in the file: (transformers family, class). Mistral is written as "llama", which computes the same.
_FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# as for config.json: what is larger is a broken file
_MAX_SIZE = 1 << 28
_LARGEST = {"block_count": 10_000, "context_length": 1 << 48}
_BLOCK_ELEMENTS = 1 << 22  # dequantised at once: 16 MiB of float32
_MAX_SHARD_BYTES = 4_000_000_000


def convert_gguf(path: Path, folder: Path) -> None:
    """Fill an empty folder with config, float32 weights, tokenizer and generation config.

    Raises:
        CheckpointError: Unsupported architecture, RoPE scaling, tensor or tokenizer; a truncated file.
    """
    header = _without_tied_head(read_gguf_header(path))
    config = _config(header)
    architecture = header.metadata["general.architecture"]
    names = {_hf_name(name, header): name for name in header.tensors}
    entries = [NewTensor(name, header.tensors[source].shape, "F32") for name, source in names.items()]
    _check_size(header)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    with tokenizer_errors(path):
        tokenizer = build_tokenizer(header)
    with library_writing():
        tokenizer.save_pretrained(folder)
    with byte_progress(f"dequantising {path.name}", sum(entry.num_bytes for entry in entries)) as advance:
        write_shards(
            folder,
            entries,
            lambda entry: _values(
                data,
                names[entry.name],
                header,
                _row_order(entry.name, entry.shape[0], architecture, config),
            ),
            max_shard_bytes=_MAX_SHARD_BYTES,
            on_bytes=advance,
        )
    family, model_class = _FAMILIES[architecture]
    try:
        CONFIG_MAPPING[family](**config, architectures=[model_class], dtype="float32").save_pretrained(folder)
        _generation_config(header).save_pretrained(folder)
    except library_errors() as error:
        raise _unsupported(
            header, f"describes no model that transformers knows: {first_line(error)}"
        ) from error


def _without_tied_head(header: GGUFHeader) -> GGUFHeader:
    """Leave out a head that is stored twice: byte for byte the embeddings."""
    head, embeddings = header.tensors.get("output.weight"), header.tensors.get("token_embd.weight")
    if (
        head is None
        or embeddings is None
        or (head.shape, head.type_id) != (embeddings.shape, embeddings.type_id)
    ):
        return header
    _check_size(header)
    data = np.memmap(header.path, dtype=np.uint8, mode="r")
    num_bytes, step = tensor_bytes(head), 1 << 24
    for start in range(0, num_bytes, step):
        end = min(start + step, num_bytes)
        one, other = (data[tensor.start + start : tensor.start + end] for tensor in (head, embeddings))
        if not np.array_equal(one, other):
            return header
    return replace(
        header, tensors={name: each for name, each in header.tensors.items() if name != "output.weight"}
    )


def _unsupported(header: GGUFHeader, what: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path.name} {what}", where=str(header.path), hint="use the original safetensors checkpoint"
    )


def _hf_name(name: str, header: GGUFHeader) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{suffix}"
    raise _unsupported(header, f"holds a tensor that is not understood: {name}")


def _config(header: GGUFHeader) -> dict[str, Any]:
    """Translate the metadata to the words of the transformers config."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise _unsupported(
            header, f'has the architecture "{architecture!s:.80}"; supported: {", ".join(_FAMILIES)}'
        )
    values = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    if values.get("expert_count"):
        raise _unsupported(header, "is a mixture of experts; dense models are supported")
    if values.get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in header.tensors:
        raise _unsupported(header, "scales its rotary positions, which the file does not describe completely")
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None:
        raise _unsupported(header, "lacks token_embd.weight")

    def size(key: str, default: int | None = None) -> int:
        value = values.get(key, default)
        if value is None:
            raise _unsupported(header, f"lacks {key}")
        if type(value) is not int or not 1 <= value <= _LARGEST.get(key, _MAX_SIZE):
            raise _unsupported(header, f"gives {value!r:.40} as {key}; a whole number from 1 is needed")
        return value

    num_heads, hidden_size = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", max(1, hidden_size // num_heads))
    epsilon = _positive(header, values, "attention.layer_norm_rms_epsilon", largest=1.0)
    config = {
        "hidden_size": hidden_size,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        # seven digits give back the number that was rounded to float32
        "rms_norm_eps": float(f"{epsilon:.7g}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _positive(header, values, "rope.freq_base", 10_000.0, largest=1e15),
        },
        "max_position_embeddings": size("context_length"),
        "vocab_size": embeddings.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": token_id(header, "bos"),
        "eos_token_id": token_id(header, "eos"),
        "pad_token_id": token_id(header, "padding"),
    }
    if values.get("rope.dimension_count", head_dim) != head_dim:
        raise _unsupported(header, "rotates only a part of each head")
    if architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    return config


def _positive(
    header: GGUFHeader, values: dict[str, Any], key: str, default: float | None = None, *, largest: float
) -> float:
    value = values.get(key, default)
    if value is None:
        raise _unsupported(header, f"lacks {key}")
    if type(value) not in (int, float) or not 0 < value <= largest:
        raise _unsupported(header, f"gives {value!r:.40} as {key}; a number from 0 to {largest:g} is needed")
    return float(value)


def _generation_config(header: GGUFHeader) -> GenerationConfig:
    ids = [token_id(header, name) for name in ("eos", "eot")]
    stops = list(dict.fromkeys(index for index in ids if index is not None))
    return GenerationConfig(
        bos_token_id=token_id(header, "bos"),
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=token_id(header, "padding"),
    )


def _check_size(header: GGUFHeader) -> None:
    size = header.path.stat().st_size
    for name, tensor in header.tensors.items():
        try:
            block, _ = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
        except (ValueError, KeyError) as error:
            raise _unsupported(header, f"stores {name} in an unknown type ({tensor.type_id})") from error
        if tensor.shape[-1] % block:
            raise _unsupported(
                header, f"stores {name} in blocks of {block}, but its rows have {tensor.shape[-1]} values"
            )
        num_bytes = tensor_bytes(tensor)
        if tensor.start + num_bytes > size:
            raise CheckpointError(
                f"{header.path.name} is truncated: {name} ends after the {size:,} bytes of the file",
                where=str(header.path),
                hint="delete it and download it again",
            )


def tensor_bytes(tensor: GGUFTensor) -> int:
    """Length of a tensor's values in the file."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    return math.prod(tensor.shape) // block * block_bytes


def _row_order(name: str, num_rows: int, architecture: str, config: dict[str, Any]) -> np.ndarray | None:
    """Undo the interleaving of rotary pairs that llama files have in the rows of q and k.

    Qwen files keep the two halves of a head apart, as transformers does.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    module = name.split(".")[-2]
    if architecture != "llama" or module not in heads:
        return None
    if num_rows % (2 * heads[module]):
        raise CheckpointError(
            f"{name} has {num_rows:,} rows, which {heads[module]:,} heads of pairs cannot share",
            where=name,
            hint="use the original safetensors checkpoint",
        )
    return np.arange(num_rows).reshape(heads[module], -1, 2).swapaxes(1, 2).reshape(-1)


def _values(data: np.ndarray, name: str, header: GGUFHeader, order: np.ndarray | None) -> Iterator[bytes]:
    """Dequantise block by block of rows. Rows are quantised one by one, so they can be reordered first."""
    tensor = header.tensors[name]
    kind = GGMLQuantizationType(tensor.type_id)
    num_bytes = tensor_bytes(tensor)
    raw = data[tensor.start : tensor.start + num_bytes].reshape(tensor.shape[0], -1)
    step = max(1, _BLOCK_ELEMENTS // math.prod(tensor.shape[1:]))
    for start in range(0, tensor.shape[0], step):
        rows = raw[start : start + step] if order is None else raw[order[start : start + step]]
        try:
            values = np.asarray(dequantize(rows, kind), dtype="<f4")
        except NotImplementedError as error:
            raise _unsupported(header, f"stores {name} as {kind.name}, which cannot be read") from error
        if not np.isfinite(values).all():
            raise _unsupported(header, f"holds values in {name} that are not finite")
        yield values.tobytes()

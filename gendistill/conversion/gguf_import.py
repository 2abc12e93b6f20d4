"""Dequantise a GGUF file into a float32 safetensors folder, once.

Float32, because a student trains from float32 masters: rounding the already rounded weights once more gains nothing
but disk space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from transformers import CONFIG_MAPPING, GenerationConfig

from gendistill.conversion.gguf_file import GGUFHeader, GGUFTensor, read_gguf_header
from gendistill.conversion.gguf_tokenizer import build_tokenizer
from gendistill.conversion.progress import byte_progress
from gendistill.conversion.tensors import NewTensor, write_shards
from gendistill.errors import CheckpointError

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
    build_tokenizer(header).save_pretrained(folder)
    with byte_progress(f"dequantising {path.name}", sum(entry.num_bytes for entry in entries)) as advance:
        write_shards(
            folder,
            entries,
            lambda entry: _values(
                data,
                header.tensors[names[entry.name]],
                _row_order(entry.name, entry.shape[0], architecture, config),
            ),
            max_shard_bytes=_MAX_SHARD_BYTES,
            on_bytes=advance,
        )
    family, model_class = _FAMILIES[architecture]
    CONFIG_MAPPING[family](**config, architectures=[model_class], dtype="float32").save_pretrained(folder)
    _generation_config(header).save_pretrained(folder)


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
    if architecture not in _FAMILIES:
        raise _unsupported(
            header, f'has the architecture "{architecture}"; supported: {", ".join(_FAMILIES)}'
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
    try:
        num_heads, hidden_size = values["attention.head_count"], values["embedding_length"]
        head_dim = values.get("attention.key_length", hidden_size // num_heads)
        config = {
            "hidden_size": hidden_size,
            "intermediate_size": values["feed_forward_length"],
            "num_hidden_layers": values["block_count"],
            "num_attention_heads": num_heads,
            "num_key_value_heads": values.get("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            # seven digits give back the number that was rounded to float32
            "rms_norm_eps": float(f"{values['attention.layer_norm_rms_epsilon']:.7g}"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": float(values.get("rope.freq_base", 10_000.0)),
            },
            "max_position_embeddings": values["context_length"],
            "vocab_size": header.tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
        }
    except KeyError as error:
        raise _unsupported(header, f"lacks {error}") from error
    if values.get("rope.dimension_count", head_dim) != head_dim:
        raise _unsupported(header, "rotates only a part of each head")
    if architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    return config


def _generation_config(header: GGUFHeader) -> GenerationConfig:
    ids = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    stops = list(dict.fromkeys(index for index in ids if index is not None))
    return GenerationConfig(
        bos_token_id=header.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=header.metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _check_size(header: GGUFHeader) -> None:
    size = header.path.stat().st_size
    for name, tensor in header.tensors.items():
        try:
            num_bytes = tensor_bytes(tensor)
        except (ValueError, KeyError) as error:
            raise _unsupported(header, f"stores {name} in an unknown type ({tensor.type_id})") from error
        if tensor.start + num_bytes > size:
            raise CheckpointError(
                f"{header.path.name} is truncated: {name} ends after the {size:,} bytes of the file",
                where=str(header.path),
                hint="delete it and download it again",
            )


def tensor_bytes(tensor: GGUFTensor) -> int:
    """Length of a tensor's values in the file."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    return int(np.prod(tensor.shape, dtype=np.int64)) // block * block_bytes


def _row_order(name: str, num_rows: int, architecture: str, config: dict[str, Any]) -> np.ndarray | None:
    """Undo the interleaving of rotary pairs that llama files have in the rows of q and k.

    Qwen files keep the two halves of a head apart, as transformers does.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    module = name.split(".")[-2]
    if architecture != "llama" or module not in heads:
        return None
    return np.arange(num_rows).reshape(heads[module], -1, 2).swapaxes(1, 2).reshape(-1)


def _values(data: np.ndarray, tensor: GGUFTensor, order: np.ndarray | None) -> Iterator[bytes]:
    """Dequantise block by block of rows. Rows are quantised one by one, so they can be reordered first."""
    kind = GGMLQuantizationType(tensor.type_id)
    num_bytes = tensor_bytes(tensor)
    raw = data[tensor.start : tensor.start + num_bytes].reshape(tensor.shape[0], -1)
    row_elements = int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, _BLOCK_ELEMENTS // row_elements)
    for start in range(0, tensor.shape[0], step):
        rows = raw[start : start + step] if order is None else raw[order[start : start + step]]
        yield np.asarray(dequantize(rows, kind), dtype="<f4").tobytes()

"""Whatever a GGUF file holds, the answer is a checkpoint or one clear error, and no more memory than the file needs."""

import os
import resource
import struct

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from gendistill.checkpoints.resolve import load_causal_lm, load_tokenizer, resolve_checkpoint
from gendistill.errors import CheckpointError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LAYOUTS = {U8: "B", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
TOKENS = ["<|pad|>", "<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
HIDDEN, INNER, HEADS = 8, 12, 2
METADATA = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, HIDDEN),
    "llama.feed_forward_length": (U32, INNER),
    "llama.attention.head_count": (U32, HEADS),
    "llama.attention.head_count_kv": (U32, HEADS),
    "llama.attention.key_length": (U32, HIDDEN // HEADS),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 1e4),
    "llama.rope.dimension_count": (U32, HIDDEN // HEADS),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "smollm"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
    "tokenizer.ggml.token_type": (ARRAY, (I32, [3] * 3 + [1] * (len(TOKENS) - 3))),
    "tokenizer.ggml.merges": (ARRAY, (STRING, ["h e"])),
    "tokenizer.ggml.bos_token_id": (U32, 1),
    "tokenizer.ggml.eos_token_id": (U32, 2),
    "tokenizer.ggml.padding_token_id": (U32, 0),
    "tokenizer.ggml.add_bos_token": (BOOL, False),
    "tokenizer.chat_template": (STRING, "{{ messages[0]['content'] }}"),
}
SHAPES = {
    "token_embd.weight": (len(TOKENS), HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    **{f"blk.0.attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")},
    "blk.0.ffn_gate.weight": (INNER, HIDDEN),
    "blk.0.ffn_up.weight": (INNER, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encode(kind, value):
    if isinstance(value, bytes):
        return value
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(encode(item, each) for each in values)
    return struct.pack("<" + LAYOUTS[kind], value)


def write(path, metadata=METADATA, shapes=SHAPES, *, counts=None, kinds=None, value=0.5, dims=None, offset=0):
    """Write float32 tensors; what is given replaces what the header would truly say."""
    head = [b"GGUF", struct.pack("<IQQ", 3, *(counts or (len(shapes), len(metadata))))]
    for key, (kind, content) in metadata.items():
        head += [text(key), struct.pack("<I", kind), encode(kind, content)]
    start = 0
    for name, shape in shapes.items():
        said = (dims or {}).get(name, shape)
        head += [text(name), struct.pack("<I", len(said))]
        head += [struct.pack("<Q", size) for size in reversed(said)]
        head.append(struct.pack("<IQ", (kinds or {}).get(name, 0), start + offset))
        start += 4 * int(np.prod(shape))
    raw = b"".join(head)
    raw += bytes(-len(raw) % 32)
    path.write_bytes(raw + np.full(start // 4, value, dtype="<f4").tobytes())
    return path


def test_the_file_that_is_broken_below_is_sound(tmp_path):
    folder = resolve_checkpoint(str(write(tmp_path / "m.gguf"))).folder
    assert load_causal_lm(folder)(torch.tensor([[3, 4]])).logits.isfinite().all()
    assert load_tokenizer(folder)("he<|end|>").input_ids == [len(TOKENS) - 1, 2]


def refused(path, match=None, **options):
    write(path, **options)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_tokenizer(resolve_checkpoint(str(path)).folder)
    assert path.name in str(caught.value.where) + caught.value.message
    assert caught.value.hint
    return caught.value


NUMBERS = [key for key, (kind, _) in METADATA.items() if kind in (U32, F32) and key.startswith("llama.")]
WRONG = [
    *((STRING, "12"), (ARRAY, (U32, [2, 2])), (ARRAY, (U32, [])), (U32, 0), (I32, -1), (U64, 2**63)),
    *((BOOL, True), (F32, float("nan")), (F64, float("inf")), (ARRAY, (ARRAY, [(U32, [1])]))),
]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_another_kind_are_refused(tmp_path, key, value):
    refused(tmp_path / "m.gguf", metadata={**METADATA, key: value})


TEXTS = ["general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"]
LISTS = ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"]
IDS = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding", "unknown", "eot")]


@pytest.mark.parametrize(
    "value", [(U32, 5), (ARRAY, (STRING, ["a"])), (ARRAY, (U32, [])), (BOOL, True)], ids=repr
)
@pytest.mark.parametrize("key", TEXTS)
def test_texts_of_another_kind_are_refused(tmp_path, key, value):
    refused(tmp_path / "m.gguf", metadata={**METADATA, key: value})


@pytest.mark.parametrize(
    "value",
    [
        (U32, 5),
        (STRING, "abc"),
        (ARRAY, (F32, [0.5])),
        (ARRAY, (ARRAY, [(STRING, ["a"])])),
        (ARRAY, (BOOL, [True])),
    ],
    ids=repr,
)
@pytest.mark.parametrize("key", LISTS)
def test_lists_of_another_kind_are_refused(tmp_path, key, value):
    refused(tmp_path / "m.gguf", metadata={**METADATA, key: value})


@pytest.mark.parametrize(
    "value", [(STRING, "1"), (I32, -1), (U32, len(TOKENS)), (U64, 2**63), (F32, 1.0)], ids=repr
)
@pytest.mark.parametrize("key", IDS)
def test_ids_that_no_token_has_are_refused(tmp_path, key, value):
    refused(tmp_path / "m.gguf", metadata={**METADATA, key: value})


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("merges", (ARRAY, (STRING, ["he"])), "a merge must be two tokens"),
        ("merges", (ARRAY, (STRING, ["h e l"])), "a merge must be two tokens"),
        ("merges", (ARRAY, (STRING, ["q zz"])), "no tokenizer can be loaded"),
        ("tokens", (ARRAY, (STRING, [*TOKENS[:-1], "h"])), "listed twice"),
        ("tokens", (ARRAY, (STRING, [*TOKENS, "river"])), "types of tokens"),
        ("token_type", (ARRAY, (I32, [1])), "types of tokens"),
        ("token_type", (ARRAY, (I32, [1] * 999)), "types of tokens"),
        ("model", (STRING, "bert"), "cannot be rebuilt"),
        ("add_bos_token", (STRING, "yes"), "add_bos_token"),
    ],
)
def test_tokenizers_that_contradict_themselves_are_refused(tmp_path, key, value, match):
    error = refused(tmp_path / "m.gguf", metadata={**METADATA, f"tokenizer.ggml.{key}": value})
    assert match in str(error)


def test_tokens_beyond_the_embeddings_are_refused(tmp_path):
    more = {
        "tokens": (ARRAY, (STRING, [*TOKENS, "river"])),
        "token_type": (ARRAY, (I32, [1] * (len(TOKENS) + 1))),
    }
    metadata = {**METADATA, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}
    path = write(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(
        CheckpointError, match=rf"largest id is {len(TOKENS)}, the embeddings have {len(TOKENS)} rows"
    ):
        load_tokenizer(resolve_checkpoint(str(path)).folder)


@pytest.mark.parametrize("missing", [key for key in METADATA if key.split(".")[-1] in (
    *("architecture", "block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"),
    *("layer_norm_rms_epsilon", "model", "tokens", "merges"),
)])  # fmt: skip
def test_what_is_needed_is_named(tmp_path, missing):
    refused(tmp_path / "m.gguf", metadata={key: value for key, value in METADATA.items() if key != missing})


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_is_a_clear_error(tmp_path, name):
    path = write(tmp_path / "m.gguf", shapes={key: shape for key, shape in SHAPES.items() if key != name})
    with pytest.raises(CheckpointError):
        load_causal_lm(resolve_checkpoint(str(path)).folder)


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (0, 8), (2**32, 2**32), (2**63, 4), (8,) * 9, (7, 8), (8, 7), (64,), (2, 4, 8)],
    ids=repr,
)
@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "output_norm.weight"])
def test_shapes_that_do_not_fit_are_a_clear_error(tmp_path, name, shape):
    path = write(tmp_path / "m.gguf", dims={name: shape})
    with pytest.raises(CheckpointError):
        load_causal_lm(resolve_checkpoint(str(path)).folder)


@pytest.mark.parametrize("kind", [99, 2**32 - 1, 4, 8, 12, 24, 26, 28])
def test_types_that_cannot_be_read_are_refused(tmp_path, kind):
    refused(tmp_path / "m.gguf", kinds={"blk.0.ffn_up.weight": kind})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, cache, value):
    refused(tmp_path / "m.gguf", r"holds values in \S+ that are not finite", value=value)
    assert list((cache / "gguf").iterdir()) == []


@pytest.mark.parametrize(
    "alignment",
    [
        (U32, 0),
        (I32, -1),
        (U32, 24),
        (U64, 2**62),
        (STRING, "32"),
        (F32, 32.0),
        (ARRAY, (U32, [32])),
        (BOOL, True),
    ],
    ids=repr,
)
def test_alignment_is_a_power_of_two(tmp_path, alignment):
    refused(tmp_path / "m.gguf", metadata={**METADATA, "general.alignment": alignment})


NESTED = struct.pack("<IQ", ARRAY, 1) * 100_000 + struct.pack("<IQ", U8, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"counts": (2**60, len(METADATA))},
        {"counts": (len(SHAPES), 2**60)},
        {"counts": (2**64 - 1, 2**64 - 1)},
        {"metadata": {**METADATA, "a": (ARRAY, NESTED)}},
        {"metadata": {**METADATA, "a": (ARRAY, struct.pack("<IQ", U8, 2**60))}},
        {"metadata": {**METADATA, "a": (ARRAY, struct.pack("<IQ", STRING, 2**60))}},
        {"metadata": {**METADATA, "a": (ARRAY, struct.pack("<IQ", ARRAY, 2**60))}},
        {"metadata": {**METADATA, "a": (ARRAY, struct.pack("<IQ", 77, 1))}},
        {"metadata": {**METADATA, "a": (STRING, struct.pack("<Q", 2**60))}},
        {"metadata": {**METADATA, "a": (STRING, struct.pack("<Q", 4) + b"\xff\xfe\xff\xff")}},
        {"metadata": {**METADATA, "a": (99, b"")}},
        {"offset": 2**62},
        {"offset": 2**64 - 10**6},
    ],
    ids=range(13),
)
def test_headers_cost_no_more_than_the_file(tmp_path, options):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "m.gguf", **options)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("version", [0, 1, 4, 2**31, 3 << 24])
def test_versions_and_byte_orders_are_checked(tmp_path, version):
    path = write(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", version)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its version is"):
        resolve_checkpoint(str(path))


def test_a_name_that_is_given_twice_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf")
    content = path.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="given twice"):
        resolve_checkpoint(str(path))


def test_what_is_no_file_is_a_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a usable GGUF file"):
        resolve_checkpoint(str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError):
        resolve_checkpoint(str(path))
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError):
        resolve_checkpoint(str(path))
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(CheckpointError):
        resolve_checkpoint(str(path))

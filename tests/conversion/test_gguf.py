"""GGUF files become plain float32 checkpoints, equal to what transformers reads, with an exact tokenizer."""

import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gendistill.checkpoints.gguf_file import read_gguf_header
from gendistill.checkpoints.resolve import (
    load_causal_lm,
    load_tokenizer,
    read_tensor_index,
    resolve_checkpoint,
)
from gendistill.errors import CheckpointError

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ċ Ċ", "Ġ Ġ", "h e", "l l", "he ll", "1 2", "Ġ 1"]
TOKENS = SPECIAL + ALPHABET + [merge.replace(" ", "") for merge in MERGES]


def write_gguf(
    path,
    architecture="llama",
    *,
    pre="smollm",
    untied=False,
    extra=None,
    tensors=None,
    quant="Q8_0",
    values=None,
):
    """Write a tiny quantised model, with the names and the layout that llama.cpp writes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(20_000.0)
    if architecture == "qwen3":
        writer.add_key_length(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in (extra or {}).items():
        getattr(writer, key)(value)
    generator = np.random.default_rng(5)
    given = values or {}
    shapes = {name: value.shape for name, value in given.items()}
    for name, shape in {**tensor_shapes(architecture, untied), **(tensors or {}), **shapes}.items():
        value = given.get(name, generator.standard_normal(shape).astype(np.float32))
        if len(shape) == 1:
            writer.add_tensor(name, value)
        else:
            kind = gguf.GGMLQuantizationType[quant]
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor_shapes(architecture, untied):
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if untied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (q_size, HIDDEN),
            "attn_k.weight": (kv_size, HIDDEN),
            "attn_v.weight": (kv_size, HIDDEN),
            "attn_output.weight": (HIDDEN, q_size),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }
        if architecture == "qwen2":
            block |= {"attn_q.bias": (q_size,), "attn_k.bias": (kv_size,), "attn_v.bias": (kv_size,)}
        if architecture == "qwen3":
            block |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.mark.parametrize(
    ("architecture", "pre", "untied", "quant"),
    [("llama", "smollm", False, "Q8_0"), ("qwen2", "qwen2", True, "Q4_1"), ("qwen3", "qwen2", False, "F16")],
)
def test_weights_equal_what_transformers_reads(tmp_path, architecture, pre, untied, quant):
    path = write_gguf(tmp_path / "m.gguf", architecture, pre=pre, untied=untied, quant=quant)
    ours = load_causal_lm(resolve_checkpoint(str(path)).folder)
    # transformers takes head_dim of qwen3 from its defaults, not from the file
    known = {"config": ours.config} if architecture == "qwen3" else {}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **known)
    assert type(ours) is type(theirs)
    assert ours.dtype == torch.float32
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for name in ("num_key_value_heads", "tie_word_embeddings", "rope_parameters", "eos_token_id"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=2e-4, atol=1e-4)


def test_folder_has_no_trace_of_quantisation_and_everything_else(tmp_path):
    folder = resolve_checkpoint(str(write_gguf(tmp_path / "m.gguf"))).folder
    for file in folder.glob("*.json"):
        assert "quant" not in file.read_text(), file.name
        assert "gguf" not in file.read_text().lower(), file.name
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["dtype"] == "float32"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["bos_token_id"]) == (2, 2, 1)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    load_causal_lm(folder).save_pretrained(tmp_path / "again")


def reference_tokenizer(pre_tokenizer):
    tokenizer = Tokenizer(
        BPE({token: index for index, token in enumerate(TOKENS)}, [tuple(m.split()) for m in MERGES])
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def test_smollm_cuts_digits_before_the_merges(tmp_path):
    """Merging line breaks or blanks before a digit depends on it; lists (``\\n\\n1.``) are full of them."""
    tokenizer = load_tokenizer(resolve_checkpoint(str(write_gguf(tmp_path / "m.gguf"))).folder)
    sequence = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    reference = reference_tokenizer(pre_tokenizers.Sequence(sequence))
    plain = reference_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    text = "hello\n\n12 hell  12"
    assert tokenizer(text).input_ids == reference.encode(text).ids != plain.encode(text).ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_and_chat_template_survive(tmp_path):
    tokenizer = load_tokenizer(resolve_checkpoint(str(write_gguf(tmp_path / "m.gguf"))).folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        SPECIAL[1],
        SPECIAL[2],
        SPECIAL[2],
    )
    assert tokenizer("<|im_start|>he<|im_end|>").input_ids == [1, TOKENS.index("he"), 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False).startswith(
        "<|im_start|>user\nhe<|im_end|>"
    )
    assert tokenizer.decode([1, TOKENS.index("he"), 2], skip_special_tokens=True) == "he"


@pytest.mark.parametrize(
    ("architecture", "pre"), [("llama", "smollm"), ("qwen2", "qwen2"), ("qwen3", "qwen2")]
)
def test_gguf_output_that_repeats_the_embeddings_is_tied(tmp_path, architecture, pre):
    path = write_gguf(tmp_path / "m.gguf", architecture, pre=pre, untied=True)
    folder = resolve_checkpoint(str(path)).folder
    assert "lm_head.weight" in read_tensor_index(folder)
    embeddings = np.random.default_rng(1).standard_normal((len(TOKENS), HIDDEN)).astype(np.float32)
    same = {"token_embd.weight": embeddings, "output.weight": embeddings}
    path = write_gguf(tmp_path / "n.gguf", architecture, pre=pre, values=same)
    checkpoint = resolve_checkpoint(str(path))
    assert "lm_head.weight" not in read_tensor_index(checkpoint.folder)
    assert checkpoint.config["tie_word_embeddings"] is True
    model = load_causal_lm(checkpoint.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("add", [True, False])
def test_beginning_of_text_is_added_as_the_file_says(tmp_path, add):
    path = write_gguf(tmp_path / "m.gguf", extra={"add_add_bos_token": add})
    tokenizer = load_tokenizer(resolve_checkpoint(str(path)).folder)
    assert (tokenizer("he").input_ids == [1, TOKENS.index("he")]) is add
    assert tokenizer("he", add_special_tokens=False).input_ids == [TOKENS.index("he")]


def test_second_resolution_reads_the_cache(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf")
    first = resolve_checkpoint(str(path))

    def fail(*_):
        raise AssertionError("converted twice")

    monkeypatch.setattr("gendistill.checkpoints.gguf_import.convert_gguf", fail)
    assert resolve_checkpoint(str(path)) == first
    path.rename(tmp_path / "moved.gguf")
    moved = resolve_checkpoint(str((tmp_path / "moved.gguf").rename(tmp_path / "sub.gguf").rename(path)))
    assert moved.folder == first.folder
    assert first.folder.is_relative_to(cache)


def test_interrupted_conversion_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gendistill.checkpoints.gguf_import.dequantize", stop)
        with pytest.raises(KeyboardInterrupt):
            resolve_checkpoint(str(path))
    assert list((cache / "gguf").iterdir()) == []
    resolve_checkpoint(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma2"}, 'architecture "gemma2"; supported: llama, qwen2, qwen3'),
        ({"pre": "unheard-of"}, r'cut by "unheard-of"\) cannot be rebuilt exactly'),
        ({"tensors": {"rope_freqs.weight": (8,)}}, "scales its rotary positions"),
        ({"extra": {"add_rope_scaling_type": gguf.RopeScalingType.YARN}}, "scales its rotary positions"),
        ({"extra": {"add_rope_dimension_count": 8}}, "rotates only a part"),
        ({"extra": {"add_expert_count": 4}}, "mixture of experts"),
        ({"tensors": {"blk.0.attn_sinks.weight": (4,)}}, r"not understood: blk\.0\.attn_sinks\.weight"),
    ],
)
def test_what_would_be_wrong_is_refused(tmp_path, cache, options, message):
    path = write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_checkpoint(str(path))
    assert "original safetensors checkpoint" in (caught.value.hint or "")
    assert list((cache / "gguf").iterdir()) == []


@pytest.mark.parametrize("kept", [3, 10, 400, 5_000, -100])
def test_truncated_files_are_refused(tmp_path, kept):
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"not a usable GGUF file|truncated"):
        resolve_checkpoint(str(path))


def test_header_matches_the_gguf_package(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", pre="qwen2", untied=True)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.metadata[key] == field.contents(), key
    assert {name: (tensor.shape, tensor.start) for name, tensor in header.tensors.items()} == {
        tensor.name: (tuple(int(size) for size in reversed(tensor.shape)), int(tensor.data_offset))
        for tensor in reader.tensors
    }


def test_families_that_gguf_becomes_exist_in_transformers():
    from gendistill.checkpoints.gguf_import import _FAMILIES

    assert all(family in CONFIG_MAPPING for family, _ in _FAMILIES.values())

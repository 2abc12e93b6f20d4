"""Rebuild a tokenizer from a GGUF file's metadata.

How text is cut before the merges apply is not in the file; it only names the scheme. Cutting it differently
gives other tokens than the model was trained on (digits after two line breaks, say), so an unknown name is an
error, never a default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gendistill.conversion.gguf_file import GGUFHeader
from gendistill.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # token types in the file

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How a byte-level vocabulary cuts text: a regex, single digits, or GPT-2's own rule when neither."""

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False


# as in the tokenizer.json of SmolLM2, Qwen2.5, Llama 3, Mistral Nemo and GPT-2
_SCHEMES = {
    "smollm": _Scheme(single_digits=True),
    "qwen2": _Scheme(split=_QWEN2_SPLIT, nfc=True),
    "llama-bpe": _Scheme(split=_LLAMA3_SPLIT, ignore_merges=True),
    "tekken": _Scheme(split=_TEKKEN_SPLIT, ignore_merges=True),
    "gpt-2": _Scheme(),
}


def build_tokenizer(header: GGUFHeader) -> PreTrainedTokenizerBase:
    """Build the tokenizer that a GGUF file describes, with its chat template.

    Raises:
        CheckpointError: The file's tokenizer cannot be rebuilt exactly.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "llama":  # sentencepiece: transformers rebuilds it
        return AutoTokenizer.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    scheme = _SCHEMES.get(header.metadata.get("tokenizer.ggml.pre", ""))
    if kind != "gpt2" or scheme is None:
        named = f'{kind}, cut by "{header.metadata.get("tokenizer.ggml.pre")}"'
        raise CheckpointError(
            f"the tokenizer of {header.path.name} ({named}) cannot be rebuilt exactly; known: {', '.join(_SCHEMES)}",
            where=str(header.path),
            hint="use the original safetensors checkpoint, which carries its tokenizer.json",
        )
    return _byte_level(header.metadata, scheme)


def _byte_level(metadata: dict[str, Any], scheme: _Scheme) -> PreTrainedTokenizerBase:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=scheme.ignore_merges))
    if scheme.nfc:
        tokenizer.normalizer = normalizers.NFC()
    before: list[Any] = []
    if scheme.single_digits:
        before.append(pre_tokenizers.Digits(individual_digits=True))
    if scheme.split is not None:
        before.append(pre_tokenizers.Split(Regex(scheme.split), behavior="isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=scheme.split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=token_type == _CONTROL)])
    named = _special_tokens(metadata, tokens)
    tokenizer.post_processor = _post_processor(metadata, named, vocab)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _special_tokens(metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: tokens[index] for name, index in found.items() if index is not None}


def _post_processor(metadata: dict[str, Any], named: dict[str, str], vocab: dict[str, int]) -> Any:
    """Put BOS in front where the file says so."""
    bos = named.get("bos_token")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", False):
        return processors.ByteLevel(trim_offsets=False)
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
    )

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

from gendistill.checkpoints.gguf_file import GGUFHeader
from gendistill.errors import CheckpointError
from gendistill.paths import check_shape

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
        _tokens(header)
        return AutoTokenizer.from_pretrained(
            str(header.path.parent),
            gguf_file=header.path.name,
            trust_remote_code=False,
            local_files_only=True,
        )
    cut = header.metadata.get("tokenizer.ggml.pre", "")
    scheme = _SCHEMES.get(cut) if isinstance(cut, str) else None
    if kind != "gpt2" or scheme is None:
        named = f'{kind!s:.40}, cut by "{cut!s:.40}"'
        raise CheckpointError(
            f"the tokenizer of {header.path.name} ({named}) cannot be rebuilt exactly; known: {', '.join(_SCHEMES)}",
            where=str(header.path),
            hint="use the original safetensors checkpoint, which carries its tokenizer.json",
        )
    return _byte_level(header, scheme)


def _entry(header: GGUFHeader, key: str, shape: Any, default: Any = None) -> Any:
    name = f"tokenizer.ggml.{key}"
    value = header.metadata.get(name, default)
    hint = "use the original safetensors checkpoint, which carries its tokenizer.json"
    return check_shape(value, shape, error=CheckpointError, where=f"{header.path}: {name}", hint=hint)


def _broken(header: GGUFHeader, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer of {header.path.name} cannot be rebuilt: {reason}",
        where=str(header.path),
        hint="use the original safetensors checkpoint, which carries its tokenizer.json",
    )


def _tokens(header: GGUFHeader) -> list[str]:
    tokens = _entry(header, "tokens", list[str])
    if len(set(tokens)) != len(tokens):
        raise _broken(header, "a token is listed twice")
    types = _entry(header, "token_type", list[int], [])
    if types and len(types) != len(tokens):
        raise _broken(header, f"it lists {len(tokens):,} tokens, but {len(types):,} types of tokens")
    return tokens


def token_id(header: GGUFHeader, name: str) -> int | None:
    """Return the id that a file gives a special token: ``bos``, ``eos``, ``eot``, ``unknown`` or ``padding``.

    Raises:
        CheckpointError: It is not the id of a token.
    """
    index = _entry(header, f"{name}_token_id", int | None)
    count = len(_entry(header, "tokens", list[str]))
    if index is not None and not 0 <= index < count:
        raise _broken(header, f"{name}_token_id is {index:,}, the largest id is {count - 1:,}")
    return index


def _byte_level(header: GGUFHeader, scheme: _Scheme) -> PreTrainedTokenizerBase:
    metadata, tokens = header.metadata, _tokens(header)
    merges = [tuple(merge.split(" ")) for merge in _entry(header, "merges", list[str])]
    if any(len(merge) != 2 for merge in merges):
        raise _broken(header, "a merge must be two tokens with a blank between them")
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
    types = metadata.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=token_type == _CONTROL)])
    named = _special_tokens(header, tokens)
    tokenizer.post_processor = _post_processor(header, named, vocab)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(header),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _chat_template(header: GGUFHeader) -> str | None:
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise _broken(header, "tokenizer.chat_template must be a text")
    return template


def _special_tokens(header: GGUFHeader, tokens: list[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {role: token_id(header, name) for role, name in names.items()}
    return {role: tokens[index] for role, index in found.items() if index is not None}


def _post_processor(header: GGUFHeader, named: dict[str, str], vocab: dict[str, int]) -> Any:
    """Put BOS in front where the file says so."""
    bos = named.get("bos_token")
    if bos is None or not _entry(header, "add_bos_token", bool, False):
        return processors.ByteLevel(trim_offsets=False)
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
    )

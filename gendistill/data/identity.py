"""Say what a source holds, so that a change of its rows can be told from a change of its name."""

from __future__ import annotations

from typing import Any

from gendistill.config.schema import SourceConfig
from gendistill.data.locate import JSON_SUFFIXES, TEXT_SUFFIXES, locate, reading, row_suffix
from gendistill.digests import file_digest


def source_identity(config: SourceConfig, *, where: str) -> dict[str, Any]:
    """Say what a source holds, as plain JSON, without the network (but a package may be fetched).

    Two local sources are alike if their files hold the same bytes in the same order and are read as the same kind;
    how they are called and where they lie is left out. A hub dataset is alike if its name and revision are. A branch is
    not resolved to its commit: without the network, or before the first download, the same recipe would be another one.

    Args:
        config: The source.
        where: Recipe path, for errors.
    Returns:
        ``{"files": [[kind, sha256], ...]}``, or ``{"hub": path, "revision": revision}``.
    Raises:
        DataError: The files are missing or cannot be read.
    """
    found = locate(config, where=where)
    if found is None:
        return {"hub": config.path, "revision": config.revision}
    files = []
    for file in found.files:
        with reading(file, where=where):
            files.append([_kind(row_suffix(file)), file_digest(file)])
    return {"files": files}


def _kind(suffix: str) -> str:
    """Name how a file is read: JSON by any of its suffixes is one kind."""
    if suffix in JSON_SUFFIXES:
        return "json"
    return "text" if suffix in TEXT_SUFFIXES else suffix.removeprefix(".")

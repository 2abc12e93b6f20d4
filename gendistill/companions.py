"""The files beside weights and config that a student needs to read, write and stop like its teacher."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def companion_files(folder: Path) -> dict[str, Path]:
    """List tokenizer, chat templates, generation settings and licences by their place in a checkpoint folder."""
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def companions_fingerprint(folder: Path) -> str:
    """Hash names and content of ``companion_files``."""
    digest = hashlib.sha256()
    for name, path in companion_files(folder).items():
        with path.open("rb") as source:
            content = hashlib.file_digest(source, "sha256").hexdigest()
        digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()

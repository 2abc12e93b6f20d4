"""Keep finished parts of an evaluation: one task under one protocol, or the open answers. Imports no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendistill_evals.errors import EvalError
from gendistill_evals.results import read_json, write_json
from gendistill_evals.task import sha256_of

# Raised whenever the same text or log-probability may give another score than before.
RULES = 3


@dataclass(frozen=True, slots=True)
class PartKey:
    """The name of a part and the hash of everything that its content depends on."""

    name: str
    sha256: str

    @classmethod
    def of(cls, name: str, inputs: Any) -> PartKey:
        """Make the key of a part.

        Args:
            name: ``<task>.<protocol>``, or ``transcripts``.
            inputs: Plain data that holds everything the content depends on.
        """
        return cls(name, sha256_of([RULES, name, inputs]))


@dataclass(frozen=True, slots=True)
class PartStore:
    """A folder of finished parts, where parts of other models and settings may lie side by side.

    Attributes:
        folder: Folder of the files; made when the first is written.
    """

    folder: Path

    def read(self, key: PartKey) -> Any:
        """Return a finished part; None if there is none, or if its file is damaged, which is said on stderr."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            stored = read_json(path)
        except EvalError as error:
            return _made_anew(path, error.message)
        if not isinstance(stored, dict) or stored.keys() != {"key", "sha256", "content"}:
            return _made_anew(path, "it does not hold key, sha256 and content")
        if stored["key"] != key.sha256 or stored["sha256"] != sha256_of(stored["content"]):
            return _made_anew(path, "its content is not what was written")
        return stored["content"]

    def write(self, key: PartKey, content: Any) -> None:
        """Keep a finished part.

        Raises:
            EvalError: The folder cannot be written.
        """
        write_json(self._path(key), {"key": key.sha256, "sha256": sha256_of(content), "content": content})

    def _path(self, key: PartKey) -> Path:
        return self.folder / f"{key.name}-{key.sha256[:16]}.json"


def _made_anew(path: Path, why: str) -> None:
    print(f"{path} is damaged and made anew: {why}", file=sys.stderr, flush=True)

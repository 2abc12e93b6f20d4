"""Keep what a peer's kernels chose when they tuned themselves, so that a measurement can be repeated without it.

fla-core's first call of every kind takes minutes. Triton keeps the choices in its cache on disk; a machine that starts
empty has none. A file of them is also the record of what the peer was measured with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gendistill.errors import GendistillError
from gendistill.paths import read_json, write_json, write_text

_SCHEMA = 1
# a folder of Triton's cache, named by a hash, and a file of it
_PLACE = re.compile(r"[A-Z0-9]{52}/\w+\.autotune\.json")


class PeerTuning:
    """A file of choices, put where Triton looks for them, but for those that are there.

    Args:
        path: The file; one that does not exist has none.
        cache: Triton's folder. What it has besides the file's choices may be anybody's, and is never saved.
        peer, device: What tunes itself, and where.
    Raises:
        GendistillError: It is not such a file, or one of another peer or device.
    """

    def __init__(self, path: Path, cache: Path, *, peer: str, device: str) -> None:
        self.path, self.cache = path, cache
        self.about = {"peer": peer, "device": device}
        self.choices = _load(path, self.about) if path.exists() else {}
        self._others = self._places() - self.choices.keys()
        missing = [place for place in self.choices if not (cache / place).exists()]
        for place in missing:
            write_text(cache / place, json.dumps(self.choices[place]))
        # how many were put there
        self.restored = len(missing)

    def save(self) -> None:
        """Write the file again, with what was chosen since."""
        for place in self._places() - self._others - self.choices.keys():
            # plain json: Triton writes Infinity for a configuration that did not run
            self.choices[place] = _fastest(json.loads((self.cache / place).read_text(encoding="utf-8")))
        write_json(
            self.path, {"schema": _SCHEMA, **self.about, "choices": dict(sorted(self.choices.items()))}
        )

    def _places(self) -> set[str]:
        found = (f"{path.parent.name}/{path.name}" for path in self.cache.glob("*/*.autotune.json"))
        return {place for place in found if _PLACE.fullmatch(place)}


def _fastest(tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the fastest configuration only, which is all that Triton takes from such a file."""
    return {**tuned, "configs_timings": [min(tuned["configs_timings"], key=lambda each: each[1])]}


def _load(path: Path, about: Mapping[str, str]) -> dict[str, Any]:
    document = read_json(path, error=GendistillError, hint="leave --peer-tuning out, or name a new file")
    choices = document.get("choices") if isinstance(document, dict) else None
    if not isinstance(choices, dict) or document.get("schema") != _SCHEMA:
        raise GendistillError(f'{path} is not a file of choices: it needs "schema": {_SCHEMA} and "choices"')
    if bad := [place for place in choices if not _PLACE.fullmatch(place)]:
        raise GendistillError(f"{path} names a file outside of Triton's cache: {bad[0]}")
    for name, mine in about.items():
        if document.get(name) != mine:
            raise GendistillError(
                f'{path} holds choices for the {name} "{document.get(name)}", here it is "{mine}"',
                hint="leave --peer-tuning out, or name a new file",
            )
    return choices

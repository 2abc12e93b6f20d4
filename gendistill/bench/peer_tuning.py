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
from gendistill.paths import write_json, write_text

_SCHEMA = 1
# a folder of Triton's cache, named by a hash, and a file of it
_PLACE = re.compile(r"[A-Z0-9]{52}/\w+\.autotune\.json")


def _choice(tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the fastest configuration only, which is all that Triton takes from such a file."""
    return {**tuned, "configs_timings": [min(tuned["configs_timings"], key=lambda each: each[1])]}


def save(path: Path, cache: Path, *, peer: str, device: str) -> int:
    """Write the choices in Triton's cache, and those that the file had, to a file; returns how many there are.

    Args:
        path: The file.
        cache: Triton's folder.
        peer, device: What tuned itself, and where.
    """
    choices = _load(path)["choices"] if path.exists() else {}
    for found in cache.glob("*/*.autotune.json"):
        place = f"{found.parent.name}/{found.name}"
        if _PLACE.fullmatch(place):
            choices[place] = _choice(json.loads(found.read_text()))
    document = {"schema": _SCHEMA, "peer": peer, "device": device, "choices": dict(sorted(choices.items()))}
    write_json(path, document)
    return len(choices)


def restore(path: Path, cache: Path, *, peer: str, device: str) -> int:
    """Put a file's choices where Triton looks for them, but for those that are there; returns how many.

    A file that does not exist has none.

    Raises:
        GendistillError: It is not such a file, or one of another peer or device.
    """
    if not path.exists():
        return 0
    document = _load(path)
    for name, mine in (("peer", peer), ("device", device)):
        if document.get(name) != mine:
            raise GendistillError(
                f'{path} holds choices for the {name} "{document.get(name)}", here it is "{mine}"',
                hint="leave --peer-tuning out, or name a new file",
            )
    number = 0
    for place, choice in document["choices"].items():
        if not (cache / place).exists():
            write_text(cache / place, json.dumps(choice))
            number += 1
    return number


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GendistillError(f"{path} cannot be read: {error}") from error
    choices = document.get("choices") if isinstance(document, dict) else None
    if not isinstance(choices, dict) or document.get("schema") != _SCHEMA:
        raise GendistillError(f'{path} is no file of choices: it needs "schema": {_SCHEMA} and "choices"')
    if bad := [place for place in choices if not _PLACE.fullmatch(place)]:
        raise GendistillError(f"{path} names a file outside of Triton's cache: {bad[0]}")
    return document

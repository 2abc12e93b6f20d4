"""What a step is: a name, and everything that its output depends on. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Step:
    """One piece of work whose output is kept: a conversion, a stage, the scores of a model.

    Attributes:
        name: As in the manifest: ``convert``, ``stage distill``, ``eval student``.
        inputs: Plain data by place in the recipe. Equal inputs give equal output, so that steps with the same key
            are done once, whatever recipe asks for them.
    """

    name: str
    inputs: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Hash of name and inputs, 16 hexadecimal digits."""
        return fingerprint(self.name, self.inputs)

    @property
    def slug(self) -> str:
        """Name of the step's folder."""
        return f"{self.name.replace(' ', '-')}-{self.key}"


def fingerprint(*inputs: Any) -> str:
    """Hash plain data to 16 hexadecimal digits."""
    text = json.dumps(inputs, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in which inputs two steps differ, for people: ``stages.distill.lr 0.001 -> 0.0005``."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{path} {_shown(before.get(path))} -> {_shown(after.get(path))}"
        if len(_shown(before.get(path)) + _shown(after.get(path))) < 80
        else f"{path} has changed"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, child in value.items():
        yield from _leaves(child, f"{path}.{key}" if path else str(key))


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

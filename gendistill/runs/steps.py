"""What a step is: a name, and everything that its output depends on. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

CONVERT = "convert"
ROLES = ("teacher", "student")
# the input that says which step a student comes from
BEFORE = "the student before it"
# the input that says what a model is asked
ASKED = "eval"

# Raised whenever equal inputs may give another output than before: everything is then made anew. A new version of
# gendistill alone redoes nothing.
RULES = 1

_HASH = re.compile(r"\w*-?[0-9a-f]{16,}")
_LONGEST = 80


def stage_step(stage: str) -> str:
    """Name the step of a stage."""
    return f"stage {stage}"


def eval_step(role: str) -> str:
    """Name the step that scores ``teacher`` or ``student``."""
    return f"eval {role}"


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
        """Hash of rules, name and inputs, 16 hexadecimal digits."""
        return fingerprint(RULES, self.name, self.inputs)

    @property
    def model(self) -> str:
        """Hash of the model that a step scores, whatever it is asked."""
        return fingerprint({name: value for name, value in self.inputs.items() if name != ASKED})

    @property
    def kind(self) -> str:
        """First word of the name: ``convert``, ``stage`` or ``eval``."""
        return self.name.split()[0]

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
    changed = [path for path in dict.fromkeys([*before, *after]) if before.get(path) != after.get(path)]
    return [_change(path, before.get(path), after.get(path)) for path in changed]


def _change(path: str, old: Any, new: Any) -> str:
    words = f"{json.dumps(old, ensure_ascii=False)} -> {json.dumps(new, ensure_ascii=False)}"
    # nobody reads a hash
    hashed = any(isinstance(value, str) and _HASH.fullmatch(value) for value in (old, new))
    return f"{path} has changed" if hashed or len(words) > _LONGEST else f"{path} {words}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, child in value.items():
        yield from _leaves(child, f"{path}.{key}" if path else str(key))

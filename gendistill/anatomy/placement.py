"""Which mixer each layer has: the four spellings of a placement. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendistill.anatomy.full import FULL
from gendistill.anatomy.mixers import MIXERS
from gendistill.errors import RecipeError
from gendistill.paths import check_shape, read_json

_GRAMMAR = (
    'a pattern tiled over the layers ("kda kda kda full"), a keep-list ("full@3,7,11 kda"), '
    'one kind per layer (["kda", "full", ...]) or a JSON file {"kinds": [...]}'
)


@dataclass(frozen=True, slots=True)
class Placement:
    """The mixer of each layer; ``kinds[i]`` is layer ``i``'s, by its name in the catalogue."""

    kinds: tuple[str, ...]

    @classmethod
    def parse(
        cls, spec: str | Iterable[str], *, num_layers: int, where: str = "student.placement"
    ) -> Placement:
        """Read a placement in any of its four spellings.

        Args:
            spec: Tiled pattern, keep-list, explicit list, or the path of a JSON file.
            num_layers: Layers of the teacher.
            where: Name of the setting, for errors.
        Raises:
            RecipeError: Unknown kind, layer out of range, or a list of the wrong length.
        """
        if not isinstance(spec, str):
            return cls._explicit([str(kind) for kind in spec], num_layers=num_layers, where=where)
        text = spec.strip()
        if text.endswith(".json"):
            return cls._from_json(Path(text), num_layers=num_layers, where=where)
        if "@" in text:
            return cls._keep_list(text, num_layers=num_layers, where=where)
        words = [_kind(word, where) for word in text.split()]
        if not words:
            raise RecipeError("the placement is empty", where=where, hint=f"write {_GRAMMAR}")
        if len(words) > num_layers:
            raise RecipeError(
                f"the pattern has {len(words)} entries, the teacher has {num_layers} layers", where=where
            )
        return cls(tuple(words[layer % len(words)] for layer in range(num_layers)))

    @classmethod
    def _explicit(cls, kinds: list[str], *, num_layers: int, where: str) -> Placement:
        if len(kinds) != num_layers:
            raise RecipeError(
                f"the placement lists {len(kinds)} layers, the teacher has {num_layers}",
                where=where,
                hint="give one kind per layer, or a string pattern, which is tiled",
            )
        return cls(tuple(_kind(kind, where) for kind in kinds))

    @classmethod
    def _from_json(cls, path: Path, *, num_layers: int, where: str) -> Placement:
        hint = f"write {_GRAMMAR}"
        try:
            path = path.expanduser()
            is_there = str(path).isprintable() and path.exists()
        except (OSError, RuntimeError) as error:  # a name that is too long, a user who does not exist
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(
                f"cannot read a placement from {path}: {reason}", where=where, hint=hint
            ) from error
        if not (is_there and path.is_file()):
            reason = "it is not a file" if is_there else "there is no such file"
            raise RecipeError(f"cannot read a placement from {str(path)!a}: {reason}", where=where, hint=hint)
        try:
            shape = list[str] | dict[str, Any]
            content = read_json(path, shape=shape, error=RecipeError, hint=hint)
            if isinstance(content, dict):
                kinds = content.get("kinds")
                content = check_shape(kinds, list[str], error=RecipeError, where="kinds", hint=hint)
        except RecipeError as error:
            raise RecipeError(
                f"cannot read a placement from {path}: {error.message}", where=where, hint=hint
            ) from error
        return cls._explicit(content, num_layers=num_layers, where=where)

    @classmethod
    def _keep_list(cls, text: str, *, num_layers: int, where: str) -> Placement:
        default: str | None = None
        chosen: dict[int, str] = {}
        for word in text.split():
            name, at, layers = word.partition("@")
            kind = _kind(name, where)
            if not at:
                if default is not None:
                    raise RecipeError(f'"{text}" names two kinds for the other layers', where=where)
                default = kind
                continue
            for item in layers.split(","):
                if not re.fullmatch("[0-9]{1,9}", item) or int(item) >= num_layers:
                    raise RecipeError(
                        f'"{word}" names layer "{item}"; layers are 0 to {num_layers - 1}', where=where
                    )
                if int(item) in chosen:
                    raise RecipeError(f"layer {item} is placed twice", where=where)
                chosen[int(item)] = kind
        if default is None:
            raise RecipeError(
                f'"{text}" does not say what the other layers become',
                where=where,
                hint='add a kind, as in "full@3,7 kda"',
            )
        return cls(tuple(chosen.get(layer, default) for layer in range(num_layers)))

    def replace(self, layer: int, kind: str) -> Placement:
        """Return a copy with one layer changed."""
        return Placement(tuple(kind if index == layer else old for index, old in enumerate(self.kinds)))

    def diff(self, other: Placement) -> tuple[int, ...]:
        """List the layers whose kind differs."""
        return tuple(
            i for i, pair in enumerate(zip(self.kinds, other.kinds, strict=True)) if pair[0] != pair[1]
        )

    @property
    def converted_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose attention is replaced."""
        return converted_layers(self.kinds)

    @property
    def counts(self) -> str:
        """Kinds with their counts: ``21 kda, 7 full``."""
        return ", ".join(f"{count} {kind}" for kind, count in Counter(self.kinds).most_common())

    def __str__(self) -> str:
        letters = "".join(MIXERS[kind].letter for kind in self.kinds)
        groups = " ".join(letters[start : start + 4] for start in range(0, len(letters), 4))
        return f"{groups} ({self.counts})"


def _kind(word: str, where: str) -> str:
    if word in MIXERS:
        return word
    allowed = ", ".join(MIXERS)
    raise RecipeError(f'unknown mixer "{word}"; allowed: {allowed}', where=where, hint=f"write {_GRAMMAR}")


def converted_layers(kinds: Iterable[str]) -> tuple[int, ...]:
    """List the layers whose kind replaces attention."""
    return tuple(layer for layer, kind in enumerate(kinds) if MIXERS[kind].replaces_attention)


def placed_kinds(config: Any) -> tuple[str, ...]:
    """Read each layer's kind from a model's configuration; a stock transformer keeps all its attention."""
    if config.model_type == "gendistill":
        return tuple(config.mixers)
    return (FULL.kind,) * config.num_hidden_layers

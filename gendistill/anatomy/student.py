"""What a student's configuration says of its mixers. Standard library only: it travels inside exported students."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gendistill.anatomy.family import geometry_of
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.settings import read_settings
from gendistill.anatomy.spec import ParameterSpec


def mixer_settings(config: Mapping[str, Any], kind: str) -> Any:
    """Read the settings of a kind from a student's configuration as plain data; None if it has none.

    Raises:
        ValueError: They are not settings of that kind.
    """
    settings = MIXERS[kind].settings
    if settings is None:
        return None
    given = (config.get("mixer_configs") or {}).get(kind, {})
    return read_settings(settings, given, where=f"mixer_configs.{kind}")


def mixer_tables(config: Mapping[str, Any]) -> dict[str, dict[str, ParameterSpec]]:
    """Map each kind that replaces attention somewhere in a student to the parameters of its module."""
    geometry = geometry_of(config)
    return {
        kind: MIXERS[kind].parameters(geometry, mixer_settings(config, kind))
        for kind in dict.fromkeys(config.get("mixers") or ())
        if MIXERS[kind].replaces_attention
    }


def mixer_names(config: Mapping[str, Any], holds: Callable[[ParameterSpec], bool]) -> frozenset[str]:
    """Name the parameters of a student's mixers of which something holds, each by its layer: ``layers.0.self_attn.x``.

    Args:
        config: The student's configuration as plain data.
        holds: Says whether it does.
    """
    tables = mixer_tables(config)
    return frozenset(
        f"layers.{layer}.self_attn.{name}"
        for layer, kind in enumerate(config.get("mixers") or ())
        for name, spec in tables.get(kind, {}).items()
        if holds(spec)
    )

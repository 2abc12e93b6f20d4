"""The groups of parameters that a stage trains or freezes; one function names a tensor's. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.student import mixer_names
from gendistill.errors import RecipeError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+)\.")


class ParamGroup(StrEnum):
    """One of the six groups of parameters that a stage can train or freeze."""

    MIXER = "mixer"
    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"
    EMBED = "embed"
    HEAD = "head"


def layer_part(name: str) -> tuple[int, str] | None:
    """Split a tensor's name into its layer and the part of it: ``self_attn``, ``mlp``, a norm; None outside layers."""
    match = _LAYER.match(name)
    return (int(match[1]), match[2]) if match else None


def param_group(name: str, kinds: Sequence[str], *, tied_head: bool) -> ParamGroup:
    """Say which group a parameter belongs to.

    A tied head is the embedding, so its name gives ``embed``. The QK-norms of kept attention belong to
    ``attention``, everything inside a converted layer's ``self_attn`` to ``mixer``.

    Args:
        name: Name in the student.
        kinds: Mixer of each layer.
        tied_head: Whether the head is the embedding.
    Raises:
        RecipeError: The name fits no group.
    """
    if name.startswith("model.embed_tokens."):
        return ParamGroup.EMBED
    if name.startswith("lm_head."):
        return ParamGroup.EMBED if tied_head else ParamGroup.HEAD
    if name.startswith("model.norm."):
        return ParamGroup.NORM
    layer, part = layer_part(name) or (None, "")
    if layer is not None and part == "self_attn":
        return ParamGroup.MIXER if MIXERS[kinds[layer]].replaces_attention else ParamGroup.ATTENTION
    if part == "mlp":
        return ParamGroup.MLP
    if part.endswith("layernorm"):
        return ParamGroup.NORM
    raise RecipeError(
        f'parameter "{name}" belongs to none of the groups {", ".join(ParamGroup)}',
        hint="this model family is not supported for training",
    )


def undecayed(config: Mapping[str, Any]) -> frozenset[str]:
    """Name the parameters of a student's mixers that weight decay leaves alone whatever their shape.

    Args:
        config: The model's configuration as plain data.
    """
    if config.get("model_type") != "gendistill":
        return frozenset()
    return frozenset(f"model.{name}" for name in mixer_names(config, lambda spec: not spec.decays))

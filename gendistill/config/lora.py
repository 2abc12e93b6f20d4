"""The ``lora:`` section of a stage: low-rank adapters on groups that are otherwise frozen."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from gendistill.anatomy.adapters import ADAPTABLE
from gendistill.anatomy.groups import ParamGroup
from gendistill.config.base import Section
from gendistill.config.patterns import Pattern


class LoRAConfig(Section):
    """Low-rank adapters on linear layers whose own weights stay frozen; merged into them when the stage ends."""

    rank: int = Field(
        ge=1,
        le=2**16,
        description="of every adapter, which must hold fewer numbers than the weight that it adapts",
    )
    alpha: float | None = Field(
        default=None, gt=0, le=1e6, description="an adapter counts alpha / rank times; null: twice the rank"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of what goes into the adapters")
    groups: tuple[ParamGroup, ...] = Field(
        min_length=1, description="groups whose linear layers are adapted; none of those under train"
    )
    only: tuple[Pattern, ...] = Field(
        default=(), description="regexes that narrow the adapted weights by name"
    )

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        if beyond := [group for group in self.groups if group not in ADAPTABLE]:
            names = ", ".join(beyond)
            raise ValueError(
                f"LoRA cannot reach {names}: norms are vectors, and losses read embedding and head as whole tensors; "
                f"allowed: {', '.join(ADAPTABLE)}. Move {names} to train, where it learns whole"
            )
        return self

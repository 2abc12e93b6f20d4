"""Attention within a window, by the family's own module and transformers' mask and cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gendistill.anatomy.family import Geometry
from gendistill.anatomy.settings import setting
from gendistill.anatomy.spec import Kept, MixerSpec, attention_flops, attention_kept, causal_pairs


@dataclass(frozen=True, slots=True)
class SWASettings:
    """Sliding-window attention: its shape; its weights are the teacher's."""

    window: int = setting(512, "tokens a query sees, itself included", ge=1, le=2**30)


class SWASpec(MixerSpec):
    """Softmax attention to the last tokens."""

    kind = "swa"
    letter = "S"
    colour = ("#007d5a", "white")
    about = "softmax attention within a window"
    settings = SWASettings
    layer_type = "sliding_attention"
    in_every_key = True

    def kept(self, geometry: Geometry, settings: Any, impl: str | None) -> Kept:
        """Count what softmax attention keeps."""
        return attention_kept(geometry)

    def mixing_flops(self, geometry: Geometry, settings: SWASettings, length: int) -> int:
        """Count softmax attention to the window."""
        return attention_flops(geometry, causal_pairs(length, settings.window))


SWA = SWASpec()

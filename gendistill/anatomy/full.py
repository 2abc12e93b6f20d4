"""Attention as the checkpoint has it, by its family's own module."""

from __future__ import annotations

from typing import Any

from gendistill.anatomy.family import Geometry
from gendistill.anatomy.spec import Kept, MixerSpec, attention_flops, attention_kept, causal_pairs


class FullSpec(MixerSpec):
    """Softmax attention, within a window only where the checkpoint has one."""

    kind = "full"
    letter = "F"
    colour = ("#e69f00", "#1b2430")
    about = "softmax attention"
    layer_type = "full_attention"

    def kept(self, geometry: Geometry, settings: Any, impl: str | None) -> Kept:
        """Count what softmax attention keeps."""
        return attention_kept(geometry)

    def mixing_flops(self, geometry: Geometry, settings: Any, length: int) -> int:
        """Count softmax attention to all tokens before; :mod:`~gendistill.anatomy.cost` knows a checkpoint's window."""
        return attention_flops(geometry, causal_pairs(length))


FULL = FullSpec()

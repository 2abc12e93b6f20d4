"""Attention within a window that also sees the first tokens of its document.

A kind of its own beside ``swa``: that one leaves the family's module, mask and cache as they are, is exact for models
that were trained with a window, and belongs to the group ``attention``. This one is the control of a linear mixer. It
has a module and a state of ours, so that it is placed, trained, cached and counted as they are, windows count tokens
and never padding, and every model may have its own window beside the one that transformers knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gendistill.anatomy.family import Geometry, attention_shapes
from gendistill.anatomy.settings import setting
from gendistill.anatomy.spec import (
    Init,
    Kept,
    MixerSpec,
    ParameterSpec,
    StateSpec,
    attention_flops,
    attention_kept,
    causal_pairs,
)

# queries that share one product and one mask; their keys are themselves, the window before them and the first tokens
BLOCK = 512


@dataclass(frozen=True, slots=True)
class SinkSettings:
    """Attention to the last tokens and the first ones (arXiv 2309.17453): its shape; its weights are the teacher's."""

    window: int = setting(512, "tokens a query sees, itself included", ge=1, le=2**20)
    sinks: int = setting(4, "first tokens of its document that it sees as well", ge=0, le=2**10)


class SinkSpec(MixerSpec):
    """Softmax attention to the last tokens and the first ones."""

    kind = "sink"
    letter = "W"
    colour = ("#cc79a7", "#1b2430")
    about = "softmax attention to the last and the first tokens"
    advice = "a wider window"
    settings = SinkSettings
    module = "gendistill.mixers.sink:SinkAttention"

    def parameters(self, geometry: Geometry, settings: SinkSettings) -> dict[str, ParameterSpec]:
        """List the attention's own tensors: all are transferred as they are."""
        starts = {"bias": Init("zeros"), "weight": Init("normal", (geometry.initializer_range,))}
        return {
            name: ParameterSpec(
                shape,
                Init("ones") if "norm" in name else starts[name.rpartition(".")[2]],
                from_attention=name,
            )
            for name, shape in attention_shapes(geometry).items()
        }

    def state(self, geometry: Geometry, settings: SinkSettings) -> dict[str, StateSpec]:
        """List the cached keys and values, ``sinks`` first ones and ``window - 1`` last ones, and the tokens seen."""
        slots = settings.sinks + settings.window - 1
        cells = StateSpec((slots, geometry.num_kv_heads, geometry.head_dim))
        return {"keys": cells, "values": cells, "seen": StateSpec((), "int64")}

    def kept(self, geometry: Geometry, settings: SinkSettings, impl: str | None) -> Kept:
        """Count what softmax attention keeps, and per head the keys and values of a block and the window before it."""
        q = geometry.num_heads * geometry.head_dim
        return Kept(attention_kept(geometry).numbers + 2 * q * math.ceil(1 + settings.window / BLOCK))

    def mixing_flops(self, geometry: Geometry, settings: SinkSettings, length: int) -> int:
        """Count softmax attention to the window, and to the first tokens where they have left it."""
        far = sum(max(0, length - settings.window - first) for first in range(settings.sinks))
        return attention_flops(geometry, causal_pairs(length, settings.window) + far)


SINK = SinkSpec()

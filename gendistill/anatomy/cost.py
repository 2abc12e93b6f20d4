"""What models cost: bytes of caches, and of what the loss works on. Each mixer tells its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gendistill.anatomy.family import geometry_of
from gendistill.anatomy.full import FULL
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.student import mixer_settings

# One chunk's float32 logits in the divergences, by kind of device. Small enough on a CPU to stay in a last-level cache
# of 32 MiB: the element-wise part is 2.4 times faster at 24 MiB than at 96 MiB (V = 49,152, two cores), and the matmuls
# are no slower. On a GPU the choice keeps 16k tokens of V = 151,936, D = 1,024 under 2 GiB even when the head trains
# (1.9 GiB; 1.3 GiB when it does not); 1 GiB chunks would be 9% faster with a frozen head and take 6 GiB (one H200).
LOSS_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 192 * 2**20, "triton": 640 * 2**20}


def cache_bytes(config: Mapping[str, Any], *, tokens: int, bytes_per_value: int = 2) -> int:
    """Compute the bytes that one sequence occupies in the cache.

    Args:
        config: A family's config, or a student's with ``mixers`` and ``mixer_configs``.
        tokens: Length of the sequence.
        bytes_per_value: Of keys, values and whatever else has the dtype of the activations.
    Source: per attention layer ``2 * kv_heads * head_dim`` values a token (at most a window of them, of which the
        newest need not be kept); per layer of a module of ours what its spec lists as its state.
    """
    geometry = geometry_of(config)
    kinds = config.get("mixers") or [FULL.kind] * geometry.num_layers
    layer_types = config.get("layer_types") or [FULL.layer_type] * geometry.num_layers
    window = config.get("sliding_window")
    total = 0
    for kind, layer_type in zip(kinds, layer_types, strict=True):
        spec = MIXERS[kind]
        if spec.replaces_attention:
            state = spec.state(geometry, mixer_settings(config, kind))
            total += sum(one.num_bytes(bytes_per_value) for one in state.values())
        else:
            kept = min(tokens, window - 1) if layer_type == "sliding_attention" and window else tokens
            total += bytes_per_value * 2 * geometry.num_kv_heads * geometry.head_dim * kept
    return total

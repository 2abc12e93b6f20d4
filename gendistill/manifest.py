"""What a run folder says about itself, and which of its steps are finished. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gendistill.conversion.family import read_geometry
from gendistill.paths import read_json, write_json

CACHE_LENGTHS = (512, 2048, 8192, 32768, 131072)


class Manifest:
    """Read and write ``manifest.json``; a step counts as finished when its fingerprint is recorded.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = read_json(path) if path.is_file() else {}

    def update(self, **entries: Any) -> None:
        """Set entries and write the file."""
        self.content.update(entries)
        write_json(self.path, self.content)

    def is_done(self, step: str, fingerprint: str) -> bool:
        """Whether the step has finished with the same inputs."""
        return self.content.get("steps", {}).get(step) == fingerprint

    def finish(self, step: str, fingerprint: str) -> None:
        """Record that a step has finished."""
        self.update(steps={**self.content.get("steps", {}), step: fingerprint})

    def begin(self, step: str) -> None:
        """Forget that a step had finished, before its output is replaced."""
        steps = {name: value for name, value in self.content.get("steps", {}).items() if name != step}
        self.update(steps=steps)


def fingerprint(*inputs: Any) -> str:
    """Hash everything that a step's output depends on; inputs are JSON-like."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_bytes(config: Mapping[str, Any], *, tokens: int, bytes_per_value: int = 2) -> int:
    """Compute the bytes that one sequence occupies in the cache.

    Args:
        config: A family's config, or a student's with ``mixers`` and ``mixer_configs``.
        tokens: Length of the sequence.
        bytes_per_value: Of keys, values and convolution states; recurrent states are float32.
    Source: per attention layer ``2 * kv_heads * head_dim`` values a token (at most a window of them); per KDA layer
        ``heads * head_dim ** 2`` float32 numbers and ``conv_size - 1`` inputs of q, k and v.
    """
    teacher = {**config, "model_type": config.get("base_model_type", config["model_type"])}
    geometry = read_geometry({name: value for name, value in teacher.items() if name != "layer_types"})
    mixers = config.get("mixers") or ["full"] * geometry.num_layers
    layer_types = config.get("layer_types") or ["full_attention"] * geometry.num_layers
    window = config.get("sliding_window")
    taps = (config.get("mixer_configs") or {}).get("kda", {}).get("conv_size", 4)
    total = 0
    for mixer, layer_type in zip(mixers, layer_types, strict=True):
        if mixer == "kda":
            channels = (geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_dim
            total += 4 * geometry.num_heads * geometry.head_dim**2
            total += bytes_per_value * channels * max(taps - 1, 0)
        else:
            kept = min(tokens, window - 1) if layer_type == "sliding_attention" and window else tokens
            total += bytes_per_value * 2 * geometry.num_kv_heads * geometry.head_dim * kept
    return total

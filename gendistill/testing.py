"""Tiny random models for tests, the doctor and anyone who wants to try an idea in a second."""

from __future__ import annotations

from typing import Any

import torch

from gendistill.anatomy.family import FAMILIES as _FAMILIES
from gendistill.checkpoints.builtin import TINY_SIZES, save_tiny_checkpoint, tiny_teacher
from gendistill.models import HybridConfig, HybridForCausalLM

__all__ = ["FAMILIES", "PLACEMENTS", "save_tiny_checkpoint", "tiny_student", "tiny_teacher"]

FAMILIES = tuple(_FAMILIES)
PLACEMENTS = {
    "mixed": ["kda", "full", "kda", "full"],
    "attention first": ["full", "kda", "kda", "full"],
    "pure": ["kda", "kda", "kda", "kda"],
    "window": ["swa", "kda", "full", "kda"],
    "sinks": ["sink", "full", "sink", "kda"],
    "sinks alone": ["sink", "sink", "sink", "sink"],
}


def tiny_student(
    family: str = "llama",
    placement: str = "mixed",
    *,
    seed: int = 0,
    kda: dict[str, Any] | None = None,
    **overrides: Any,
) -> HybridForCausalLM:
    """Make a random float32 student.

    Weights are large enough that greedy text does not repeat one token, and convolutions and gates are moved away
    from their starting values, where they would do nothing.

    Args:
        family: llama, mistral, qwen2 or qwen3.
        placement: A name in ``PLACEMENTS``.
        seed: Of the weights.
        kda: Settings of the KDA layers.
        overrides: Other fields of the configuration.
    """
    mixers = PLACEMENTS[placement]
    settings = {
        **TINY_SIZES,
        "base_model_type": family,
        "mixers": mixers,
        "mixer_configs": {
            "kda": {"half_life": [1.0, 64.0], **(kda or {})},
            **({"sink": {"window": 5, "sinks": 2}} if "sink" in mixers else {}),
        },
        "sliding_window": 6 if "swa" in mixers else None,
        **overrides,
    }
    torch.manual_seed(seed)
    model = HybridForCausalLM(HybridConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv1d" in name or name.endswith(("dt_bias", "A_log", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model

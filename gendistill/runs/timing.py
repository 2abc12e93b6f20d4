"""Predict how long a stage trains. Imports no torch.

Operations of its steps over what the device does of them in a second: its peak, times the share of it that training has
been measured to reach (MFU). Held-out scores, checkpoints and evaluation are not in it, nor what several processes send
one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gendistill.anatomy.adapters import adapter_name
from gendistill.anatomy.cost import forward_flops, peak_flops, step_flops
from gendistill.config.objectives import BlockOutputConfig, MixerOutputConfig
from gendistill.config.schema import StageConfig
from gendistill.runs.learning import Learning
from gendistill.runs.memory import Device, recomputed_layers

# Share of the dense bfloat16 peak by hidden size, as `gendistill bench step` measured it on one H200 with our kernels,
# fused layers and documents of 500 tokens on average: medians of the SmolLM2-135M, Qwen2.5-0.5B and Qwen3-0.6B shapes
# in docs/results; a test compares them. The nearest size counts, so that a
# much wider model is predicted to be slower than it is, and a much narrower one faster. Layer by layer only the output
# of blocks has been measured.
END_TO_END = {576: 0.28, 896: 0.40, 1024: 0.38}
LAYER_BY_LAYER = {1024: 0.32}
# Attention costs as much in documents of this length as in log-normal ones of 500 tokens on average (spread 1), whose
# lengths, squared, sum up to that many times their tokens.
DOCUMENT_TOKENS = round(500 * math.e)


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """How long a stage trains.

    Attributes:
        hours: None where it cannot be said.
        reason: Why it cannot.
    """

    hours: float | None
    reason: str | None = None


def predict_time(
    stage: StageConfig,
    *,
    steps: int | None,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    learning: Learning,
    device: Device,
    compute_dtype: str,
    kernels: bool,
    num_processes: int = 1,
) -> TimeEstimate:
    """Predict the hours of a stage's steps.

    Args:
        stage: Batch, length and objective; one whose length is given in minutes takes these.
        steps: Its optimizer steps, or None where it is given in minutes.
        student, teacher: Their configurations.
        learning: What learns.
        device: Where it would run.
        compute_dtype: Of matmuls and activations.
        kernels: Whether mixers, loss and decoder layers all run on our kernels.
        num_processes: That share a step.
    """
    if steps is None:
        assert stage.minutes is not None
        return TimeEstimate(stage.minutes / 60)
    peak = peak_flops(device.name) if device.kind == "cuda" else None
    if device.kind != "cuda":
        return TimeEstimate(None, "no utilisation has been measured on a CPU")
    if peak is None:
        return TimeEstimate(None, f"the peak of {device.name} is not known")
    if compute_dtype != "bfloat16":
        return TimeEstimate(None, f"utilisation has been measured in bfloat16, not in {compute_dtype}")
    if not kernels:
        return TimeEstimate(
            None, "utilisation has been measured with our kernels and fused layers, which do not all run here"
        )
    operations = stage_flops(stage, student=student, teacher=teacher, learning=learning)
    rate = peak * utilisation(stage, student["hidden_size"]) * num_processes
    return TimeEstimate(steps * operations / rate / 3600)


def utilisation(stage: StageConfig, hidden_size: int) -> float:
    """Return the share of the peak that was measured with the nearest hidden size."""
    measured = LAYER_BY_LAYER if _is_layerwise(stage) else END_TO_END
    return measured[min(measured, key=lambda width: abs(math.log(width / hidden_size)))]


def stage_flops(
    stage: StageConfig, *, student: Mapping[str, Any], teacher: Mapping[str, Any], learning: Learning
) -> int:
    """Count the operations of one step over all processes; layers that are computed again count again.

    Rows are taken to be full, and every token to count. Arguments as above.
    """
    tokens = stage.batch_size * stage.seq_len
    length = min(stage.seq_len, DOCUMENT_TOKENS)
    documents = (
        {length: tokens // length, tokens % length: 1} if tokens % length else {length: tokens // length}
    )
    needs = learning.objective.needs
    found = step_flops(
        student,
        teacher if needs else None,
        documents=documents,
        num_labels=tokens,
        trained=(*learning.names, *map(adapter_name, learning.adapted_names)),
        reaches=learning.objective.reaches,
        apart=_is_layerwise(stage),
        compares_logits=needs.hidden,
    ).total
    if not _is_layerwise(stage):
        layers = student["num_hidden_layers"]
        found += forward_flops(student, documents) * recomputed_layers(stage, layers) // layers
    return found


def _is_layerwise(stage: StageConfig) -> bool:
    return isinstance(stage.objective, MixerOutputConfig | BlockOutputConfig)

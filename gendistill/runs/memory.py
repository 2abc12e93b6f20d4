"""Predict the peak memory of a training stage, and the size of a cache. Imports no torch.

Weights, gradients and moments are exact. Activations are an estimate from the shapes that each block keeps for its
backward pass; what the allocator wastes is not counted. Measured once: SmolLM2-135M with 8 KDA layers, end to end,
4 x 256 tokens on a CPU, 5.0 GB resident at the peak, 4.9 GB predicted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gendistill.anatomy.family import Geometry, read_geometry
from gendistill.config.objectives import BlockOutputConfig, MixerOutputConfig
from gendistill.config.schema import StageConfig
from gendistill.types import MixerKind, ParamGroup, Placement

# lengths in tokens at which reports compare caches
CACHE_LENGTHS = (512, 2048, 8192, 32768, 131072)
# one chunk's float32 logits in the divergence, and how many buffers of that size live at once (both models'
# logits, their log-probabilities, the gradient)
_LOSS_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}
_LOSS_BUFFERS = 5
# Python, torch and transformers on a CPU; the CUDA context and library workspaces on a GPU
_RUNTIME_BYTES = 600_000_000
# float32 numbers per token, head and channel that the eager chunked delta rule keeps for backward
_DELTA_RULE_COPIES = 24
_PATIENCE_S = 20


@dataclass(frozen=True, slots=True)
class Device:
    """Describe where training would run.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: For people.
        total_bytes: Memory of one device.
    """

    kind: str
    name: str
    total_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Hold the parts of a stage's peak, in bytes per process."""

    teacher: int
    student: int
    optimizer: int
    activations: int
    loss: int
    runtime: int = _RUNTIME_BYTES

    @property
    def total(self) -> int:
        """The predicted peak."""
        return self.teacher + self.student + self.optimizer + self.activations + self.loss + self.runtime

    def to_json(self) -> dict[str, Any]:
        """Return the parts and their sum."""
        return {**asdict(self), "total": self.total}


def find_device() -> Device:
    """Find the first NVIDIA GPU, else the CPU, without importing torch."""
    if (line := _first_gpu()) is not None:
        name, _, mebibytes = line.rpartition(",")
        # a GPU that shares the host's memory says [N/A]
        known = mebibytes.strip().isdecimal()
        return Device("cuda", name.strip(), int(mebibytes) * 2**20 if known else _ram_bytes())
    return Device("cpu", f"CPU with {os.cpu_count()} cores", _ram_bytes())


def _first_gpu() -> str | None:
    """Return the driver's line on the first GPU; None where there is no driver or it does not answer."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.strip().splitlines()
    return lines[0] if answer.returncode == 0 and lines else None


def _ram_bytes() -> int:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # a container may allow less
        limit = Path("/sys/fs/cgroup") / name
        if limit.is_file() and limit.read_text().strip().isdigit():
            total = min(total, int(limit.read_text()))
    return total


def predict_memory(
    stage: StageConfig,
    *,
    geometry: Geometry,
    placement: Placement,
    num_teacher: int,
    num_student: int,
    num_trained: int,
    teacher_bytes: int,
    device: Device,
) -> MemoryEstimate:
    """Predict the peak of one process.

    ``teacher = teacher_bytes * P_teacher``; ``student = 4 * P_student`` (float32 masters), plus ``2 * P_student``
    for the bfloat16 copies of autocast on GPU; ``optimizer = (4 + 8) * P_trained`` (gradient, two moments).

    Args:
        stage: Batch, length and objective.
        geometry: Of the student.
        placement: Mixer of each layer.
        num_teacher: Parameters of the teacher; 0 if the stage needs none.
        num_student: Parameters of the student.
        num_trained: Parameters that learn.
        teacher_bytes: Bytes per teacher parameter.
        device: Where it runs.
    """
    tokens = stage.micro_batch_size * stage.seq_len
    width = 2 if device.kind == "cuda" else 4
    layerwise = isinstance(stage.objective, MixerOutputConfig | BlockOutputConfig)
    kept = _layerwise_bytes if layerwise else _end_to_end_bytes
    return MemoryEstimate(
        teacher=teacher_bytes * num_teacher,
        student=(6 if device.kind == "cuda" else 4) * num_student,
        optimizer=12 * num_trained,
        activations=kept(stage, geometry, placement, tokens, width),
        loss=0 if layerwise else _loss_bytes(stage, geometry, tokens, device),
    )


def _mixer_numbers(geometry: Geometry, kind: MixerKind) -> tuple[int, int]:
    """Count what one mixer keeps per token: numbers in the compute dtype, and float32 numbers.

    Attention keeps its input, q, k, v, the rotated q and k, and its output: ``2h + 3q + 3kv`` with
    ``q = heads * head_dim`` and ``kv = kv_heads * head_dim``. KDA keeps its input, q, k, v before and after the
    convolution, two gates and its output, ``2h + 6q + 4kv``, and the delta rule's float32 working set.
    """
    hidden, q = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    kv = geometry.num_kv_heads * geometry.head_dim
    if kind.is_linear:
        return 2 * hidden + 6 * q + 4 * kv, _DELTA_RULE_COPIES * q
    return 2 * hidden + 3 * q + 3 * kv, 0


def _block_numbers(geometry: Geometry, kind: MixerKind) -> tuple[int, int]:
    """Add what norms and MLP keep: ``3h`` and four times the inner width."""
    numbers, float32 = _mixer_numbers(geometry, kind)
    return (
        numbers + 3 * geometry.hidden_size + 4 * geometry.intermediate_size,
        float32 + 2 * geometry.hidden_size,
    )


def _end_to_end_bytes(
    stage: StageConfig, geometry: Geometry, placement: Placement, tokens: int, width: int
) -> int:
    """Sum what all blocks keep; with checkpointing, each block's input and the largest block."""
    blocks = [_block_numbers(geometry, kind) for kind in placement.kinds]
    sizes = [tokens * (width * numbers + 4 * float32) for numbers, float32 in blocks]
    if stage.gradient_checkpointing:
        return 4 * tokens * geometry.hidden_size * len(sizes) + max(sizes)
    return sum(sizes)


def _layerwise_bytes(
    stage: StageConfig, geometry: Geometry, placement: Placement, tokens: int, width: int
) -> int:
    """Sum what the converted layers keep, and the teacher's recorded input and output of each of them."""
    per_layer = _block_numbers if isinstance(stage.objective, BlockOutputConfig) else _mixer_numbers
    total = 0
    for layer in placement.linear_layers:
        numbers, float32 = per_layer(geometry, placement.kinds[layer])
        total += tokens * (width * (numbers + 2 * geometry.hidden_size) + 4 * float32)
    return total


def _loss_bytes(stage: StageConfig, geometry: Geometry, tokens: int, device: Device) -> int:
    """Sum the logits of one chunk, the gradient of the hidden states, and of the head where it learns."""
    chunk = min(_LOSS_CHUNK_BYTES[device.kind], 4 * tokens * geometry.vocab_size)
    head = ParamGroup.HEAD in stage.train or (geometry.tied_head and ParamGroup.EMBED in stage.train)
    gradients = 4 * tokens * geometry.hidden_size + (
        4 * geometry.vocab_size * geometry.hidden_size if head else 0
    )
    return _LOSS_BUFFERS * chunk + gradients


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

"""Predict the peak memory of a training stage. Imports no torch.

Weights, gradients and moments are exact. Activations are an estimate from the shapes that each block keeps for its
backward pass; what the allocator wastes is not counted. Measured: SmolLM2-135M with 8 KDA layers, end to end, 4 x 256
tokens on a CPU, 5.0 GB resident at the peak, 4.9 GB predicted; six stages of three shapes on one H200, within 2.5%.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gendistill.anatomy.cost import LOSS_CHUNK_BYTES
from gendistill.anatomy.family import Geometry, outer_shapes
from gendistill.anatomy.groups import ParamGroup
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.placement import Placement
from gendistill.anatomy.spec import Kept
from gendistill.config.engine import EngineConfig
from gendistill.config.mixers import MixersConfig
from gendistill.config.objectives import BlockOutputConfig, MixerOutputConfig
from gendistill.config.schema import StageConfig
from gendistill.runs.learning import Learning

# lengths in tokens at which reports compare caches
CACHE_LENGTHS = (512, 2048, 8192, 32768, 131072)
# how many buffers of a chunk of the divergence's logits live at once: both models' logits, in torch also their
# log-probabilities and the gradient
_LOSS_BUFFERS = {"cpu": 5, "cuda": 5, "triton": 2}
# Python, torch and transformers on a CPU; the CUDA context and library workspaces on a GPU
_RUNTIME_BYTES = 600_000_000
# What the memory of CUDA graphs holds besides activations, as a part of these: blocks that their lifetimes leave free.
# 0.21 to 0.27, by what training-h200.json in docs/results has more than training-h200-f2baed8.json, without graphs.
_BETWEEN_BLOCKS = 0.24
_PATIENCE_S = 20


@dataclass(frozen=True, slots=True)
class Device:
    """Where training would run.

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
    """The parts of a stage's peak, in bytes per process."""

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
    mixers: MixersConfig,
    impl: str | None,
    num_teacher: int,
    num_student: int,
    learning: Learning,
    teacher_bytes: int,
    device: Device,
    loss: str,
    fused: bool = False,
    num_shards: int = 1,
    engine: EngineConfig | None = None,
    buckets: bool = False,
) -> MemoryEstimate:
    """Predict the peak of one process.

    ``teacher = teacher_bytes * P_teacher``; ``student = 4 * P_student`` (float32 masters, adapters included), plus
    ``2 * P_student`` for bfloat16 copies where the arithmetic is in bfloat16 (4 where layers run fused in float32);
    ``optimizer = 4 * P_trained`` for gradients, plus the moments, ``8 * P_trained`` in float32. Sharded over processes,
    each has its part of all these, and whole what lies outside the blocks, with its gradients where it learns, and two
    blocks at a time; an objective that works layer by layer keeps every converted one. Where the engine keeps gathered
    weights for a step, there are whole copies of all blocks and whole gradients, too, and the teacher is not sharded.
    What is gathered in another dtype than that of the arithmetic is there in both. Passes as CUDA graphs need about a
    quarter more for activations.

    Args:
        stage: Batch, length and objective.
        geometry: Of the student.
        placement: Mixer of each layer.
        mixers: Their settings.
        impl: What the mixers run on: ``reference`` or ``triton``; None if they have no choice.
        num_teacher: Parameters of the teacher.
        num_student: Parameters of the student, without adapters.
        learning: What learns.
        teacher_bytes: Bytes per teacher parameter.
        device: Where it runs.
        loss: What computes losses on logits: ``reference`` or ``triton``.
        fused: Whether decoder layers run fused.
        num_shards: Processes that share parameters, gradients and moments.
        engine: When sharded weights that are gathered are let go, and whether passes are captured.
        buckets: Whether processes with whole models share gradients while others are computed, by way of buffers as
            large as these.
    """
    tokens = stage.micro_batch_size * stage.seq_len
    width = _width(stage, device)
    layerwise = isinstance(stage.objective, MixerOutputConfig | BlockOutputConfig)
    kept = {
        kind: MIXERS[kind].kept(geometry, mixers.of(kind), impl) for kind in dict.fromkeys(placement.kinds)
    }
    parts = [kept[kind] for kind in placement.kinds]
    engine = engine or EngineConfig()
    copied = num_shards > 1 and stays_gathered(
        engine, stage, geometry=geometry, num_student=num_student + learning.num_adapters, device=device
    )
    # mixers in torch read the lengths of documents on the host
    captured = impl != "reference" and fused and engine.may_capture(device.kind)
    captured = captured and (num_shards == 1 or copied)
    # blocks whose gathered matrices are there together
    at_once = len(placement.converted_layers) if layerwise else min(2, geometry.num_layers)
    if layerwise:
        converted = [parts[layer] for layer in placement.converted_layers]
        activations = _layerwise_bytes(stage, geometry, converted, tokens, width, fused=fused)
    else:
        activations = _end_to_end_bytes(stage, geometry, parts, tokens, width, fused=fused)
    layers = geometry.num_layers
    # of layers that are computed again, one at a time
    held = layers if layerwise else max(1, layers - recomputed_layers(stage, layers))
    if not fused:
        activations += width * tokens * learning.kept_by_adapters(dropout=_drops(stage)) * held // layers
    if captured:
        activations += round(activations * _BETWEEN_BLOCKS)
    loss_bytes = 0 if layerwise else _loss_bytes(stage, geometry, tokens, device, loss)
    return MemoryEstimate(
        teacher=_teacher_bytes(
            num_teacher,
            teacher_bytes,
            geometry,
            1 if engine.keeps_whole(teacher_bytes * num_teacher, device.total_bytes) else num_shards,
        ),
        student=_student_bytes(
            num_student + learning.num_adapters,
            learning,
            geometry,
            width,
            _gathered_width(engine, width),
            num_shards,
            None if copied else at_once,
            fused=fused,
        )
        # those of all micro-batches are added up before they are shared
        + (4 * learning.num_trained if copied else 0),
        # a step is taken when activations have gone, whose memory graphs keep
        optimizer=(4 * learning.num_trained * (2 if buckets else 1) + learning.moments) // num_shards
        + max(0, learning.work - (0 if captured else activations + loss_bytes)),
        activations=activations,
        loss=loss_bytes,
    )


def stays_gathered(
    engine: EngineConfig, stage: StageConfig, *, geometry: Geometry, num_student: int, device: Device
) -> bool:
    """Say whether processes that share a student will have whole copies of it for the length of a step.

    Args:
        engine: How it is computed.
        stage: Whose arithmetic it is.
        geometry: Of the student.
        num_student: Parameters of it, adapters included.
        device: Of each process.
    """
    copies = _copies_bytes(num_student, geometry, _gathered_width(engine, _width(stage, device)))
    return engine.keeps_whole(copies, device.total_bytes)


def _width(stage: StageConfig, device: Device) -> int:
    """Return the bytes of a number of the arithmetic."""
    # of a CPU's bfloat16 nothing is assumed: only some have it, and for wide models alone
    half = device.kind == "cuda" if stage.compute_dtype == "auto" else stage.compute_dtype == "bfloat16"
    return 2 if half else 4


def _gathered_width(engine: EngineConfig, width: int) -> int:
    """Return the bytes of a number of a block's weights that are gathered."""
    return 4 if engine.gather == "float32" else width


def _copies_bytes(num_student: int, geometry: Geometry, width: int) -> int:
    """Sum whole copies: blocks in a dtype of this width, the rest in float32."""
    outside, _ = _sizes(num_student, geometry)
    return width * (num_student - outside) + 4 * outside


def recomputed_layers(stage: StageConfig, num_layers: int) -> int:
    """Count the layers whose activations are computed again."""
    asked = stage.gradient_checkpointing
    return num_layers if asked is True else min(int(asked), num_layers)


def _drops(stage: StageConfig) -> bool:
    return stage.lora is not None and stage.lora.dropout > 0


def _teacher_bytes(num_teacher: int, bytes_each: int, geometry: Geometry, num_shards: int) -> int:
    """Sum its weights: all, or a part of them beside what lies outside its blocks and two blocks, whole."""
    if num_shards == 1:
        return bytes_each * num_teacher
    outside, block = _sizes(num_teacher, geometry)
    return bytes_each * min(num_teacher, num_teacher // num_shards + outside + 2 * block)


def _student_bytes(
    num_student: int,
    learning: Learning,
    geometry: Geometry,
    width: int,
    gathered: int,
    num_shards: int,
    at_once: int | None,
    *,
    fused: bool,
) -> int:
    """Sum float32 masters, and what is made of them to be used: of so many blocks at once, or of all for a step."""
    if num_shards == 1:
        # fused layers pack what learns, whatever its dtype
        return num_student * (4 + (width if fused or width < 4 else 0))
    masters = 4 * num_student // num_shards
    # what arrives in another dtype than that of arithmetic is cast
    width = gathered if gathered == width else gathered + width
    if at_once is None:
        return masters + _copies_bytes(num_student, geometry, width)
    outside, block = _sizes(num_student, geometry)
    learns = any(group in (ParamGroup.EMBED, ParamGroup.HEAD) for group, _ in learning.whole)
    return masters + width * at_once * block + 4 * outside * (2 if learns else 1)


def _sizes(num_parameters: int, geometry: Geometry) -> tuple[int, int]:
    """Count the parameters outside the blocks of a model, and those of a block."""
    outside = sum(math.prod(shape) for shape in outer_shapes(geometry).values())
    return outside, (num_parameters - outside) // geometry.num_layers


def _block(geometry: Geometry, mixer: Kept, *, fused: bool) -> Kept:
    """Add what norms and MLP keep.

    As the families' modules run: ``3h`` and four times the inner width, and two float32 rows. Fused: of the ``2h`` that
    a mixer counts for its input, the residual stream before it is one of the float32 rows; the MLP keeps its input and
    the outputs of gate and up, ``h`` and twice the inner width.
    """
    hidden, inner = geometry.hidden_size, geometry.intermediate_size
    numbers = 2 * inner if fused else 3 * hidden + 4 * inner
    return Kept(mixer.numbers + numbers, mixer.float32 + 2 * hidden)


def _end_to_end_bytes(
    stage: StageConfig, geometry: Geometry, mixers: Sequence[Kept], tokens: int, width: int, *, fused: bool
) -> int:
    """Sum what blocks keep. Of those that are computed again it is their input, and later what the largest keeps."""
    sizes = [tokens * _block(geometry, mixer, fused=fused).num_bytes(width) for mixer in mixers]
    number = recomputed_layers(stage, len(sizes))
    inputs = 4 * tokens * geometry.hidden_size * number
    # when the first of them is computed again, the blocks behind it have let go
    return inputs + max([sum(sizes[number:]), *sizes[:number]])


def _layerwise_bytes(
    stage: StageConfig, geometry: Geometry, mixers: Sequence[Kept], tokens: int, width: int, *, fused: bool
) -> int:
    """Sum what the converted layers keep, and the teacher's recorded input and output of each of them."""
    blocks = isinstance(stage.objective, BlockOutputConfig)
    kept = [_block(geometry, mixer, fused=fused) if blocks else mixer for mixer in mixers]
    recorded = 2 * geometry.hidden_size * width
    return sum(tokens * (one.num_bytes(width) + recorded) for one in kept)


def _loss_bytes(stage: StageConfig, geometry: Geometry, tokens: int, device: Device, loss: str) -> int:
    """Sum the logits of one chunk, the gradient of the hidden states, and of the head where it learns."""
    kind = "triton" if loss == "triton" else device.kind
    chunk = min(LOSS_CHUNK_BYTES[kind], 4 * tokens * geometry.vocab_size)
    head = ParamGroup.HEAD in stage.train or (geometry.tied_head and ParamGroup.EMBED in stage.train)
    gradients = 4 * tokens * geometry.hidden_size + (
        4 * geometry.vocab_size * geometry.hidden_size if head else 0
    )
    return _LOSS_BUFFERS[kind] * chunk + gradients

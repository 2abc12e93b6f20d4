"""Carry out a conversion plan, tensor by tensor, whatever the size of the checkpoint."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gendistill.checkpoints.progress import byte_progress
from gendistill.checkpoints.resolve import Checkpoint
from gendistill.checkpoints.tensors import NewTensor, TensorInfo, read_tensor_index, write_shards
from gendistill.conversion.plan import ConversionPlan, Origin, TensorStep
from gendistill.errors import CheckpointError, OutputError
from gendistill.mixers.init import initial_value
from gendistill.models.io import copy_companions
from gendistill.paths import new_folder, real_path, write_json

MAX_SHARD_BYTES = 4_000_000_000
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def apply_plan(
    plan: ConversionPlan,
    source: Checkpoint,
    out: Path,
    *,
    seed: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the student that a plan describes.

    Copied values go from file to file; at most one tensor is in memory. The folder appears when it is complete,
    and replaces an older one.

    Args:
        plan: Made from the same checkpoint.
        source: The checkpoint; it is only read.
        out: New folder of the student.
        seed: Seed of new tensors. Each has its own generator, so that its values depend on its name alone.
        max_shard_bytes: Upper size of one safetensors file.
    Raises:
        CheckpointError: A tensor that is used holds NaN or infinities.
        OutputError: ``out`` overlaps the source, cannot be written, or does not fit on the disk.
    """
    _check_apart(source.folder, out)
    _check_space(out, plan.num_bytes)
    tensors = read_tensor_index(source.folder)
    steps = {step.name: step for step in plan.steps}

    def values(tensor: NewTensor) -> Iterable[bytes]:
        return _values(steps[tensor.name], tensors, seed)

    with new_folder(out) as partial, byte_progress("converting", plan.num_bytes) as advance:
        copy_companions(source.folder, partial)
        write_json(partial / "config.json", plan.student_config)
        entries = [step.as_new_tensor() for step in plan.steps]
        write_shards(partial, entries, values, max_shard_bytes=max_shard_bytes, on_bytes=advance)


def _check_apart(source: Path, out: Path) -> None:
    source, target = real_path(source), real_path(out)
    if source == target or source in target.parents or target in source.parents:
        raise OutputError(
            f"the student would be written to {out}, which overlaps its source {source}",
            where=str(out),
            hint="choose an output folder apart from the checkpoint: it is never modified",
        )


def _check_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"the student needs {needed / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB left",
            where=str(out),
            hint="free space or choose another folder with output=..., then run the same command",
        )


def _values(step: TensorStep, tensors: dict[str, TensorInfo], seed: int) -> Iterable[bytes]:
    if step.origin is Origin.COPIED:
        return _finite_chunks(step.sources[0], tensors[step.sources[0]])
    if step.origin is Origin.TRANSFORMED:
        projection, scale = (_read(name, tensors[name]) for name in step.sources)
        return [_bytes_of(fold_head_scale(projection, scale), step.dtype)]
    assert step.init is not None
    value = initial_value(step.init, step.shape, generator=_generator(seed, step.name))
    return [_bytes_of(value, step.dtype)]


def fold_head_scale(projection: Tensor, scale: Tensor) -> Tensor:
    """Multiply each head's output channels by a per-channel scale.

    Args:
        projection: ``[heads * head_dim, hidden_size]`` weight or ``[heads * head_dim]`` bias of q or k.
        scale: ``[head_dim]`` scale of the RMSNorm that follows it.
    Returns:
        Float32, shaped as the projection. Heads point where the norm's output points; an L2 norm per head after
        it removes the remaining difference in length.
    """
    heads = projection.float().unflatten(0, (-1, scale.shape[0]))
    return (heads * scale.float().reshape(1, -1, *([1] * (projection.dim() - 1)))).flatten(0, 1)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _finite_chunks(name: str, info: TensorInfo) -> Iterator[bytes]:
    for chunk in info.chunks():
        if not torch.frombuffer(bytearray(chunk), dtype=_TORCH_DTYPES[info.dtype]).isfinite().all():
            raise CheckpointError(
                f"{name} holds values that are not finite",
                where=str(info.file),
                hint="use a checkpoint without NaN and infinities",
            )
        yield chunk


def _read(name: str, info: TensorInfo) -> Tensor:
    raw = bytearray(b"".join(_finite_chunks(name, info)))
    return torch.frombuffer(raw, dtype=_TORCH_DTYPES[info.dtype]).reshape(info.shape)


def _bytes_of(value: Tensor, dtype: str) -> bytes:
    stored = value.to(_TORCH_DTYPES[dtype]).contiguous()
    return stored.view(torch.uint8).numpy().tobytes()

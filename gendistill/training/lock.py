"""What is decided before the first step of a stage and never again: its length, its arithmetic, its settings."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict

from gendistill.config.base import identity
from gendistill.config.schema import StageConfig
from gendistill.data.batch import Batch
from gendistill.errors import CheckpointError, RecipeError
from gendistill.paths import read_json, write_json
from gendistill.records import Number, Positive

_MOST_PROBES = 3
_PROBE_SECONDS = 10.0
# the only locked setting that no recipe holds
_STUDENT = "initial student"


@with_config(ConfigDict(extra="forbid"))
class _LockFile(TypedDict):
    steps: Positive
    compute_dtype: Literal["float32", "bfloat16"]
    seconds_per_step: Number | None
    locked: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StageLock:
    """What is decided once; ``plan.json`` of the stage.

    Attributes:
        steps: Optimizer steps of the stage.
        compute_dtype: ``float32`` or ``bfloat16``: matmuls and activations.
        seconds_per_step: As timed for a budget in minutes, else None.
        locked: Every setting that a resumed stage must share, by its path in the recipe.
    """

    steps: int
    compute_dtype: str
    seconds_per_step: float | None
    locked: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ``compute_dtype`` names."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.compute_dtype]


def locked_settings(
    stage: StageConfig, *, name: str, seed: int, checksums: dict[str, int], extra: dict[str, Any]
) -> dict[str, Any]:
    """List what must not change between a stop and a resume.

    Args:
        stage: The stage.
        name: Its name.
        seed: The recipe's.
        checksums: Of the student's parameters before the stage.
        extra: More settings that the stage depends on (teacher, data), as JSON.
    """
    digest = weights_digest(checksums)
    return {
        **_flat(f"stages.{name}", identity(stage)),
        "seed": seed,
        _STUDENT: digest,
        **_flat("", extra),
    }


def weights_digest(checksums: Mapping[str, int]) -> str:
    """Hash what ``checksums`` returns to 16 hexadecimal digits."""
    return hashlib.sha256(repr(sorted(checksums.items())).encode()).hexdigest()[:16]


def existing_lock(path: Path, locked: dict[str, Any], checkpoint: Path | None) -> StageLock | None:
    """Read what was decided for a stage that has begun, and refuse it if the recipe has changed since.

    Args:
        path: ``plan.json``.
        locked: The settings as they are now.
        checkpoint: Where the stage would resume; without one nothing is lost, and the decisions of another
            recipe are simply replaced.
    Raises:
        CheckpointError: There is a checkpoint, and a locked setting differs or the file cannot be read.
    """
    if not path.exists() and checkpoint is None:
        return None
    hint = f"restore the recipe to resume, or delete {path.parent} to start this stage again"
    try:
        lock = StageLock(**read_json(path, shape=_LockFile, error=CheckpointError))
    except CheckpointError as error:
        if checkpoint is None:
            return None
        message = f"cannot read the stage's plan: {error.message}"
        raise CheckpointError(message, where=str(path), hint=hint) from error
    if lock.locked == locked:
        return lock
    if checkpoint is None:
        return None
    if {**lock.locked, _STUDENT: None} == {**locked, _STUDENT: None}:
        raise CheckpointError(
            "this stage began with a student of other weights, and goes on only from those",
            where=str(path),
            hint=f"give it the student as it was when the stage began, or delete {path.parent} to start again",
        )
    changed = [
        f"{key}: {lock.locked.get(key, '(not set)')} -> {locked.get(key, '(not set)')}"
        for key in sorted(set(lock.locked) | set(locked))
        if key not in lock.locked or key not in locked or lock.locked[key] != locked[key]
    ]
    raise CheckpointError(
        f"the recipe has changed since this stage began: {'; '.join(changed)}", where=str(path), hint=hint
    )


def write_lock(path: Path, lock: StageLock) -> None:
    """Write ``plan.json``."""
    write_json(path, asdict(lock))


def num_steps(
    stage: StageConfig, seconds_per_step: float | None, spent: float = 0.0, *, name: str = "<name>"
) -> int:
    """Turn the stage's length into optimizer steps, at least one.

    Args:
        stage: Gives tokens, steps or minutes.
        seconds_per_step: Needed for minutes.
        spent: Seconds of the minutes that are already gone.
        name: Name of the stage, for errors.
    Raises:
        RecipeError: The minutes end before the first step.
    """
    if stage.steps is not None:
        return stage.steps
    if stage.tokens is not None:
        return math.ceil(stage.tokens / (stage.batch_size * stage.seq_len))
    assert stage.minutes is not None
    assert seconds_per_step is not None
    steps = int((60 * stage.minutes - spent) / seconds_per_step)
    if steps < 1:
        least = (spent + seconds_per_step) / 60
        raise RecipeError(
            f"minutes {stage.minutes:g} end before the first step: timing took {spent:.2g} s, and a step takes "
            f"{seconds_per_step:.2g} s",
            where=f"stages.{name}.minutes",
            hint=f"give it more than {math.ceil(1000 * least) / 1000:g}, or set steps",
        )
    return steps


def time_step(
    run: Callable[..., object],
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    *,
    slowest: Callable[[float], float] = float,
    shares: bool = False,
    repeats: int = 1,
) -> float:
    """Estimate the seconds of one optimizer step without taking one.

    Forward and backward are timed on real micro-batches, after one that warms up. The optimizer is timed on a copy
    of its largest tensor: its cost is the memory it touches. The caller clears the gradients.

    Args:
        run: Forward and backward of one micro-batch; with ``last=True`` as of a step's last one.
        micro_batches: Of one step on this process.
        optimizer: Not stepped.
        make: Makes another of its kind, over other parameter groups.
        slowest: Largest of the processes' numbers: all must run as often, because sharded parameters make them wait.
        shares: Whether processes share gradients after the last micro-batch, which is then timed, too.
        repeats: How often a micro-batch runs before it takes the time that it takes from then on; if more than once,
            the first stands for all.
    """
    parameters: dict[Tensor, dict[str, Any]] = {
        parameter: group for group in optimizer.param_groups for parameter in group["params"]
    }
    model = max(parameters, key=Tensor.numel)
    device = model.device
    for _ in range(repeats):
        run(micro_batches[0])
    times: list[float] = []
    while len(times) < _MOST_PROBES and sum(times) < _PROBE_SECONDS:
        batch = micro_batches[0 if repeats > 1 else (len(times) + 1) % len(micro_batches)]
        times.append(slowest(_seconds(device, lambda batch=batch: run(batch))))
    middle, sharing = sorted(times)[len(times) // 2], 0.0
    if shares:
        # buffers are made the first time
        run(micro_batches[-1], last=True)
        last = slowest(_seconds(device, lambda: run(micro_batches[-1], last=True)))
        sharing = max(0.0, last - middle)
    largest = nn.Parameter(model.detach().clone())
    largest.grad = torch.zeros_like(largest)
    probe = make([{**parameters[model], "params": [largest]}])
    probe.step()
    share = sum(parameter.numel() for parameter in parameters) / largest.numel()
    return middle * len(micro_batches) + sharing + _seconds(device, probe.step) * share


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(f"{prefix}.{key}" if prefix else str(key), inner))
    return flat

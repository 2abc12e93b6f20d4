"""Checkpoints of a stage: safetensors and JSON in folders that appear whole, are verified, and rotate.

A checkpoint holds what the stage changes: trained parameters, their moments, and where training and data stand.
Random numbers need no state, because the loop seeds every step from its number.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

import torch
from pydantic import ConfigDict, with_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from gendistill.anatomy.moments import BLOCK
from gendistill.errors import CheckpointError
from gendistill.paths import clear_remains, library_writing, new_folder, read_json, write_json, writing
from gendistill.records import Count, Number
from gendistill.training.parallel import Parallel
from gendistill.training.parallel.base import gather_on_main

_NAME = re.compile(r"step-([0-9]+)")
_WEIGHTS = "trained.safetensors"
_MOMENTS = "optimizer.safetensors"
_STATE = "state.json"
# shape and dtype of a parameter's moments, by name
_Layout = dict[str, tuple[tuple[int, ...], str]]
_MOMENT_KEYS = ("step", "exp_avg", "exp_avg_sq")
# beside moments that are packed into bytes
_SCALE_KEYS = ("exp_avg_scale", "exp_avg_sq_scale")
_HINT = "delete this checkpoint: the stage resumes from an older one, or begins again"


class _File(TypedDict):
    bytes: Count
    crc32: Count


@with_config(ConfigDict(extra="forbid"))
class _Progress(TypedDict):
    step: Count
    tokens: Count
    seconds: Number
    loss_first: Number | None
    loss_last: Number | None
    window: list[Number]
    unfinished: NotRequired[list[Count]]
    rewinds: NotRequired[list[dict[str, Count]]]
    num_logged_rewinds: NotRequired[Count]
    memory: NotRequired[dict[str, Any]]


class _State(TypedDict):
    step: Count
    files: dict[str, _File]
    # of everything else in the file
    crc32: NotRequired[Count]
    progress: NotRequired[_Progress]
    stream: NotRequired[dict[str, Any]]


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers of the past.

    Attributes:
        step: Optimizer steps finished.
        tokens: Tokens seen, without padding, over all processes.
        seconds: Time spent in steps, over all sessions.
        loss_first, loss_last: Of the first and the last log interval.
        window: The meter's sums since the last log line.
        unfinished: What the meter knows of steps that were not finite.
        rewinds: Every return to a checkpoint: the step at which it was decided (``step``), that of the checkpoint
            (``to``), and the last one whose rows are not read again (``skipped_to``).
        num_logged_rewinds: Those of them that stand in ``metrics.jsonl``.
        memory: What monitors remember, by their names; JSON.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    window: list[float] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)
    rewinds: list[dict[str, int]] = field(default_factory=list)
    num_logged_rewinds: int = 0
    memory: dict[str, Any] = field(default_factory=dict)


class Tensors(NamedTuple):
    """The tensors of a checkpoint, whole; empty where they are not written.

    Attributes:
        weights: Trained parameters by name.
        moments: Their moments in the optimizer, ``<name>.<moment>``.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters that learn, as the optimizer will have them: to be asked once, after sharding."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def gather_tensors(
    trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, parallel: Parallel
) -> Tensors:
    """Bring what a stage changes to the main process, which writes it. Collective.

    Args:
        trained: Parameters that learn. A sharded module may show others meanwhile, which the optimizer does not know.
        optimizer: One of ``training.optim.OPTIMIZERS`` over those parameters.
        parallel: How they are spread.
    """
    moments = {
        f"{name}.{key}": value
        for name, parameter in trained.items()
        for key, value in _moments(optimizer, parameter).items()
    }
    return Tensors(gather_on_main(parallel, trained), gather_on_main(parallel, moments))


def save_checkpoint(
    folder: Path, *, step: int, keep: int | None, tensors: Tensors, state: dict[str, Any]
) -> Path:
    """Write ``folder/step-000050`` and delete all but the newest ``keep``.

    Args:
        folder: Folder of the stage's checkpoints.
        step: Steps finished.
        keep: Checkpoints to keep, this one included; None: leave that to ``rotate_checkpoints``.
        tensors: What the stage has changed.
        state: JSON: everything else that a resumed stage needs, under ``progress`` and ``stream``.
    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    path = folder / f"step-{step:06d}"
    with writing(path):
        if path.is_symlink():
            path.unlink()
    with new_folder(path) as partial:
        _write_tensors(partial / _WEIGHTS, tensors.weights)
        _write_tensors(partial / _MOMENTS, tensors.moments)
        files = {name: _fingerprint(partial / name) for name in (_WEIGHTS, _MOMENTS)}
        # as it will be read: keys of dictionaries become text
        content = json.loads(json.dumps({"step": step, "files": files, **state}))
        write_json(partial / _STATE, {**content, "crc32": _checksum(content)})
    if keep is not None:
        rotate_checkpoints(folder, step=step, keep=keep)
    return path


def find_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint, naming every damaged one that is passed over.

    Args:
        folder: Folder of the stage's checkpoints; remains of interrupted writes in it are removed.
        say: Receives one line per damaged checkpoint.
    """
    if not folder.is_dir():
        return None
    clear_remains(folder, own=True)
    for step, path in sorted(_steps(folder), reverse=True):
        try:
            _verify(path, step)
        except CheckpointError as error:
            say(f"skipping checkpoint {path}: {error.message}")
        else:
            return path
    return None


def load_checkpoint(
    path: Path, *, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, parallel: Parallel
) -> dict[str, Any]:
    """Restore parameters and moments in place and return the rest of the state.

    Args:
        path: The checkpoint, which the main process reads.
        trained, optimizer: As they were saved; already sharded.
        parallel: How they are spread.
    Raises:
        CheckpointError: It was written for other trained parameters or by another optimizer, or is damaged. Nothing
            has changed then.
    """
    # whole, where they are read
    held: list[dict[str, Tensor]] = []
    state, steps, layouts = parallel.on_main(lambda: _read_for(path, trained, held))
    for name, parameter in trained.items():
        _check_moments(path, layouts[name], optimizer.state.get(parameter))
    with torch.no_grad():
        for name, part in parallel.scatter(trained, lambda name: held[0][name]):
            trained[name].copy_(part)
        for name, parameter in trained.items():
            # moments lie as their parameter does, unless they are packed
            like = {
                key: parameter
                if (shape, dtype) == (tuple(parameter.shape), "float32")
                else torch.empty(shape, dtype=getattr(torch, dtype), device=parameter.device)
                for key, (shape, dtype) in layouts[name].items()
                if key != "step"
            }
            found = dict(parallel.scatter(like, lambda key, name=name: held[1][f"{name}.{key}"]))
            found["step"] = torch.tensor(steps[name], dtype=torch.float32, device=parameter.device)
            _restore(optimizer.state[parameter], found)
    return state


def _read_for(
    path: Path, trained: Mapping[str, Tensor], held: list[dict[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, float], dict[str, _Layout]]:
    """Read a checkpoint of these parameters, and put the tensors into ``held``.

    Returns: Its state, the parameters' steps, and shape and dtype of their moments.

    Raises:
        CheckpointError: As for ``load_checkpoint``.
    """
    state = _read_state(path)
    weights, moments = _read_tensors(path)
    if {name: value.shape for name, value in weights.items()} != {
        name: value.shape for name, value in trained.items()
    }:
        unlike = sorted(set(weights) ^ set(trained)) or ["their shapes differ"]
        raise CheckpointError(
            f"the checkpoint holds other parameters than this stage trains: {', '.join(unlike[:5])}",
            where=str(path),
            hint="restore the recipe that wrote it, or delete the stage's folder to start the stage again",
        )
    held += [weights, moments]
    layouts: dict[str, _Layout] = {name: {} for name in weights}
    for place, value in moments.items():
        name, _, key = place.rpartition(".")
        layouts[name][key] = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return state, {name: moments[f"{name}.step"].item() for name in weights}, layouts


def _check_moments(path: Path, layout: _Layout, state: Mapping[str, Tensor] | None) -> None:
    """Refuse moments of another optimizer; one that has no state yet makes that of AdamW."""
    wanted = state or _MOMENT_KEYS
    if layout.keys() != set(wanted):
        raise CheckpointError(
            f"the checkpoint was written by another optimizer: it holds {', '.join(layout)}, not {', '.join(wanted)}",
            where=str(path),
            hint="restore the recipe that wrote it, or delete the stage's folder to start the stage again",
        )


def _restore(state: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Put moments in place of those that an optimizer has, or give them to one that has none yet."""
    for key, value in found.items():
        if key in state:
            state[key].copy_(value)
        else:
            state[key] = value


def checksums(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Sum every parameter's bits, to see which tensors changed at all."""
    names, sums = [], []
    for name, parameter in parameters:
        bits = parameter.detach().view(torch.int32 if parameter.element_size() == 4 else torch.int16)
        names.append(name)
        sums.append(bits.sum(dtype=torch.int64))
    return dict(zip(names, torch.stack(sums).tolist(), strict=True))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with library_writing():
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, int]:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    """Return a parameter's moments; one that no gradient has reached yet is about to get these."""
    state = optimizer.state.get(parameter)
    if state:
        return {key: state[key] for key in (*_MOMENT_KEYS, *_SCALE_KEYS) if key in state}
    zeros = torch.zeros_like(parameter)
    return {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(why, where=str(path), hint=_HINT)


def _verify(path: Path, step: int) -> None:
    """Check everything about a checkpoint that can be checked without its student.

    Raises:
        CheckpointError: It is damaged.
    """
    state = _read_state(path)
    if not state["step"] == state.get("progress", {"step": step})["step"] == step:
        raise _damaged(path, f"{_STATE} is of step {state['step']}, the folder of step {step}")
    for name in (_WEIGHTS, _MOMENTS):
        try:
            if not (path / name).is_file():
                raise _damaged(path, f"{name} is missing")
            if _fingerprint(path / name) != state["files"].get(name):
                raise _damaged(path, f"{name} is damaged")
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read: {error.strerror}") from error
    _read_tensors(path)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = read_json(path / _STATE, shape=_State, error=CheckpointError, hint=_HINT)
    except CheckpointError as error:
        raise _damaged(path, f"{_STATE} cannot be read: {error.message}") from error
    if "crc32" in state:
        checksum = state.pop("crc32")
        if checksum != _checksum(state):
            raise _damaged(path, f"{_STATE} is damaged: it was changed after it had been written")
    # without a checksum, it is of an older version
    elif missing := [key for key in ("progress", "stream") if key not in state]:
        raise _damaged(path, f"{_STATE} lacks {' and '.join(missing)}")
    return state


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read weights and moments, and check that they belong together and are finite numbers of the right kind.

    Raises:
        CheckpointError: They cannot be read, or are not what ``save_checkpoint`` writes.
    """
    try:
        weights, moments = load_file(path / _WEIGHTS), load_file(path / _MOMENTS)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"the tensors cannot be read: {error}") from error
    expected = {f"{name}.{key}" for name in weights for key in _MOMENT_KEYS}
    packed = {name for name in weights if f"{name}.{_SCALE_KEYS[0]}" in moments}
    expected |= {f"{name}.{key}" for name in packed for key in _SCALE_KEYS}
    if unlike := sorted(expected ^ moments.keys()):
        raise _damaged(
            path,
            f"{_MOMENTS} does not hold the moments of {_WEIGHTS}: {', '.join(unlike[:3])} without partner",
        )
    for name, value in weights.items():
        _check_tensor(path, _WEIGHTS, name, value, torch.float32, value.shape)
        for key in (*_MOMENT_KEYS, *(_SCALE_KEYS if name in packed else ())):
            dtype, shape = torch.float32, value.shape
            if key == "step":
                shape = torch.Size(())
            elif key in _SCALE_KEYS:
                shape = torch.Size([math.ceil(value.numel() / BLOCK)])
            elif name in packed:
                dtype = torch.uint8
            _check_tensor(path, _MOMENTS, f"{name}.{key}", moments[f"{name}.{key}"], dtype, shape)
    return weights, moments


def _check_tensor(
    path: Path, file: str, name: str, value: Tensor, dtype: torch.dtype, shape: torch.Size
) -> None:
    if value.dtype is not dtype or value.shape != shape:
        raise _damaged(path, f"{file}: {name} is {value.dtype} {list(value.shape)}")
    if not value.isfinite().all():
        raise _damaged(path, f"{file}: {name} holds numbers that are not finite")


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _steps(folder: Path) -> list[tuple[int, Path]]:
    try:
        return [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    except OSError as error:
        raise CheckpointError(
            f"cannot list the stage's checkpoints: {error.strerror}",
            where=str(folder),
            hint="make the folder readable, or delete it to start the stage again",
        ) from error


def rotate_checkpoints(folder: Path, *, step: int, keep: int) -> None:
    """Delete all but the newest ``keep``, of which that of ``step`` is the newest."""
    # later ones were damaged, or this one would not have been written
    steps = sorted(_steps(folder))
    older = [path for other, path in steps if other <= step]
    for path in [*older[:-keep], *(path for other, path in steps if other > step)]:
        _remove(path)


def _remove(path: Path) -> None:
    """Delete a folder, or the file or link in its place, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()

"""Checkpoints of a stage: safetensors and JSON in folders that appear whole, are verified, and rotate.

A checkpoint holds what the stage changes: trained parameters, their moments, and where training and data stand.
Random numbers need no state, because the loop seeds every step from its number.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gendistill.errors import CheckpointError
from gendistill.paths import library_writing, new_folder, read_json, write_json

_NAME = re.compile(r"step-(\d+)")
_WEIGHTS = "trained.safetensors"
_MOMENTS = "optimizer.safetensors"
_STATE = "state.json"


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    keep: int,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write ``folder/step-000050`` and delete all but the newest ``keep``.

    Args:
        folder: Folder of the stage's checkpoints.
        step: Steps finished.
        keep: Checkpoints to keep, this one included.
        student: Its parameters that require gradients are saved.
        optimizer: AdamW over those parameters.
        state: JSON: everything else that a resumed stage needs.
    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    trained = _trained(student)
    moments = {
        f"{name}.{key}": value
        for name, parameter in trained.items()
        for key, value in optimizer.state[parameter].items()
    }
    path = folder / f"step-{step:06d}"
    with new_folder(path) as partial:
        _write_tensors(partial / _WEIGHTS, trained)
        _write_tensors(partial / _MOMENTS, moments)
        files = {name: _fingerprint(partial / name) for name in (_WEIGHTS, _MOMENTS)}
        write_json(partial / _STATE, {"step": step, "files": files, **state})
    _rotate(folder, step, keep)
    return path


def find_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint, naming every damaged one that is passed over.

    Args:
        folder: Folder of the stage's checkpoints; remains of interrupted writes in it are removed.
        say: Receives one line per damaged checkpoint.
    """
    if not folder.is_dir():
        return None
    for remains in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.old")]:
        shutil.rmtree(remains, ignore_errors=True)
    for step in sorted(_steps(folder), reverse=True):
        path = folder / f"step-{step:06d}"
        damage = _damage(path)
        if damage is None:
            return path
        say(f"skipping checkpoint {path}: {damage}")
    return None


def load_checkpoint(path: Path, *, student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore parameters and moments in place and return the rest of the state.

    Raises:
        CheckpointError: It was written for other trained parameters.
    """
    trained = _trained(student)
    weights, moments = load_file(path / _WEIGHTS), load_file(path / _MOMENTS)
    if {name: value.shape for name, value in weights.items()} != {
        name: value.shape for name, value in trained.items()
    }:
        unlike = sorted(set(weights) ^ set(trained)) or ["their shapes differ"]
        raise CheckpointError(
            f"the checkpoint holds other parameters than this stage trains: {', '.join(unlike[:5])}",
            where=str(path),
            hint="restore the recipe that wrote it, or delete the stage's folder to start the stage again",
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
            optimizer.state[parameter] = {
                key: moments[f"{name}.{key}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return read_json(path / _STATE)


def checksums(module: nn.Module) -> dict[str, int]:
    """Sum every parameter's bits, to see which tensors changed at all."""
    names, sums = [], []
    for name, parameter in module.named_parameters():
        bits = parameter.detach().view(torch.int32 if parameter.element_size() == 4 else torch.int16)
        names.append(name)
        sums.append(bits.sum(dtype=torch.int64))
    return dict(zip(names, torch.stack(sums).tolist(), strict=True))


def _trained(student: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


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


def _damage(path: Path) -> str | None:
    try:
        state = read_json(path / _STATE, error=CheckpointError)
        for name, expected in state["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _fingerprint(path / name) != expected:
                return f"{name} is damaged"
    except (OSError, CheckpointError, KeyError) as error:
        return f"{_STATE} cannot be read ({type(error).__name__})"
    return None


def _steps(folder: Path) -> list[int]:
    return [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]


def _rotate(folder: Path, step: int, keep: int) -> None:
    # later ones were damaged, or this one would not have been written
    steps = _steps(folder)
    older = sorted(other for other in steps if other <= step)
    for other in [*older[:-keep], *(other for other in steps if other > step)]:
        shutil.rmtree(folder / f"step-{other:06d}", ignore_errors=True)

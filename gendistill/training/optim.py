"""The optimizers, their learning rates, and the dtype of the arithmetic in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from gendistill.anatomy.adapters import plain_name
from gendistill.anatomy.groups import ParamGroup, undecayed
from gendistill.config.schema import ScheduleConfig, StageConfig
from gendistill.training.adamw8bit import AdamW8bit
from gendistill.training.freeze import param_group_of

# narrower layers spend longer casting their weights than multiplying
_MIN_WIDTH = 256


Groups = list[dict[str, Any]]


def _adamw(groups: Groups, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=True)


def _adamw8bit(groups: Groups, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return AdamW8bit(groups, betas=betas, eps=1e-8)


# what a stage may ask for under ``optimizer``; each changes nothing in a step while its ``found_inf`` is 1
OPTIMIZERS: dict[str, Callable[[Groups, tuple[float, float]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
}


def decays(name: str, parameter: Tensor, group: ParamGroup, exempt: Collection[str]) -> bool:
    """Whether weight decay applies: to matrices only, never to norms, embeddings and what a mixer's table exempts.

    Adapters decay as what they adapt would: towards the weights that the stage started from.
    """
    if parameter.dim() < 2 or group in (ParamGroup.NORM, ParamGroup.EMBED):
        return False
    return plain_name(name) not in exempt


def build_optimizer(student: nn.Module, stage: StageConfig) -> torch.optim.Optimizer:
    """Make the stage's optimizer over the parameters that require gradients.

    Each of its parameter groups carries ``group`` (a ``ParamGroup``; an adapter has that of the weight that it adapts)
    and ``base_lr``; the loop sets ``lr``.

    Args:
        student: Float32 model, after ``apply_freeze`` and ``insert_adapters``.
        stage: Kind of optimizer, rates, betas and weight decay.
    Raises:
        RecipeError: The optimizer needs a package that is not installed.
    """
    config: Any = student.config
    exempt = undecayed(config.to_dict())
    # split parameters and whole ones do not go into one call
    buckets: dict[tuple[ParamGroup, bool, type], list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            group = param_group_of(name, config)
            bucket = group, decays(name, parameter, group, exempt), type(parameter)
            buckets.setdefault(bucket, []).append(parameter)
    groups = []
    for (group, decayed, _), parameters in buckets.items():
        rate = stage.lr[group] if isinstance(stage.lr, dict) else stage.lr
        decay = stage.weight_decay if decayed else 0.0
        groups.append(
            {"params": parameters, "group": group, "base_lr": rate, "lr": rate, "weight_decay": decay}
        )
    return OPTIMIZERS[stage.optimizer](groups, stage.betas)


def learning_rate_factor(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Compute the factor of the base rate for one step: a pure function, so that resuming needs no state.

    Args:
        schedule: Shape; its fractions are of ``num_steps``, rounded to whole steps.
        step: Step about to be taken, from 0.
        num_steps: Steps of the stage.
    """
    warmup = min(round(schedule.warmup * num_steps), num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    start = warmup
    if schedule.kind == "wsd":
        start = max(warmup, num_steps - round(schedule.decay * num_steps))
    if step < start:
        return 1.0
    progress = (step + 1 - start) / (num_steps - start)
    shape = (1 + math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return schedule.min_ratio + (1 - schedule.min_ratio) * shape


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Scale every group's base rate, and return the rates by group."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        rates[group["group"].value] = group["lr"]
    return rates


def choose_compute_dtype(device: torch.device, hidden_size: int, *, seconds: float = 0.0) -> torch.dtype:
    """Choose the dtype of matmuls and activations; weights and moments stay float32.

    The choice depends on the machine and the model alone, so that a repeated run is the same run. A CUDA device or a
    CPU with bfloat16 units gets bfloat16, a CPU only for models wide enough for the units to make up for the casts
    of the weights. Everything else gets float32.

    Args:
        hidden_size: Width of the model.
        seconds: Ignored; nothing is timed.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and hidden_size >= _MIN_WIDTH and cpu_has_bfloat16_units():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AMX or AVX512-BF16), and torch lets it."""
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def fixed_dtype(stage: StageConfig) -> torch.dtype | None:
    """Return the dtype that the recipe asks for; None leaves it to ``choose_compute_dtype``."""
    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[stage.compute_dtype]

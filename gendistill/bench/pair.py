"""A teacher with random weights, and the student that conversion makes of it: on the device, without a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gendistill.anatomy.placement import Placement
from gendistill.bench.shapes import Shape
from gendistill.checkpoints.tensors import TensorInfo
from gendistill.config.mixers import MixersConfig
from gendistill.conversion.execute import fold_head_scale
from gendistill.conversion.plan import Origin, plan_conversion
from gendistill.models import HybridConfig, HybridForCausalLM

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def make_teacher(shape: Shape, *, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Make a teacher of this shape; the seed and the kind of device decide its weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(shape.family, **shape.sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def make_student(teacher: Any, shape: Shape, *, impl: str = "auto") -> HybridForCausalLM:
    """Convert a teacher in memory, by the plan that conversion carries out from file to file.

    Returns: A float32 student on the teacher's device; what is new in it follows from torch's seed.
    """
    weights = {name: value for name, value in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    tensors = {
        name: TensorInfo(tuple(value.shape), _NAMES[value.dtype], Path()) for name, value in weights.items()
    }
    placement = Placement.parse(shape.placement, num_layers=config["num_hidden_layers"])
    plan = plan_conversion(config, tensors, placement, MixersConfig())
    settings = {name: value for name, value in plan.student_config.items() if name != "dtype"}
    device = next(teacher.parameters()).device
    with torch.device(device):
        student = HybridForCausalLM(HybridConfig(**{**settings, "impl": impl}))
    student = student.float().to(device)
    parameters = dict(student.named_parameters())
    for step in plan.steps:
        if step.origin is Origin.COPIED:
            parameters[step.name].copy_(weights[step.sources[0]])
        elif step.origin is Origin.TRANSFORMED:
            projection, scale = (weights[name] for name in step.sources)
            parameters[step.name].copy_(fold_head_scale(projection, scale))
    return student


def for_inference(model: Any, dtype: torch.dtype) -> Any:
    """Cast a model's weights, but for those that stay in float32, and let none learn."""
    kept = {name: value.data for name, value in model.named_parameters() if _stays_wide(model, name)}
    model = model.eval().requires_grad_(False).to(dtype)
    for name, value in model.named_parameters():
        if name in kept:
            value.data = kept[name]
    return model


def _stays_wide(model: Any, name: str) -> bool:
    return any(re.search(words, name) for words in model._keep_in_fp32_modules_strict or ())


def num_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's weights."""
    return sum(value.numel() * value.element_size() for value in model.parameters())

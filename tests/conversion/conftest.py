"""Teachers on disk, and the whole way from a teacher to a loaded student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.resolve import Checkpoint, read_tensor_index, resolve_checkpoint
from gendistill.config.mixers import MixersConfig
from gendistill.conversion.execute import apply_plan
from gendistill.conversion.plan import ConversionPlan, plan_conversion
from gendistill.testing import tiny_teacher


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep every test's cache to itself."""
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def save_teacher(tmp_path):
    """Save a tiny teacher and return it with its folder. Norm scales are random, so that losing them shows."""

    def save(
        family: str = "llama",
        *,
        name: str = "teacher",
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **overrides: Any,
    ) -> tuple[PreTrainedModel, Path]:
        model = tiny_teacher(family, **overrides)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        model = model.to(dtype)
        model.save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return model, tmp_path / name

    return save


@pytest.fixture
def plan_for():
    """Plan the conversion of a folder."""

    def plan(
        folder: Path | Checkpoint, placement: str | list[str], mixers: dict[str, Any] | None = None
    ) -> ConversionPlan:
        checkpoint = folder if isinstance(folder, Checkpoint) else resolve_checkpoint(str(folder))
        return plan_conversion(
            checkpoint.config,
            read_tensor_index(checkpoint.folder),
            Placement.parse(placement, num_layers=checkpoint.config["num_hidden_layers"]),
            MixersConfig.model_validate(mixers or {}),
        )

    return plan


@pytest.fixture
def convert(tmp_path, plan_for):
    """Convert a folder and return the student's."""

    def run(
        folder: Path,
        placement: str | list[str],
        *,
        mixers: dict[str, Any] | None = None,
        name: str = "student",
        seed: int = 7,
        **options: Any,
    ) -> Path:
        checkpoint = resolve_checkpoint(str(folder))
        out = tmp_path / name
        apply_plan(plan_for(checkpoint, placement, mixers), checkpoint, out, seed=seed, **options)
        return out

    return run

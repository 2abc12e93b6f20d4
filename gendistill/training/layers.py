"""Compare a student's new mixers with the attention that they replace, layer by layer, on the teacher's own inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gendistill.anatomy.placement import converted_layers, placed_kinds
from gendistill.data.batch import IGNORE, Batch, boundaries
from gendistill.losses.student import StudentLike, in_block
from gendistill.teachers.base import ModuleIO, Needs, Teacher
from gendistill.training.heldout import evaluating

_SAMPLES = 65_536  # gate values kept per layer and batch
_MOST_POSITIONS = 2_048  # enough for two digits of a mean cosine; every mixer runs once more on them


@dataclass(slots=True)
class LayerSums:
    """How far one mixer's output is from the attention output that it replaces; tensors stay on the device.

    Attributes:
        num_positions: Counted so far.
        sums: By batch: of the cosines, of the squared error and of the squared output of the attention.
        half_lives: Of the gates, in tokens.
    """

    num_positions: int = 0
    sums: list[Tensor] = field(default_factory=list)
    half_lives: list[Tensor] = field(default_factory=list)

    def add(self, got: Tensor, wanted: Tensor) -> None:
        """Count outputs ``[N, hidden_size]``."""
        got, wanted = got.float(), wanted.float()
        cosine = torch.cosine_similarity(got, wanted, dim=-1).sum()
        self.sums.append(torch.stack([cosine, (got - wanted).square().sum(), wanted.square().sum()]))
        self.num_positions += got.shape[0]

    @property
    def mean_cosine(self) -> float:
        """Mean cosine between the two outputs of a position."""
        return self._sums()[0] / max(self.num_positions, 1)

    @property
    def relative_error(self) -> float:
        """Norm of the difference over that of the attention's output."""
        _, error, norm = self._sums()
        return math.sqrt(error / max(norm, 1e-30))

    def quantiles(self, percent: Sequence[int]) -> dict[str, float]:
        """Return quantiles of the half-lives, by name; empty for a mixer without gates."""
        return quantiles(self.half_lives, percent)

    def _sums(self) -> list[float]:
        return torch.stack(self.sums).cpu().double().sum(0).tolist() if self.sums else [0.0, 0.0, 0.0]


@torch.no_grad()
def compare_layers(
    student: StudentLike,
    teacher: Teacher,
    batches: Sequence[Batch],
    *,
    compute_dtype: torch.dtype | None = None,
) -> dict[int, LayerSums]:
    """Run every converted layer's mixer on what the teacher's attention got, without dropout.

    Args:
        student: On the teacher's device.
        teacher: Its teacher.
        batches: Held-out text; positions with a label count, up to 2,048 or so.
        compute_dtype: Run the mixers under autocast to this dtype; None: in their own.
    Returns: By layer; sums of nothing if the teacher's layers do not correspond to the student's.
    """
    config = student.config
    layers = converted_layers(placed_kinds(config))
    sums = {layer: LayerSums() for layer in layers}
    facts = teacher.facts
    if (facts.num_layers, facts.hidden_size) != (config.num_hidden_layers, config.hidden_size):
        return sums
    seen = 0
    with evaluating(student):
        for batch in batches:
            if seen >= _MOST_POSITIONS:
                break
            _compare(student, teacher, batch, sums, compute_dtype)
            seen += batch.num_labels
    return sums


def _compare(
    student: Any,
    teacher: Teacher,
    batch: Batch,
    sums: dict[int, LayerSums],
    compute_dtype: torch.dtype | None,
) -> None:
    weight = student.lm_head.weight
    dtype = compute_dtype or weight.dtype
    batch = batch.to(weight.device)
    counts = batch.labels != IGNORE

    def compare(layer: int, io: ModuleIO) -> None:
        # as soon as the mixer's input is known, so that no layer's activations are kept
        hidden = io.hidden_states.to(weight.device, weight.dtype)
        inputs = {
            "hidden_states": hidden,
            "position_embeddings": tuple(part.to(hidden) for part in io.position_embeddings),
            "position_ids": batch.position_ids,
            **boundaries(batch),
        }
        block = student.model.layers[layer]

        def work(**given: Any) -> tuple[Tensor, Tensor | None]:
            mixer = block.self_attn
            return mixer(**given)[0], mixer.diagnostics(given["hidden_states"]).get("half_life")

        with torch.autocast(weight.device.type, dtype=dtype, enabled=dtype != weight.dtype):
            got, found = in_block(block, work, **inputs)
        sums[layer].add(got[counts], io.output[counts].to(got))
        if found is not None:
            values = found[counts].flatten()
            sums[layer].half_lives.append(values[:: max(1, len(values) // _SAMPLES)])

    teacher.signals(batch, Needs(mixer_io=tuple(sums)), take=compare)


def quantiles(values: Sequence[Tensor], percent: Sequence[int]) -> dict[str, float]:
    """Compute quantiles of all values together, by the percent as text; empty without values."""
    if not values:
        return {}
    merged = torch.cat(list(values)).cpu().double()
    merged = merged[:: max(1, len(merged) // 4_000_000)]  # torch.quantile has a limit
    points = torch.quantile(merged, torch.tensor([each / 100 for each in percent], dtype=torch.float64))
    return dict(zip(map(str, percent), points.tolist(), strict=True))

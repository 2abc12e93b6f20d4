"""Alignment objectives: each linear layer learns alone, on the teacher's own inputs, what its attention computed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gendistill.anatomy.placement import converted_layers, placed_kinds
from gendistill.config.objectives import BlockOutputConfig, MixerOutputConfig
from gendistill.data.batch import IGNORE, Batch, boundaries
from gendistill.errors import RecipeError
from gendistill.losses.base import LossTerm
from gendistill.losses.student import StudentLike, output_head, run_mixer
from gendistill.ops.divergence import counted_positions
from gendistill.teachers.base import ModuleIO, Needs, Teacher, TeacherFacts, TeacherSignals

Norm = Literal["mse", "l2", "relative"]
Part = Literal["mixer", "block"]


class LayerwiseObjective:
    """The distance of every linear mixer's output, or that of the block around it, from the teacher's.

    The value is per token and layer: ``mse`` is the mean square over channels, ``l2`` the norm of the error,
    ``relative`` the squared error over the layer's mean squared target. That mean is measured once, on held-out
    text, so that the loss of a token depends neither on its batch nor on how the batch was split; 1.0 is what an
    output of zero would score. A block's target is what the block adds to its input: the error is that of its
    output, and ``relative`` is not drowned by the residual stream.

    Args:
        part: What is aligned: the mixer alone or the whole block.
        norm: How an error is measured.
    """

    def __init__(self, part: Part, norm: Norm) -> None:
        self.part: Part = part
        self.norm: Norm = norm
        self.layers: tuple[int, ...] = ()
        self.target_energy: dict[int, Tensor] = {}

    @property
    def part_names(self) -> tuple[str, ...]:
        """One part per linear layer."""
        return tuple(f"layer_{layer}" for layer in self.layers)

    @property
    def needs(self) -> Needs:
        """Inputs and outputs of the layers to align."""
        return Needs(mixer_io=self.layers) if self.part == "mixer" else Needs(block_io=self.layers)

    def bind(self, config: Any, teacher: TeacherFacts) -> None:
        """Find the linear layers.

        Raises:
            RecipeError: There are none, or the teacher's layers do not correspond to the student's.
        """
        for size, theirs in (("num_hidden_layers", teacher.num_layers), ("hidden_size", teacher.hidden_size)):
            ours = getattr(config, size)
            if ours != theirs:
                raise RecipeError(
                    f"layer by layer, the student can only follow a teacher of its own shape: {size} is {ours} in the "
                    f"student, {theirs} in the teacher",
                    where="teacher.model and student.from",
                    hint="use objective: {kind: kl}, which compares outputs only",
                )
        self.layers = converted_layers(placed_kinds(config))
        if not self.layers:
            raise RecipeError(
                "the objective aligns linear layers with the attention that they replace, but the placement has none",
                where="student.placement",
                hint="convert a layer to kda, or use objective: {kind: kl} or {kind: ce}",
            )

    def calibrate(self, teacher: Teacher, batch: Batch) -> None:
        """Measure each layer's mean squared target, for ``relative``."""
        if self.norm != "relative":
            return
        index = counted_positions(batch.labels, batch.num_labels, ignore_index=IGNORE)
        for layer, io in self._io(teacher.signals(batch, self.needs)).items():
            target = _rows(io.output, index)
            if self.part == "block":
                target -= _rows(io.hidden_states, index)
            self.target_energy[layer] = target.square().sum(-1).mean()

    def reaches(self, parameter: str) -> bool:
        """Whether the parameter is part of an aligned mixer or block."""
        inside = "self_attn." if self.part == "mixer" else ""
        return any(parameter.startswith(f"model.layers.{layer}.{inside}") for layer in self.layers)

    def __call__(self, student: StudentLike, signals: TeacherSignals, batch: Batch) -> LossTerm:
        """Run each linear layer on the teacher's input and sum the errors over counted positions."""
        counts = batch.labels != IGNORE
        if batch.places is None:
            left_out = counted_positions(counts, counts.numel() - batch.num_labels, ignore_index=True)
            count = torch.full((), batch.num_labels, dtype=torch.int64, device=counts.device)
        else:
            left_out, count = ~counts, counts.sum()
        dtype = output_head(student).dtype
        errors = []
        for layer, io in self._io(signals).items():
            output = self._run(student.model.layers[layer], io, batch, dtype)
            scale = 1 / self.target_energy[layer] if self.norm == "relative" else None
            errors.append(_Distance.apply(output, io.output, left_out, self.norm, scale))
        parts = torch.stack(errors)
        return LossTerm(parts.mean(), count, dict(zip(self.part_names, parts.detach(), strict=True)))

    def _io(self, signals: TeacherSignals) -> dict[int, ModuleIO]:
        found = signals.mixers if self.part == "mixer" else signals.blocks
        return {layer: found[layer] for layer in self.layers}

    def _run(self, block: Any, io: ModuleIO, batch: Batch, dtype: torch.dtype) -> Tensor:
        inputs = {
            "hidden_states": io.hidden_states.to(dtype),
            "position_embeddings": tuple(table.to(dtype) for table in io.position_embeddings),
            "position_ids": batch.position_ids,
            "attention_mask": None,
            "past_key_values": None,
            **boundaries(batch),
        }
        return run_mixer(block, **inputs) if self.part == "mixer" else block(**inputs)


class _Distance(torch.autograd.Function):
    """The error of an output, summed over positions in float32; kept for the backward pass is the error alone.

    Positions that do not count get an error of zero, whatever the output is there: gathering the others costs more.
    They come as an index of the flattened positions or, where their number is not known to the host, as a mask.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, target: Tensor, left_out: Tensor, norm: Norm, scale: Tensor | None
    ) -> Tensor:
        error = output - target if output.dtype == torch.float32 else output.float() - target
        error = error.contiguous()
        if left_out.dtype == torch.bool:
            error.masked_fill_(left_out.unsqueeze(-1), 0.0)
        else:
            error.view(-1, error.shape[-1]).index_fill_(0, left_out, 0.0)
        rows = torch.linalg.vector_norm(error, dim=-1)
        if norm == "l2":
            # the norm has no derivative where it is zero; torch takes zero there, too
            slope = torch.where(rows > 0, 1 / rows, 0.0).unsqueeze(-1)
        else:
            factor = 1 / error.shape[-1] if scale is None else scale
            rows = rows.square() * factor
            slope = rows.new_ones(()) * (2 * factor)
        ctx.save_for_backward(error, slope)
        ctx.dtype = output.dtype
        return rows.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        error, slope = ctx.saved_tensors
        return (error * (slope * grad)).to(ctx.dtype), None, None, None, None


def align_mixers(config: MixerOutputConfig) -> LayerwiseObjective:
    """Build the objective that aligns mixers."""
    return LayerwiseObjective("mixer", config.norm)


def align_blocks(config: BlockOutputConfig) -> LayerwiseObjective:
    """Build the objective that aligns whole blocks."""
    return LayerwiseObjective("block", config.norm)


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, index).float()

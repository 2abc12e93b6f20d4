"""Alignment objectives: each linear layer learns alone, on the teacher's own inputs, what its attention computed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gendistill.anatomy.placement import converted_layers, placed_kinds
from gendistill.data.batch import IGNORE, Batch
from gendistill.errors import RecipeError
from gendistill.losses.base import LossTerm, ModuleIO, Signal, TeacherSignals
from gendistill.losses.signals import teacher_signals
from gendistill.ops.linear_divergence import counted_positions

Norm = Literal["mse", "l2", "relative"]


class LayerwiseObjective:
    """Match the output of every linear mixer, or of the block around it, with the teacher's.

    The value is per token and layer: ``mse`` is the mean square over channels, ``l2`` the norm of the error,
    ``relative`` the squared error over the layer's mean squared target. That mean is measured once, on held-out
    text, so that the loss of a token depends neither on its batch nor on how the batch was split; 1.0 is what an
    output of zero would score. A block's target is what the block adds to its input: the error is that of its
    output, and ``relative`` is not drowned by the residual stream.

    Args:
        signal: ``MIXER_IO`` or ``BLOCK_IO``.
        norm: How an error is measured.
    """

    def __init__(self, signal: Signal, norm: Norm) -> None:
        self.needs = frozenset({signal})
        self.signal = signal
        self.norm = norm
        self.layers: tuple[int, ...] = ()
        self.target_energy: dict[int, Tensor] = {}

    @property
    def part_names(self) -> tuple[str, ...]:
        """One part per linear layer."""
        return tuple(f"layer_{layer}" for layer in self.layers)

    def bind(self, config: Any, teacher_config: Any) -> None:
        """Find the linear layers.

        Raises:
            RecipeError: There are none, or the teacher's layers do not correspond to the student's.
        """
        for size in ("num_hidden_layers", "hidden_size"):
            ours, theirs = getattr(config, size), getattr(teacher_config, size)
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

    def calibrate(self, teacher: nn.Module, batch: Batch) -> None:
        """Measure each layer's mean squared target, for ``relative``."""
        if self.norm != "relative":
            return
        index = counted_positions(batch.labels, batch.num_labels, ignore_index=IGNORE)
        for layer, io in self.observe(teacher, batch).modules.items():
            target = _rows(io.output, index)
            if self.signal is Signal.BLOCK_IO:
                target -= _rows(io.hidden_states, index)
            self.target_energy[layer] = target.square().sum(-1).mean()

    def reaches(self, parameter: str) -> bool:
        """Whether the parameter is part of an aligned mixer or block."""
        inside = "self_attn." if self.signal is Signal.MIXER_IO else ""
        return any(parameter.startswith(f"model.layers.{layer}.{inside}") for layer in self.layers)

    def observe(self, teacher: nn.Module, batch: Batch) -> TeacherSignals:
        """Run the teacher and record the inputs and outputs of the layers to align."""
        return teacher_signals(teacher, batch, self.needs, self.layers)

    def __call__(self, student: Any, signals: TeacherSignals, batch: Batch) -> LossTerm:
        """Run each linear layer on the teacher's input and sum the errors over counted positions."""
        index = counted_positions(batch.labels, batch.num_labels, ignore_index=IGNORE)
        dtype = student.lm_head.weight.dtype
        errors = []
        for layer in self.layers:
            io = signals.modules[layer]
            output = self._run(student.model.layers[layer], io, batch, dtype)
            errors.append(self._measure(layer, _rows(output, index) - _rows(io.output, index)))
        parts = torch.stack(errors)
        count = torch.full((), index.numel(), dtype=torch.int64, device=parts.device)
        return LossTerm(parts.mean(), count, dict(zip(self.part_names, parts.detach(), strict=True)))

    def _run(self, block: Any, io: ModuleIO, batch: Batch, dtype: torch.dtype) -> Tensor:
        inputs = {
            "hidden_states": io.hidden_states.to(dtype),
            "position_embeddings": tuple(table.to(dtype) for table in io.position_embeddings),
            "position_ids": batch.position_ids,
            "attention_mask": None,
            "past_key_values": None,
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
        }
        return block.self_attn(**inputs)[0] if self.signal is Signal.MIXER_IO else block(**inputs)

    def _measure(self, layer: int, error: Tensor) -> Tensor:
        if self.norm == "mse":
            return error.square().mean(-1).sum()
        if self.norm == "l2":
            return torch.linalg.vector_norm(error, dim=-1).sum()
        return error.square().sum() / self.target_energy[layer]


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, index).float()

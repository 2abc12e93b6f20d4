"""What an objective is: a function of the student, the teacher's signals and a batch that returns a sum and a count."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from gendistill.anatomy import geometry
from gendistill.data.batch import Batch


class Signal(StrEnum):
    """Name what an objective needs to see of the teacher."""

    HIDDEN = "hidden"
    MIXER_IO = "mixer_io"
    BLOCK_IO = "block_io"


@dataclass(frozen=True, slots=True)
class ModuleIO:
    """Hold what went into a teacher module and what came out.

    Attributes:
        hidden_states: ``[B, T, D]`` input.
        position_embeddings: Cosines and sines that the module got.
        output: ``[B, T, D]``.
    """

    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    output: Tensor


@dataclass(frozen=True, slots=True)
class TeacherSignals:
    """Hold what the teacher said about one batch; only what the objective needs is there.

    Attributes:
        hidden: ``[B, T, E]`` last hidden states.
        head: ``[V, E]`` output embedding.
        modules: Layer index to the input and output of its attention or of the whole block.
    """

    hidden: Tensor | None = None
    head: Tensor | None = None
    modules: dict[int, ModuleIO] = field(default_factory=dict)


class LossTerm(NamedTuple):
    """Hold one micro-batch's loss, before any division.

    Attributes:
        total: Float32 scalar, summed over counted positions; differentiable.
        count: Int64 scalar, counted positions.
        parts: Detached float32 sums by name, for logging.
    """

    total: Tensor
    count: Tensor
    parts: dict[str, Tensor]


class Objective(Protocol):
    """Say what a stage minimises."""

    needs: frozenset[Signal]

    @property
    def part_names(self) -> tuple[str, ...]:
        """Keys of ``LossTerm.parts``, in order."""
        ...

    def bind(self, config: Any, teacher_config: Any) -> None:
        """Learn the student's placement and check that the teacher fits.

        Raises:
            RecipeError: The student has nothing that this objective could train, or the teacher another shape.
        """
        ...

    def calibrate(self, teacher: nn.Module, batch: Batch) -> None:
        """Measure the teacher once, before training, where the objective has a scale that must stay fixed."""
        ...

    def reaches(self, parameter: str) -> bool:
        """Whether a gradient can flow to the named parameter of the student."""
        ...

    def observe(self, teacher: nn.Module, batch: Batch) -> TeacherSignals:
        """Run the teacher, without gradients, and keep what ``needs`` names."""
        ...

    def __call__(self, student: nn.Module, signals: TeacherSignals, batch: Batch) -> LossTerm:
        """Run the student on the batch and sum the loss over counted positions."""
        ...


def check_vocabulary(teacher_config: Any, student_config: Any) -> None:
    """Reject a teacher whose distributions cannot be compared with the student's entry by entry.

    Raises:
        RecipeError: The vocabularies differ in size.
    """
    geometry.check_vocabulary(teacher_config.vocab_size, student_config.vocab_size)

"""What an objective is: a function of the student, the teacher's signals and a batch that returns a sum and a count."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gendistill.data.batch import Batch
from gendistill.losses.student import StudentLike
from gendistill.teachers.base import Needs, Teacher, TeacherFacts, TeacherSignals


class LossTerm(NamedTuple):
    """One micro-batch's loss, before any division.

    Attributes:
        total: Float32 scalar, summed over counted positions; differentiable.
        count: Int64 scalar, counted positions.
        parts: Detached float32 sums by name, for logging.
    """

    total: Tensor
    count: Tensor
    parts: dict[str, Tensor]


class Objective(Protocol):
    """What a stage minimises. For every batch it is told what the teacher said, as far as it needs it."""

    @property
    def needs(self) -> Needs:
        """What it must see of the teacher for every batch; known once it is bound."""
        ...

    @property
    def part_names(self) -> tuple[str, ...]:
        """Keys of ``LossTerm.parts``, in order."""
        ...

    def bind(self, config: Any, teacher: TeacherFacts) -> None:
        """Learn the student's placement from its configuration, and check that the teacher fits.

        Raises:
            RecipeError: The student has nothing that this objective could train, or the teacher another shape.
        """
        ...

    def calibrate(self, teacher: Teacher, batch: Batch) -> None:
        """Measure the teacher once, before training, where the objective has a scale that must stay fixed."""
        ...

    def reaches(self, parameter: str) -> bool:
        """Whether a gradient can flow to the named parameter of the student."""
        ...

    def __call__(self, student: StudentLike, signals: TeacherSignals, batch: Batch) -> LossTerm:
        """Run the student on the batch and sum the loss over counted positions."""
        ...

"""What learns in a stage, as numbers and bytes, before there is a model. Imports torch only when it is asked."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from gendistill.anatomy.adapters import adapter_shapes
from gendistill.anatomy.groups import ParamGroup, param_group
from gendistill.anatomy.moments import moment_bytes, work_bytes
from gendistill.config.schema import StageConfig
from gendistill.conversion.plan import ConversionPlan

if TYPE_CHECKING:
    from gendistill.losses.base import Objective
    from gendistill.teachers.base import TeacherFacts


@dataclass(frozen=True, slots=True)
class Learning:
    """What learns in a stage.

    Attributes:
        optimizer: Kind of the optimizer.
        objective: What is minimised, bound to both models.
        names: Of the tensors that learn whole.
        adapted_names: Of the weights that learn through an adapter.
        whole: Group and shape of every tensor that learns whole.
        adapted: Group and shape of every weight that learns through an adapter.
        rank: Of the adapters.
    """

    optimizer: str
    objective: Objective
    names: tuple[str, ...]
    adapted_names: tuple[str, ...]
    whole: tuple[tuple[ParamGroup, tuple[int, ...]], ...]
    adapted: tuple[tuple[ParamGroup, tuple[int, ...]], ...] = ()
    rank: int = 0

    @property
    def tensors(self) -> list[tuple[ParamGroup, tuple[int, ...]]]:
        """Group and shape of every tensor that the optimizer is given."""
        factors = [
            (group, factor) for group, shape in self.adapted for factor in adapter_shapes(shape, self.rank)
        ]
        return [*self.whole, *factors]

    def counts(self) -> dict[ParamGroup, int]:
        """Count the numbers that learn, per group."""
        found = Counter[ParamGroup]()
        for group, shape in self.tensors:
            found[group] += math.prod(shape)
        return {group: found[group] for group in ParamGroup if group in found}

    @property
    def num_trained(self) -> int:
        """How many numbers learn."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def num_adapters(self) -> int:
        """How many of them are in adapters."""
        return self.num_trained - sum(math.prod(shape) for _, shape in self.whole)

    @property
    def moments(self) -> int:
        """Bytes of the optimizer's moments."""
        return sum(moment_bytes(self.optimizer, group, shape) for group, shape in self.tensors)

    @property
    def work(self) -> int:
        """Bytes that a step of the optimizer works on beside them."""
        groups = dict.fromkeys(group for group, _ in self.tensors)
        return max(
            work_bytes(self.optimizer, group, [shape for other, shape in self.tensors if other is group])
            for group in groups
        )

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint, but for a few kilobytes of names."""
        return 4 * self.num_trained + self.moments + 4 * len(self.tensors)

    def kept_by_adapters(self, *, dropout: bool) -> int:
        """Count the numbers that adapters keep per token for the backward pass.

        Each keeps what is between its factors, and with dropout its own copy of what goes into it. Beside fused layers
        it keeps nothing: what is between its factors is computed again.
        """
        return sum(self.rank + (shape[1] if dropout else 0) for _, shape in self.adapted)


def find_learning(
    name: str, stage: StageConfig, conversion: ConversionPlan, teacher: TeacherFacts, *, tied_head: bool
) -> Learning:
    """Find what a stage trains, whole and through adapters: exact.

    Raises:
        RecipeError: A pattern matches nothing, a named group cannot learn, or the objective does not fit the models.
    """
    from gendistill.losses.build import build_objective
    from gendistill.training.adapters import choose_adapted
    from gendistill.training.freeze import choose_trained

    shapes = {step.name: step.shape for step in conversion.steps}
    groups = {each: param_group(each, conversion.placement.kinds, tied_head=tied_head) for each in shapes}
    objective = build_objective(stage.objective)
    objective.bind(SimpleNamespace(**conversion.student_config), teacher)
    chosen, _ = choose_trained(groups, stage, name=name, tied=tied_head, reaches=objective.reaches)
    adapted: list[str] = []
    if stage.lora is not None:
        adapted, _ = choose_adapted(shapes, groups, stage, name=name, reaches=objective.reaches)
    return Learning(
        stage.optimizer,
        objective,
        tuple(each for each in shapes if each in chosen),
        tuple(adapted),
        tuple((groups[each], shapes[each]) for each in shapes if each in chosen),
        tuple((groups[each], shapes[each]) for each in adapted),
        stage.lora.rank if stage.lora else 0,
    )


def check_packages(name: str, stage: StageConfig) -> None:
    """Refuse a stage that asks for what is not installed.

    Raises:
        RecipeError: A package is missing.
    """
    from gendistill.training.adamw8bit import check_bitsandbytes
    from gendistill.training.adapters import check_peft

    if stage.lora is not None:
        check_peft(f"stages.{name}.lora")
    if stage.optimizer == "adamw8bit":
        check_bitsandbytes(f"stages.{name}.optimizer")

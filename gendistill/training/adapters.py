"""LoRA: which weights a stage adapts, the adapters in the student's place of them, and the plain student again."""

from __future__ import annotations

import importlib.util
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gendistill.anatomy.adapters import adapter_shapes, is_adaptable
from gendistill.anatomy.groups import ParamGroup
from gendistill.config.lora import LoRAConfig
from gendistill.config.schema import StageConfig
from gendistill.errors import RecipeError
from gendistill.training.freeze import check_rates, narrow, param_group_of
from gendistill.types import short_count

# the name under which peft keeps the only adapter of a layer
_ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What is adapted.

    Attributes:
        names: Adapted weights by their plain names, in model order.
        adapters: Numbers that learn, per group.
        adapted: Frozen numbers that they adapt, per group.
        rank: Of every adapter.
        notes: What the reader of the recipe would not expect.
    """

    names: tuple[str, ...]
    adapters: dict[ParamGroup, int]
    adapted: dict[ParamGroup, int]
    rank: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        parts = ", ".join(
            f"{group} {short_count(count)} (of {short_count(self.adapted[group])})"
            for group, count in self.adapters.items()
        )
        total = short_count(sum(self.adapters.values()))
        line = (
            f"adapts {len(self.names)} weights by LoRA of rank {self.rank}: {total} parameters learn: {parts}"
        )
        return "\n".join([line, *self.notes])


def check_peft(where: str) -> None:
    """Refuse LoRA where peft is missing.

    Raises:
        RecipeError: It is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise RecipeError(
            "LoRA needs the package peft, which is not installed",
            where=where,
            hint="pip install peft, or remove the section lora",
        )


def choose_adapted(
    shapes: Mapping[str, Sequence[int]],
    groups: Mapping[str, ParamGroup],
    stage: StageConfig,
    *,
    name: str,
    reaches: Callable[[str], bool],
) -> tuple[list[str], list[str]]:
    """Say which weights a stage adapts, and what the reader of the recipe would not expect.

    Args:
        shapes: Of every parameter of the plain student, by name.
        groups: Theirs.
        stage: With a section ``lora``.
        name: Name of the stage, for errors.
        reaches: Whether the objective can train a parameter.
    Raises:
        RecipeError: Nothing is left to adapt, the rank is too large, or the objective reaches none of a group.
    """
    assert stage.lora is not None
    lora, where = stage.lora, f"stages.{name}.lora"
    present = set(groups.values())
    absent = [group for group in lora.groups if group not in present]
    if len(absent) == len(lora.groups):
        raise RecipeError(
            f"nothing to adapt: the student has no parameters in {', '.join(absent)}",
            where=f"{where}.groups",
            hint="name groups that the placement has, or remove the section lora",
        )
    inside = [each for each in shapes if groups[each] in lora.groups and is_adaptable(each, shapes[each])]
    asked = narrow(inside, lora.only, f"{where}.only", what="weights of the adapted groups")
    chosen = [each for each in asked if reaches(each)]
    if lost := {groups[each] for each in asked} - {groups[each] for each in chosen}:
        raise RecipeError(
            f"the objective {stage.objective.kind} gives no gradient to {', '.join(sorted(lost))}",
            where=f"{where}.groups",
            hint=f"remove {', '.join(sorted(lost))}, or train end to end with objective: {{kind: kl}}",
        )
    _check_rank(chosen, shapes, lora, where)
    notes = [f"this placement has no parameters in {group}" for group in absent]
    notes += check_rates(stage, lora.groups, {groups[each] for each in chosen}, present, name=name)
    if len(chosen) < len(asked):
        notes.append(
            f"{len(asked) - len(chosen)} weights outside the converted layers are not adapted: "
            f"{stage.objective.kind} does not reach them"
        )
    return chosen, notes


def adapter_counts(
    names: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    groups: Mapping[str, ParamGroup],
    rank: int,
) -> dict[ParamGroup, int]:
    """Count the numbers of the adapters of some weights, per group."""
    counts = Counter[ParamGroup]()
    for name in names:
        counts[groups[name]] += sum(math.prod(shape) for shape in adapter_shapes(shapes[name], rank))
    return dict(counts)


def insert_adapters(
    student: nn.Module,
    stage: StageConfig,
    *,
    name: str = "<name>",
    seed: int = 0,
    reaches: Callable[[str], bool] = lambda parameter: True,
) -> AdapterReport | None:
    """Put adapters around linear layers of a student, in place; they alone learn there.

    An adapter adds nothing until it has learned: of its two factors the second starts at zero, the first from a seed,
    alike on every device and process. Which other parameters learn stays as it was.

    Args:
        student: After ``apply_freeze``.
        stage: Its ``lora`` decides; without one nothing is done.
        name: Name of the stage, for errors and for the seed.
        seed: The recipe's.
        reaches: Whether the objective can train a parameter.
    Raises:
        RecipeError: peft is missing, or the stage asks for what ``choose_adapted`` refuses.
    """
    if stage.lora is None:
        return None
    lora, where = stage.lora, f"stages.{name}.lora"
    parameters = dict(student.named_parameters())
    shapes = {each: tuple(value.shape) for each, value in parameters.items()}
    groups = {each: param_group_of(each, student.config) for each in parameters}
    chosen, notes = choose_adapted(shapes, groups, stage, name=name, reaches=reaches)
    check_peft(where)
    modules = [each.removesuffix(".weight") for each in chosen]
    for module in modules:
        layer = student.get_submodule(module)
        if not isinstance(layer, nn.Linear):
            raise RecipeError(
                f"LoRA adapts linear layers, and {module} is a {type(layer).__name__}",
                where=where,
                hint=f"leave it out: name what to adapt under {where}.only",
            )
    learns = [value for value in parameters.values() if value.requires_grad]
    _wrap(student, modules, lora)
    for value in learns:  # peft freezes all but its own
        value.requires_grad_(True)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)
    for module in modules:
        _start(student.get_submodule(module), generator)
    adapted = Counter[ParamGroup]()
    for each in chosen:
        adapted[groups[each]] += parameters[each].numel()
    counts = adapter_counts(chosen, shapes, groups, lora.rank)
    return AdapterReport(tuple(chosen), counts, dict(adapted), lora.rank, tuple(notes))


@torch.no_grad()
def merge_adapters(student: nn.Module) -> None:
    """Add every adapter to the weight that it adapts, and take it out: the student is a plain one again, in place.

    Without adapters nothing is done. Biases and weights that are not adapted keep their bytes. A student that is still
    sharded stays as it is: that is what an interrupted stage leaves, and its processes no longer wait for one another.
    """
    if not hasattr(student, "peft_config") or any(isinstance(each, DTensor) for each in student.parameters()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(student.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            layer.merge()
            student.set_submodule(name, layer.get_base_layer())
    del student.peft_config


def _wrap(student: nn.Module, modules: Sequence[str], lora: LoRAConfig) -> None:
    from peft import LoraConfig, LoraModel

    # an expression is matched with whole names, a list also with their ends
    exactly = "|".join(map(re.escape, modules))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=f"(?:{exactly})",
    )
    LoraModel(student, config, _ADAPTER)


def _start(layer: Any, generator: torch.Generator) -> None:
    """Fill a new adapter in float32, and leave casts to autocast, which rounds once."""
    layer.lora_A.float()
    layer.lora_B.float()
    first: Tensor = layer.lora_A[_ADAPTER].weight
    bound = 1 / math.sqrt(first.shape[1])
    with torch.no_grad():
        first.copy_(torch.empty(first.shape).uniform_(-bound, bound, generator=generator))
    layer.cast_input_dtype_enabled = False


def _check_rank(
    names: Sequence[str], shapes: Mapping[str, Sequence[int]], lora: LoRAConfig, where: str
) -> None:
    """Refuse adapters that hold as many numbers as the weights that they adapt."""
    large = [name for name in names if _highest_rank(shapes[name]) < lora.rank]
    if not large:
        return
    highest = min(_highest_rank(shapes[name]) for name in large)
    ends = {name.split(".")[-2] for name in large}
    leaves = dict.fromkeys(name.split(".")[-2] for name in names if name.split(".")[-2] not in ends)
    ways = [f"{where}.rank={highest}"] if highest else []
    ways += [rf"""{where}.only=['\.({"|".join(leaves)})\.']"""] if leaves else []
    raise RecipeError(
        f"an adapter of rank {lora.rank} is at least as large as {large[0]}, {list(shapes[large[0]])}"
        + (f", and as {len(large) - 1} other weights" if len(large) > 1 else ""),
        where=f"{where}.rank",
        hint=" or ".join(ways) or "adapt larger weights",
    )


def _highest_rank(shape: Sequence[int]) -> int:
    """Return the highest rank at which an adapter of a weight ``[out, in]`` holds fewer numbers than the weight."""
    return (math.prod(shape) - 1) // sum(shape)

"""Show a conversion plan as a tree for people. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.markup import escape
from rich.tree import Tree

from gendistill.conversion.plan import ConversionPlan, Origin, TensorStep

_COLOURS = {Origin.COPIED: "green", Origin.TRANSFORMED: "yellow", Origin.INITIALISED: "cyan"}


def render_plan(plan: ConversionPlan) -> Tree:
    """Draw what becomes of every tensor; layers with the same steps share one branch.

    Counts of parameters are exact.
    """
    origins = ", ".join(
        f"[{_COLOURS[origin]}]{count:,} {origin}[/]" for origin, count in plan.parameters_by_origin().items()
    )
    root = Tree(
        f"[bold]{plan.placement}[/]  {plan.num_parameters:,} parameters, {plan.num_bytes / 1e9:.2f} GB: {origins}"
    )
    outer = [step for step in plan.steps if not step.name.startswith("model.layers.")]
    _add_steps(root.add(f"outside the layers  {_size(outer)}"), outer, prefix="")
    for layers, steps in _group_layers(plan):
        kind = plan.placement.kinds[layers[0]]
        count = f"{len(layers)} x " if len(layers) > 1 else ""
        branch = root.add(f"[bold]{kind}[/]  layers {format_layers(layers)}  {count}{_size(steps)}")
        _add_steps(branch, steps, prefix=f"model.layers.{layers[0]}.")
    if plan.dropped:
        branch = root.add(f"dropped  {len(plan.dropped)} tensors of the checkpoint")
        for reason, count in Counter(item.reason for item in plan.dropped).items():
            names = sorted({_without_layer(item.name) for item in plan.dropped if item.reason == reason})
            branch.add(f"{count} x {escape(', '.join(names))}: {escape(reason)}")
    return root


def _group_layers(plan: ConversionPlan) -> list[tuple[list[int], list[TensorStep]]]:
    """Put together the layers whose steps differ in nothing but the layer's number."""
    layers: dict[int, list[TensorStep]] = {}
    for step in plan.steps:
        parts = step.name.split(".")
        if parts[1] == "layers":
            layers.setdefault(int(parts[2]), []).append(step)
    groups: dict[tuple[object, ...], tuple[list[int], list[TensorStep]]] = {}
    for layer, steps in layers.items():
        key = (
            plan.placement.kinds[layer],
            *((_without_layer(step.name), step.shape, step.dtype, step.describe()) for step in steps),
        )
        groups.setdefault(key, ([], steps))[0].append(layer)
    return list(groups.values())


def _add_steps(branch: Tree, steps: Iterable[TensorStep], *, prefix: str) -> None:
    for step in steps:
        shape = " x ".join(str(size) for size in step.shape)
        colour = _COLOURS[step.origin]
        name = step.name.removeprefix(prefix)
        branch.add(f"{escape(name)}  [dim]{shape} {step.dtype}[/]  [{colour}]{escape(step.describe())}[/]")


def _size(steps: Iterable[TensorStep]) -> str:
    return f"[dim]{sum(step.num_parameters for step in steps):,} parameters[/]"


def _without_layer(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[3:]) if parts[1:2] == ["layers"] else name


def format_layers(layers: Iterable[int]) -> str:
    """Write ``0-3, 7, 9-10`` for a rising list of layers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

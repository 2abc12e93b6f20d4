"""What training does to weights: gradient norms and change by group, and tensors that stayed as they were."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gendistill.anatomy.groups import ParamGroup
from gendistill.training.job import StageJob
from gendistill.training.monitors.base import StageInProgress, When

_EFFECTIVE = 0.99  # share of trained tensors that must have changed
# weights that are compared with the start of the stage, and tensors of a group that they are taken from
_SAMPLED_WEIGHTS = 4096
_SAMPLED_TENSORS = 32
# after so many steps, this share of a group's weights must differ from the start
_SETTLED_STEPS, _MOVED = 50, 0.5


class Groups:
    """Gradient norms of the latest step, and how far weights have moved since the stage began, by group.

    ``<group>/grad_norm`` is before clipping, and left out after a step that was not finite. Of a sample of weights,
    ``<group>/moved`` is the share that differs from the start, and ``<group>/change`` the norm of the difference over
    that of the start. Numbers that are not finite are left out.
    """

    when: When = "log"
    every = None

    def __init__(self, job: StageJob) -> None:
        self.name, self.limit = job.name, job.config.grad_clip
        self.has_warned = False

    def __call__(self, run: StageInProgress) -> dict[str, float]:
        """Compute everything on the device, and wait for it once."""
        names, numbers = [], []
        reading = run.meter.read()
        for group, parameters in groups(run.optimizer).items():
            gradients = [each.grad for each in parameters if each.grad is not None]
            # clipping by a norm that is not finite has made zeros of the others
            if gradients and not reading.in_a_row:
                names.append(f"{group}/grad_norm")
                numbers.append(run.parallel.norm(gradients))
            now, start = _sample(parameters), run.start[group]
            sums = [(now != start).sum(), (now - start).square().sum(), start.square().sum()]
            count = torch.full((), len(now), device=now.device)
            moved, difference, size, count = run.parallel.sum(
                torch.stack([each.float() for each in (*sums, count)])
            )
            names += [f"{group}/moved", f"{group}/change"]
            numbers += [moved / count, (difference / size).sqrt()]
        found = dict(zip(names, torch.stack(numbers).tolist(), strict=True))
        clipped = min(1.0, self.limit / (reading.grad_norm + 1e-6))
        for name in names:
            if name.endswith("/grad_norm"):
                found[name] /= clipped
        self._warn(run, found)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _warn(self, run: StageInProgress, found: Mapping[str, float]) -> None:
        """Say once, early enough to stop, that updates are lost; rows of the embedding wait for their tokens."""
        still = [
            f"{name.split('/')[0]} {value:.0%}"
            for name, value in found.items()
            if name.endswith("/moved") and value < _MOVED and not name.startswith(ParamGroup.EMBED)
        ]
        if still and not self.has_warned and run.progress.step >= _SETTLED_STEPS:
            self.has_warned = True
            run.console.warn(
                f"{self.name}: after {run.progress.step:,} steps few weights differ from the start "
                f"({', '.join(still)}): the rate may be too small, or the objective does not reach them"
            )


class Effect:
    """A warning when training has left trained tensors as they were."""

    when: When = "end"
    every = None

    def __init__(self, job: StageJob) -> None:
        self.name = job.name

    def __call__(self, run: StageInProgress) -> None:
        """Count the tensors that did not change."""
        if run.tensors_changed < _EFFECTIVE:
            run.console.warn(
                f"{self.name}: {len(run.unchanged)} of {len(run.trained)} trained tensors did not change at all, "
                f"such as {', '.join(run.unchanged[:3])}: the rate may be too small, or the objective does not reach "
                "them"
            )


def watch_groups(job: StageJob) -> Groups | None:
    """Look at groups where the recipe asks for it."""
    return Groups(job) if job.watch.groups else None


def groups(optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
    """List what an optimizer of ``build_optimizer`` trains, by group."""
    found: dict[str, list[nn.Parameter]] = {}
    for each in optimizer.param_groups:
        found.setdefault(each["group"].value, []).extend(each["params"])
    return found


def sample_weights(optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
    """Copy the sample of weights that :class:`Groups` compares: a few megabytes of a whole model."""
    return {group: _sample(parameters) for group, parameters in groups(optimizer).items()}


def _sample(parameters: list[nn.Parameter]) -> Tensor:
    """Copy some weights of some tensors, always the same; of a sharded tensor, those of this process's part."""
    # every third tensor could be the same layer of every block, every 1,024th weight the same column
    count = min(len(parameters), _SAMPLED_TENSORS)
    chosen = random.Random(0).sample(parameters, count)
    own = [each.to_local() if isinstance(each, DTensor) else each for each in chosen]
    return torch.cat(
        [each.detach().reshape(-1)[:: max(1, each.numel() // _SAMPLED_WEIGHTS) | 1] for each in own]
    )

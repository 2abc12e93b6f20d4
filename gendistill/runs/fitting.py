"""What would let a stage fit into memory: settings, predicted one by one, the cheapest first. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gendistill.anatomy.groups import ParamGroup
from gendistill.config.lora import LoRAConfig
from gendistill.config.schema import StageConfig

_MOST_PROCESSES = 64
_RANK = 16
_THIRD = "about a third more time"
# what a pretrained model already knows, and a few numbers can adapt; new mixers have everything to learn
_PRETRAINED = (ParamGroup.ATTENTION, ParamGroup.MLP)

# predicts the peak in bytes of a stage of this name, as planned (None) or sharded over so many processes, and with
# CUDA graphs as planned or without any; None: the stage would be refused
Peak = Callable[[str, StageConfig, int | None, bool], int | None]


@dataclass(frozen=True, slots=True)
class Way:
    """Settings with which a stage fits.

    Attributes:
        overrides: As they are written after a command.
        num_processes: How many processes they need; None: as many as planned.
        peak: Predicted bytes of one process.
        cost: What is paid for it, for people.
    """

    overrides: tuple[str, ...]
    num_processes: int | None
    peak: int
    cost: str

    @property
    def command(self) -> str:
        """What to add to the command line."""
        flag = () if self.num_processes is None else (f"--num-processes {self.num_processes}",)
        return " ".join((*self.overrides, *flag))


def ways_to_fit(
    name: str, stage: StageConfig, num_processes: int, peak: Peak, limit: int, *, num_layers: int
) -> Iterator[Way]:
    """Yield ways, the cheapest first; none if nothing here helps.

    A way that costs more is named only if more rows per forward fit with it: these are what it buys. Ways with
    more devices do not take the place of those that need none.

    Args:
        name: Of the stage.
        stage: As planned; it does not fit.
        num_processes: As planned.
        peak: Predicts.
        limit: Bytes of the device.
        num_layers: Of the student: of as many as needed activations are computed again.
    """
    alone = sharded = 0
    for change in _changes(name, stage):
        for rows, way in _sized(name, stage, change, num_processes, peak, limit, num_layers):
            if rows > (max(alone, sharded) if change.sharded else alone):
                yield way
            if change.sharded:
                sharded = max(sharded, rows)
            else:
                alone = max(alone, rows)
        if alone == stage.micro_batch_size:
            return


@dataclass(frozen=True, slots=True)
class _Change:
    settings: dict[str, Any]
    overrides: tuple[str, ...]
    cost: str
    sharded: bool = False
    captured: bool = True


def _changes(name: str, stage: StageConfig) -> Iterator[_Change]:
    """Yield what can be changed, by what it costs: nothing, time, rounding, machines, what learns."""
    at = f"stages.{name}."
    recompute = _Change({"gradient_checkpointing": True}, (f"{at}gradient_checkpointing=true",), _THIRD)
    eight = _Change(
        {"optimizer": "adamw8bit"}, (f"{at}optimizer=adamw8bit",), "moments are rounded; needs bitsandbytes"
    )
    again = [] if stage.gradient_checkpointing else [recompute]
    packed = [] if stage.optimizer == "adamw8bit" else [eight]
    yield _Change({}, (), "results stay the same")
    yield _Change({}, ("engine.capture=never",), "more work for the host", captured=False)
    yield from again
    yield from packed
    for first in again:
        for second in packed:
            yield _both(first, second)
    shards = _Change(
        {"optimizer": "adamw"},
        (
            *(() if packed else (f"{at}optimizer=adamw",)),
            *("engine.parallel=fsdp2", "engine.reshard=always"),
        ),
        "as many devices",
        sharded=True,
    )
    yield shards
    yield from (_both(first, shards) for first in again)
    adapters = _adapters(at, stage)
    if adapters is not None:
        yield adapters
        yield from (_both(first, adapters) for first in again)
        yield from (_both(_both(first, second), adapters) for first in again for second in packed)


def _both(first: _Change, second: _Change) -> _Change:
    return _Change(
        {**first.settings, **second.settings},
        (*first.overrides, *second.overrides),
        f"{first.cost}; {second.cost}",
        first.sharded or second.sharded,
    )


def _adapters(at: str, stage: StageConfig) -> _Change | None:
    """Let pretrained groups learn through adapters instead of whole."""
    groups = tuple(group for group in stage.train if group in _PRETRAINED)
    if stage.lora is not None or stage.only or not groups:
        return None
    rest = tuple(group for group in stage.train if group not in groups)
    return _Change(
        {"train": rest, "lora": LoRAConfig(rank=_RANK, groups=groups)},
        (
            f"{at}train=[{','.join(rest)}]",
            f"{at}lora.rank={_RANK}",
            f"{at}lora.groups=[{','.join(groups)}]",
        ),
        f"{', '.join(groups)} learn through adapters only",
    )


def _sized(
    name: str,
    stage: StageConfig,
    change: _Change,
    num_processes: int,
    peak: Peak,
    limit: int,
    num_layers: int,
) -> Iterator[tuple[int, Way]]:
    """Yield a change at the most rows per forward with which it fits, on the fewest processes, and these rows."""
    counts: list[int | None] = [None]
    if change.sharded:
        counts = [2**power for power in range(1, _MOST_PROCESSES.bit_length()) if 2**power >= num_processes]
    for count in counts:
        for rows in _rows(stage, count or num_processes):
            settings = {**change.settings, "micro_batch_size": rows}
            predicted = peak(name, stage.model_copy(update=settings), count, change.captured)
            if predicted is None or predicted > limit:
                continue
            fewer = rows < stage.micro_batch_size
            size = (f"stages.{name}.micro_batch_size={rows}",) if fewer else ()
            found = Way((*size, *change.overrides), count, predicted, change.cost)
            yield (
                rows,
                _fewest_layers(found, name, stage.model_copy(update=settings), peak, limit, num_layers),
            )
            return


def _fewest_layers(way: Way, name: str, stage: StageConfig, peak: Peak, limit: int, num_layers: int) -> Way:
    """Compute no more layers again than needed, where a way computes all of them again."""
    every = f"stages.{name}.gradient_checkpointing=true"
    if every not in way.overrides:
        return way
    for layers in range(1, num_layers):
        again = stage.model_copy(update={"gradient_checkpointing": layers})
        predicted = peak(name, again, way.num_processes, True)
        if predicted is not None and predicted <= limit:
            some = f"stages.{name}.gradient_checkpointing={layers}"
            overrides = tuple(some if each == every else each for each in way.overrides)
            time = f"about {layers / num_layers / 3:.0%} more time"
            return replace(way, overrides=overrides, peak=predicted, cost=way.cost.replace(_THIRD, time))
    return way


def _rows(stage: StageConfig, num_processes: int) -> list[int]:
    """List the rows per forward, the most first, that a step can be split into."""
    most = stage.micro_batch_size
    return [rows for rows in range(most, 0, -1) if stage.batch_size % (rows * num_processes) == 0]

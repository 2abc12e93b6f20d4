"""What a stage is asked to do, what it reads, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gendistill.config.engine import EngineConfig
from gendistill.config.schema import StageConfig
from gendistill.config.watch import Tracker, WatchConfig
from gendistill.data.batch import Batch
from gendistill.training.left_out import HasRows
from gendistill.types import short_count


class Stream(HasRows, Protocol):
    """An endless iterator over this process's micro-batches, a list for each global step.

    It goes on from any saved state, which is JSON and the same on every process.
    """

    def __next__(self) -> list[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Examiner(Protocol):
    """Someone who lets a student write: it has the tokenizer, questions and tasks, which training does not know."""

    def answers(self, student: Any, /) -> list[dict[str, Any]]:
        """Ask the open questions; return rows with ``id``, ``question``, ``student`` and ``teacher`` at least."""
        ...

    def score(self, student: Any, task: str, limit: int | None, /) -> dict[str, float]:
        """Score it by generation on the first items of a task; ``value`` is the share of the ``n`` items."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """What is to be done in a stage, and where.

    Attributes:
        name: Name of the stage.
        config: Objective, groups, length, rates.
        folder: The stage's own folder; what an interrupted attempt left is in it.
        seed: The recipe's. Every step is seeded from it and its number.
        heldout: Batches to score at the end, on every process the same.
        heldout_every: Also score every so many steps.
        lock: More settings that must not change before a resume (teacher, data), as JSON.
        engine: How the stage is computed.
        watch: What is looked at meanwhile.
        examiner: Lets the student write, where ``watch`` or ``stop_early`` ask for it.
        trackers: Where to write log lines beside ``metrics.jsonl``.
        project: Name of the run, for trackers.
    """

    name: str
    config: StageConfig
    folder: Path
    seed: int
    heldout: Sequence[Batch]
    heldout_every: int | None = None
    lock: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineConfig = field(default_factory=EngineConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    examiner: Examiner | None = None
    trackers: tuple[Tracker, ...] = ()
    project: str = "gendistill"

    @property
    def plan(self) -> Path:
        """File of what is decided before the first step."""
        return self.folder / "plan.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.folder / "checkpoints"


@dataclass(frozen=True, slots=True)
class StageResult:
    """How a stage ended; written as ``result.json``.

    Attributes:
        tokens: Without padding, over all processes.
        seconds: Spent in steps, over all sessions.
        loss_first, loss_last: Of the first and last log interval.
        tensors_changed: Share of the trained tensors that differ from the start.
        heldout: What ``score_heldout`` returns.
        heldout_by_position: What ``HeldoutMeasure.by_position`` holds.
        skipped: Steps that changed nothing, because loss or gradient was not finite.
        rewinds: Returns to a checkpoint, as ``checkpoint.Progress`` lists them.
        data: Rows read and left out of each source, and what is odd about them, as ``data_record`` returns.
        monitors: What monitors found at the end, by name.
    """

    stage: str
    objective: str
    steps: int
    tokens: int
    seconds: float
    loss_first: float
    loss_last: float
    tensors_changed: float
    heldout: dict[str, float]
    heldout_by_position: list[dict[str, float]]
    skipped: int
    rewinds: list[dict[str, int]]
    data: dict[str, Any]
    monitors: dict[str, dict[str, float]]

    def __repr__(self) -> str:
        loss = f"{self.objective} {self.loss_first:.4g} -> {self.loss_last:.4g}"
        length = f"{self.steps:,} steps, {short_count(self.tokens)} tokens"
        return f"<StageResult {self.stage}: {loss} in {length}; held-out KL {self.heldout['kl']:.4g}>"


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done between two steps, alike on every process.

    Attributes:
        log, save: Whether a line and a checkpoint are to be written.
        stop: Whether somebody asked to stop.
        waits: Whether the device is waited for.
    """

    log: bool
    save: bool
    stop: bool
    waits: bool

"""Everything a stage in progress consists of, and how it is put together or picked up again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from gendistill.config.schema import StageConfig
from gendistill.data.batch import Batch
from gendistill.errors import DataError
from gendistill.losses.base import Objective, check_vocabulary
from gendistill.losses.build import build_objective
from gendistill.training.checkpoint import checksums, find_checkpoint, load_checkpoint
from gendistill.training.console import TrainingConsole
from gendistill.training.freeze import apply_freeze
from gendistill.training.left_out import HasRows
from gendistill.training.meter import Meter
from gendistill.training.optim import build_optimizer, choose_compute_dtype, fixed_dtype
from gendistill.training.plan import (
    StagePlan,
    existing_plan,
    locked_settings,
    num_steps,
    time_step,
    write_plan,
)
from gendistill.training.processes import check_accelerator, largest, on_main
from gendistill.training.step import StepRunner


class Stream(HasRows, Protocol):
    """Yield each global step's micro-batches of this process, without end, from any saved state.

    The state is JSON and the same on every process.
    """

    def __next__(self) -> list[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass(slots=True)
class Progress:
    """Hold what a checkpoint remembers of the past.

    Attributes:
        step: Optimizer steps finished.
        tokens: Tokens seen, without padding, over all processes.
        seconds: Time spent in steps, over all sessions.
        loss_first, loss_last: Of the first and the last log interval.
        window: The meter's sums since the last log line.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    window: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Session:
    """Hold one stage in progress on this process.

    Attributes:
        before: Checksum of every parameter before the stage.
        fetched: Micro-batches that were timed and not trained on yet.
        checkpoint: Where the session resumed.
    """

    stage: StageConfig
    name: str
    folder: Path
    seed: int
    student: Any
    teacher: Any
    stream: Stream
    heldout: Sequence[Batch]
    heldout_every: int | None
    accelerator: Accelerator
    console: TrainingConsole
    objective: Objective
    optimizer: torch.optim.AdamW
    runner: StepRunner
    plan: StagePlan
    progress: Progress
    meter: Meter
    trained: dict[str, nn.Parameter]
    before: dict[str, int]
    fetched: list[Batch] | None

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.folder / "checkpoints"


def open_session(
    stage: StageConfig,
    *,
    name: str,
    student: Any,
    teacher: Any,
    stream: Stream,
    folder: Path,
    accelerator: Accelerator,
    heldout: Sequence[Batch],
    seed: int,
    console: TrainingConsole,
    heldout_every: int | None,
    lock: Mapping[str, Any],
) -> Session:
    """Check, freeze and wrap the student, decide the plan, and restore the newest checkpoint.

    Arguments and errors as for ``train_stage``.
    """
    check_accelerator(accelerator)
    check_vocabulary(teacher.config, student.config)
    scored = [batch for batch in heldout if batch.num_labels]
    if not scored:
        raise DataError("no held-out text to score the stage on", where="heldout", hint="raise heldout.rows")
    objective = build_objective(stage.objective)
    objective.bind(student.config, teacher.config)
    console.say(f"{name}: {apply_freeze(student, stage, name=name, reaches=objective.reaches)}")
    device = accelerator.device
    # float32 masters: bfloat16 weights would swallow most updates
    student.float().to(device).train()
    teacher.to(device).eval()
    if stage.gradient_checkpointing:
        recompute_activations(student, True)
    objective.calibrate(teacher, scored[0].to(device))
    before = checksums(student)
    optimizer = build_optimizer(student, stage)

    locked = locked_settings(stage, name=name, seed=seed, checksums=before, extra=dict(lock))
    checkpoint = on_main(accelerator, lambda: find_checkpoint(folder / "checkpoints", console.say))
    plan = on_main(accelerator, lambda: existing_plan(folder / "plan.json", locked, checkpoint))
    runner = StepRunner(student, teacher, objective, accelerator)
    fetched = None
    if plan is not None:
        runner.compute_dtype = plan.dtype
    else:
        hidden_size = student.config.hidden_size
        runner.compute_dtype = fixed_dtype(stage) or on_main(
            accelerator, lambda: choose_compute_dtype(device, hidden_size)
        )
        # timed first and trained on afterwards, as the first step
        fetched = next(stream) if stage.minutes is not None else None
        plan = _decide(stage, fetched, runner, optimizer, seed=seed, locked=locked)
        on_main(accelerator, lambda: write_plan(folder / "plan.json", plan))

    progress = Progress()
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, student=student, optimizer=optimizer)
        stream.load_state_dict(state["stream"])
        progress = Progress(**state["progress"])
    console.say(
        f"{name}: {plan.steps:,} steps of {stage.batch_size} x {stage.seq_len:,} tokens, computed in "
        f"{plan.compute_dtype} on {device.type}"
        + (f", {plan.seconds_per_step:.2f} s each" if plan.seconds_per_step else "")
        + (f", resuming from {checkpoint}" if checkpoint else "")
    )
    return Session(
        stage=stage,
        name=name,
        folder=folder,
        seed=seed,
        student=student,
        teacher=teacher,
        stream=stream,
        heldout=heldout,
        heldout_every=heldout_every,
        accelerator=accelerator,
        console=console,
        objective=objective,
        optimizer=optimizer,
        runner=runner,
        plan=plan,
        progress=progress,
        meter=Meter(1 + len(objective.part_names), device, tokens=progress.tokens, window=progress.window),
        trained={name: value for name, value in student.named_parameters() if value.requires_grad},
        before=before,
        fetched=fetched,
    )


def _decide(
    stage: StageConfig,
    fetched: Sequence[Batch] | None,
    runner: StepRunner,
    optimizer: torch.optim.AdamW,
    *,
    seed: int,
    locked: dict[str, Any],
) -> StagePlan:
    """Fix the number of steps, timing the first micro-batches if the budget is in minutes."""
    started, seconds_per_step = time.perf_counter(), None
    if fetched is not None:
        seed_step(runner.accelerator, seed, 0)
        seconds_per_step = largest(runner.accelerator, time_step(runner.rehearse, fetched, optimizer))
        optimizer.zero_grad()
    spent = largest(runner.accelerator, time.perf_counter() - started)
    return StagePlan(
        steps=num_steps(stage, seconds_per_step, spent),
        compute_dtype=str(runner.compute_dtype).removeprefix("torch."),
        seconds_per_step=seconds_per_step,
        locked=locked,
    )


def recompute_activations(student: Any, enable: bool) -> None:
    """Switch gradient checkpointing of every decoder layer on or off."""
    with warnings.catch_warnings():
        # 5.17 knows only these names, later releases announce others for version 6
        warnings.simplefilter("ignore", FutureWarning)
        if enable:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            student.gradient_checkpointing_disable()


def seed_step(accelerator: Accelerator, seed: int, step: int) -> None:
    """Seed this process for one step: a pure function, so that resuming needs no random state.

    Args:
        accelerator: Its processes draw different numbers.
        seed: The recipe's.
        step: Steps finished before this one.
    """
    stream = (seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index
    torch.manual_seed(stream % 2**63)

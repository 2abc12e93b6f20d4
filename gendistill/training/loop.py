"""The one training loop: every stage, objective and number of processes goes through it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gendistill.config.schema import StageConfig
from gendistill.data.batch import Batch
from gendistill.errors import TrainingError
from gendistill.paths import write_json
from gendistill.training.checkpoint import checksums, find_checkpoint, save_checkpoint
from gendistill.training.console import StageView, TrainingConsole
from gendistill.training.diagnose import first_non_finite
from gendistill.training.heldout import score_heldout
from gendistill.training.interrupt import StageStopped, StopRequest, stop_on_signal
from gendistill.training.left_out import data_record, heavy_losses, left_out_lines
from gendistill.training.log import MetricLog
from gendistill.training.meter import Stopwatch
from gendistill.training.optim import learning_rate_factor, set_learning_rates
from gendistill.training.processes import largest, on_main
from gendistill.training.session import Session, Stream, open_session, recompute_activations, seed_step

_EFFECTIVE = 0.99  # share of trained tensors that must have changed


@dataclass(frozen=True, slots=True)
class StageResult:
    """Say how a stage ended; written as ``result.json``.

    Attributes:
        tokens: Without padding, over all processes.
        seconds: Spent in steps, over all sessions.
        loss_first, loss_last: Of the first and last log interval.
        tensors_changed: Share of the trained tensors that differ from the start.
        heldout: What ``score_heldout`` returns.
        data: Rows read and left out of each source, and what is odd about them, as ``data_record`` returns.
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
    data: dict[str, Any]


def train_stage(
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
    heldout_every: int | None = None,
    lock: Mapping[str, Any] | None = None,
) -> StageResult:
    """Train a student for one stage, from its newest checkpoint if there is one.

    The student becomes float32 and is trained in place; saving it is left to the caller. Writes ``plan.json``,
    ``metrics.jsonl``, ``checkpoints/`` and ``result.json`` in the stage's folder.

    Args:
        stage: Objective, groups, length, rates.
        name: Name of the stage.
        student: Hugging Face causal language model, as at the start of the stage, also when resuming.
        teacher: Likewise; run without gradients, in its own dtype.
        stream: This process's micro-batches, at their start: resuming sets its state.
        folder: The stage's own folder; what an interrupted attempt left is in it.
        accelerator: Without mixed precision and without gradient accumulation.
        heldout: Batches to score at the end, on every process the same.
        seed: The recipe's. Every step is seeded from it and its number.
        console: Where to report.
        heldout_every: Also score every so many steps.
        lock: More settings that must not change before a resume (teacher, data), as JSON.
    Raises:
        RecipeError: The stage does not fit student or teacher.
        CheckpointError: The recipe has changed since the stage began.
        TrainingError: A loss or gradient is not finite, or accelerate is set up in a way that would change them.
        StageStopped: SIGTERM or SIGINT came; a checkpoint is saved.
    """
    try:
        session = open_session(
            stage,
            name=name,
            student=student,
            teacher=teacher,
            stream=stream,
            folder=folder,
            accelerator=accelerator,
            heldout=heldout,
            seed=seed,
            console=console,
            heldout_every=heldout_every,
            lock=lock or {},
        )
        for note in stream.notes:
            console.warn(f"{name}: {note}")
        with (
            stop_on_signal() as stop,
            console.stage(name, num_steps=session.plan.steps, step=session.progress.step) as view,
        ):
            _Loop(session, view, stop).run()
        return _finish(session)
    finally:
        student.zero_grad()
        student.eval()
        if stage.gradient_checkpointing:
            recompute_activations(student, False)
        accelerator.free_memory()


class _Loop:
    """Take the remaining steps of a session; between two of them log, score, save or stop."""

    def __init__(self, session: Session, view: StageView, stop: StopRequest) -> None:
        self.session = session
        self.view = view
        self.stop = stop
        self.watch = Stopwatch()
        self.last_save = time.perf_counter()
        self.logged_tokens = session.progress.tokens
        self.has_logged = False
        main = session.accelerator.is_main_process
        self.metrics = (
            MetricLog(
                session.folder / "metrics.jsonl", up_to=session.progress.step, warn=session.console.warn
            )
            if main
            else None
        )

    def run(self) -> None:
        """Train to the end of the stage."""
        s = self.session
        on_cpu = s.accelerator.device.type == "cpu"
        while s.progress.step < s.plan.steps:
            micro_batches, s.fetched = s.fetched or next(s.stream), None
            seed_step(s.accelerator, s.seed, s.progress.step)
            factor = learning_rate_factor(s.stage.schedule, s.progress.step, s.plan.steps)
            rates = set_learning_rates(s.optimizer, factor)
            s.optimizer.zero_grad()
            losses, tokens = s.runner.accumulate(micro_batches)
            norm = torch.nn.utils.clip_grad_norm_(s.trained.values(), s.stage.grad_clip)
            s.progress.step += 1
            # while this is 1, the fused step changes nothing: weights and moments stay as before the bad step
            s.optimizer.found_inf = s.meter.add(s.progress.step, losses, tokens, norm)  # pyright: ignore
            s.optimizer.step()

            last = s.progress.step == s.plan.steps
            logs = last or _divides(s.stage.log_every_steps, s.progress.step) or self._scores()
            stopping, late = self._requests(asking=logs)
            saves = last or stopping or late or _divides(s.stage.save_every_steps, s.progress.step)
            if logs or saves or on_cpu:
                self._check_finite(micro_batches)
            if logs:
                self._log(rates)
            if saves:
                self._save()
            if stopping and not last:
                self._raise_stopped()

    def _scores(self) -> bool:
        s = self.session
        return _divides(s.heldout_every, s.progress.step) and s.progress.step < s.plan.steps

    def _requests(self, *, asking: bool) -> tuple[bool, bool]:
        """Say whether to stop and whether a checkpoint is due by time, alike on every process.

        Several processes ask each other at log steps only.
        """
        late = time.perf_counter() - self.last_save > 60 * self.session.stage.save_every_minutes
        accelerator = self.session.accelerator
        if accelerator.num_processes == 1:
            return bool(self.stop), late
        code = int(largest(accelerator, 2 * bool(self.stop) + late)) if asking else 0
        return code >= 2, code == 1

    def _check_finite(self, micro_batches: list[Batch]) -> None:
        s = self.session
        bad_step = s.meter.read().bad_step
        if bad_step is None:
            return
        place = "it happened between two log lines; set log_every_steps: 1 to see where"
        if bad_step == s.progress.step:
            # clipping has spread the first NaN over all gradients: compute them again
            s.optimizer.zero_grad()
            s.runner.accumulate(micro_batches)
            place = f"first seen in the {first_non_finite(s.student, s.runner.loss, micro_batches)}"
        kept = on_main(s.accelerator, lambda: find_checkpoint(s.checkpoints, s.console.say))
        raise TrainingError(
            f"loss or gradient is not finite at step {bad_step} of {s.plan.steps}; {place}. "
            + (f"The checkpoint {kept} is intact" if kept else "No checkpoint had been saved yet"),
            where=f"stages.{s.name}",
            hint=f"lower stages.{s.name}.lr or grad_clip, delete {s.folder} and run the same command again; "
            "unchanged, it would resume and stop at the same step",
        )

    def _log(self, rates: dict[str, float]) -> None:
        s, reading = self.session, self.session.meter.read()
        loss, *parts = reading.losses
        seconds = self.watch.lap()
        s.progress = replace(
            s.progress,
            tokens=reading.tokens,
            seconds=s.progress.seconds + seconds,
            loss_first=loss if s.progress.loss_first is None else s.progress.loss_first,
            loss_last=loss,
        )
        row: dict[str, Any] = {
            "step": s.progress.step,
            "tokens": reading.tokens,
            "loss": loss,
            "parts": dict(zip(s.objective.part_names, parts, strict=True)),
            "lr": rates,
            "grad_norm": reading.grad_norm,
            "tokens_per_second": (reading.tokens - self.logged_tokens) / seconds,
            "seconds": s.progress.seconds,
        }
        self.logged_tokens = reading.tokens
        s.meter.reset()
        if s.accelerator.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self._scores():
            with self.watch.paused():
                row["heldout"] = _score(s)
        if self.metrics is not None:
            self.metrics.write(row)
        self.view.show(row)
        if not self.has_logged:
            self.has_logged = True
            for line in heavy_losses(s.stream):
                s.console.warn(f"{s.name}: {line}; gendistill data shows what is left")

    def _save(self) -> None:
        s = self.session
        with self.watch.paused():
            progress = replace(
                s.progress,
                tokens=s.meter.read().tokens,
                seconds=s.progress.seconds + self.watch.elapsed,
                window=s.meter.window,
            )
            state = {"progress": asdict(progress), "stream": s.stream.state_dict()}
            on_main(
                s.accelerator,
                lambda: save_checkpoint(
                    s.checkpoints,
                    step=progress.step,
                    keep=s.stage.keep_checkpoints,
                    student=s.student,
                    optimizer=s.optimizer,
                    state=state,
                ),
            )
        self.last_save = time.perf_counter()

    def _raise_stopped(self) -> None:
        s = self.session
        number = self.stop.signal_number or signal.SIGTERM
        raise StageStopped(
            f"{signal.Signals(number).name} at step {s.progress.step} of {s.plan.steps}; "
            f"a checkpoint is saved in {s.checkpoints}",
            signal_number=number,
            where=f"stages.{s.name}",
            hint="run the same command again: it resumes from there",
        )


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _score(s: Session) -> dict[str, float]:
    dtype = s.runner.compute_dtype
    scores = score_heldout(s.student, s.teacher, s.heldout, compute_dtype=dtype, accelerator=s.accelerator)
    if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise TrainingError(
            f"held-out {', '.join(bad)} is not finite at step {s.progress.step} of {s.plan.steps}",
            where=f"stages.{s.name}",
            hint=f"lower stages.{s.name}.lr or grad_clip, delete {s.folder} and run the same command again",
        )
    return scores


def _finish(s: Session) -> StageResult:
    """Check that training had an effect, score held-out text and write the result."""
    after = checksums(s.student)
    unchanged = [name for name in s.trained if after[name] == s.before[name]]
    changed = 1 - len(unchanged) / len(s.trained)
    if changed < _EFFECTIVE:
        s.console.warn(
            f"{s.name}: {len(unchanged)} of {len(s.trained)} trained tensors did not change at all, such as "
            f"{', '.join(unchanged[:3])}: the rate may be too small, or the objective does not reach them"
        )
    for line in left_out_lines(s.stream):
        s.console.say(f"{s.name}: {line}")
    assert s.progress.loss_first is not None
    assert s.progress.loss_last is not None
    result = StageResult(
        stage=s.name,
        objective=s.stage.objective.kind,
        steps=s.progress.step,
        tokens=s.progress.tokens,
        seconds=s.progress.seconds,
        loss_first=s.progress.loss_first,
        loss_last=s.progress.loss_last,
        tensors_changed=changed,
        heldout=_score(s),
        data=data_record(s.stream),
    )
    on_main(s.accelerator, lambda: write_json(s.folder / "result.json", asdict(result)))
    return result

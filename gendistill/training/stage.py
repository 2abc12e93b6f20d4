"""One stage in progress: the one training loop, whatever the objective, the teacher and the number of processes."""

from __future__ import annotations

import signal
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gendistill.anatomy.placement import converted_layers, placed_kinds
from gendistill.data.batch import Batch
from gendistill.engine.decoder import fuse, is_fused, release, why_not
from gendistill.errors import DataError, RecipeError, TrainingError
from gendistill.losses.build import build_objective
from gendistill.losses.logits import LogitObjective, choose_loss_impl
from gendistill.losses.student import StudentLike
from gendistill.paths import write_json
from gendistill.teachers.base import Teacher, check_vocabulary
from gendistill.training.adapters import insert_adapters, merge_adapters
from gendistill.training.capture import why_not_captured
from gendistill.training.checkpoint import (
    Progress,
    checksums,
    find_checkpoint,
    gather_tensors,
    load_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
    trained_parameters,
)
from gendistill.training.console import StageView, TrainingConsole
from gendistill.training.freeze import apply_freeze
from gendistill.training.garbage import Garbage
from gendistill.training.interrupt import StageStopped, StopRequest, stop_on_signal
from gendistill.training.job import Due, StageJob, StageResult, Stream
from gendistill.training.left_out import data_record, heavy_losses, left_out_lines
from gendistill.training.lock import (
    StageLock,
    existing_lock,
    locked_settings,
    num_steps,
    time_step,
    write_lock,
)
from gendistill.training.log import MetricLog
from gendistill.training.meter import Meter, Stopwatch
from gendistill.training.monitors import MONITORS, Monitor, Rewind, Stop, When
from gendistill.training.monitors.heldout import heldout_measure
from gendistill.training.monitors.weights import sample_weights
from gendistill.training.optim import (
    OPTIMIZERS,
    build_optimizer,
    choose_compute_dtype,
    fixed_dtype,
    learning_rate_factor,
    set_learning_rates,
)
from gendistill.training.parallel import Parallel, Situation
from gendistill.training.step import StepRunner, seed_step
from gendistill.training.trackers import Trackers


def train_stage(
    job: StageJob,
    *,
    student: StudentLike,
    teacher: Teacher,
    stream: Stream,
    parallel: Parallel,
    console: TrainingConsole,
) -> StageResult:
    """Train a student for one stage, from its newest checkpoint if there is one.

    The student becomes float32 and is trained in place; adapters are merged into its weights, and saving it is left to
    the caller. Writes ``plan.json``, ``metrics.jsonl``, ``checkpoints/`` and ``result.json`` in the stage's folder.

    Args:
        job: What to do.
        student: As at the start of the stage, also when resuming.
        teacher: Likewise.
        stream: This process's micro-batches, at their start: resuming sets its state.
        parallel: How the stage is shared among processes.
        console: Where to report.
    Returns:
        How it ended. On the main process the student is whole; where it was sharded, the others are left without
        weights.
    Raises:
        RecipeError: The stage does not fit student or teacher.
        CheckpointError: The recipe has changed since the stage began.
        TrainingError: A loss or gradient is not finite, or another process is lost.
        StageStopped: SIGTERM or SIGINT came; a checkpoint is saved.
    """
    module = cast(nn.Module, student)
    saved: list[Path] = []
    run = None
    try:
        with parallel.together(lambda: _when_lost(job, saved)):
            run = StageRun(job, student, teacher, stream, parallel, console, saved=saved)
            result = run.run()
            parallel.unshard(run.runner.plain_module)
            return result
    finally:
        if run is not None:
            run.runner.release()
        for model in (student, teacher.model):
            if model is not None:
                release(model)
        module.zero_grad()
        module.eval()
        if job.config.gradient_checkpointing:
            recompute_activations(student, False)
        parallel.close()
        merge_adapters(module)


class StageRun:
    """One stage in progress on this process: ``step``, ``log``, ``save``, and ``run``, which does all until the end.

    Attributes:
        job: What is done.
        student, module: The student, as a loss and as torch see it.
        objective: What is minimised.
        runner: Computes a step's gradients.
        trained: Parameters that learn.
        before: Checksum of every parameter before the stage.
        start: A sample of the trained weights before the stage.
        optimizer: Over ``trained``.
        lock: What was decided before the first step.
        progress: What the next checkpoint will remember.
        meter: Sums since the last log line.
        micro_batches: Of the latest step.
        due: What follows the latest step.
        unchanged: At the end, trained tensors with the bytes they had before the stage.
    """

    due: Due
    unchanged: list[str]

    def __init__(
        self,
        job: StageJob,
        student: StudentLike,
        teacher: Teacher,
        stream: Stream,
        parallel: Parallel,
        console: TrainingConsole,
        *,
        saved: list[Path],
    ) -> None:
        """Check, freeze and shard the student, decide about the stage, and restore the newest checkpoint."""
        self.job, self.stage = job, job.config
        self.student, self.module = student, cast(nn.Module, student)
        self.teacher, self.stream, self.parallel, self.console = teacher, stream, parallel, console
        # the newest checkpoint last
        self.saved = saved
        check_vocabulary(teacher.facts, student.config)
        _check_apart(self.module, teacher.model)
        scored = [batch for batch in job.heldout if batch.num_labels]
        if not scored:
            raise DataError(
                "no held-out text to score the stage on", where="heldout", hint="raise heldout.rows"
            )
        self.objective = build_objective(self.stage.objective)
        self.objective.bind(student.config, teacher.facts)
        if isinstance(self.objective, LogitObjective):
            self.objective.impl = choose_loss_impl(job.engine.loss, parallel.device)
        self.converted = converted_layers(placed_kinds(student.config))
        try:
            self._assemble(scored[0])
        except BaseException:
            # nobody else could: what has been timed may have been captured
            if (runner := getattr(self, "runner", None)) is not None:
                runner.release()
            raise
        self.micro_batches: list[Batch] = []
        self.rates: dict[str, float] = {}
        self.watch = Stopwatch()
        self.garbage = Garbage()
        self.last_save = time.perf_counter()
        self.logged_tokens = self.progress.tokens
        self.has_logged = False
        built = {name: build(job) for name, build in MONITORS.items()}
        self.monitors = {name: monitor for name, monitor in built.items() if monitor is not None}
        self.found: dict[str, Mapping[str, float]] = {}
        self.wish: tuple[str, Stop] | None = None
        self.back: tuple[str, Rewind] | None = None
        self.metrics = self._open_metrics()
        self.trackers = Trackers(job, step=self.progress.step, console=console, main=parallel.is_main)

    def _assemble(self, calibration: Batch) -> None:
        """Freeze, adapt, shard, optimizer, load: each looks at what those before it have made of the student."""
        job, stage, parallel = self.job, self.stage, self.parallel
        frozen = apply_freeze(self.module, stage, name=job.name, reaches=self.objective.reaches)
        self.console.say(f"{job.name}: {frozen}")
        adapted = insert_adapters(
            self.module, stage, name=job.name, seed=job.seed, reaches=self.objective.reaches
        )
        if adapted is not None:
            self.console.say(f"{job.name}: {adapted}")
        # float32 masters: bfloat16 weights would swallow most updates
        self.module.float().to(parallel.loads_on).train()
        self.teacher.to(parallel.device, place=parallel.place_teacher)
        if stage.gradient_checkpointing:
            recompute_activations(self.student, stage.gradient_checkpointing)
        self.objective.calibrate(self.teacher, calibration.to(parallel.device))
        self.before = checksums(self.module.named_parameters())
        checkpoint = parallel.on_main(lambda: find_checkpoint(job.checkpoints, self.console.say))
        locked = locked_settings(
            stage, name=job.name, seed=job.seed, checksums=self.before, extra=dict(job.lock)
        )
        lock = parallel.on_main(lambda: existing_lock(job.plan, locked, checkpoint))
        # sharding needs to know
        dtype = lock.dtype if lock else self._choose_dtype()
        self.runner = StepRunner(self.module, self.objective, self.teacher, parallel, compute_dtype=dtype)
        with parallel.whole(self.runner.plain_module) as copied:
            self._fuse(dtype, learns=not copied)
        self.trained = trained_parameters(self.module)
        self.optimizer = build_optimizer(self.module, stage)
        self._capture()
        self.start = sample_weights(self.optimizer) if job.watch.groups else {}
        # timed first and trained on afterwards, as the first step
        self.fetched: list[Batch] | None = None
        self.lock = lock or self._decide(locked)
        self.progress = Progress()
        if checkpoint is not None:
            self.saved.append(checkpoint)
            self._restore(checkpoint)
        self.meter = self._meter()
        self.console.say(
            f"{job.name}: {self.lock.steps:,} steps of {stage.batch_size} x {stage.seq_len:,} tokens, computed in "
            f"{self.lock.compute_dtype} on {parallel.device.type}"
            + (f", the loss by {self.objective.impl}" if isinstance(self.objective, LogitObjective) else "")
            + (f", {self.lock.seconds_per_step:.2f} s each" if self.lock.seconds_per_step else "")
            + (f", resuming from {checkpoint}" if checkpoint else "")
        )

    def _choose_dtype(self) -> torch.dtype:
        hidden_size = self.student.config.hidden_size
        return fixed_dtype(self.stage) or self.parallel.on_main(
            lambda: choose_compute_dtype(self.parallel.device, hidden_size)
        )

    def _decide(self, locked: dict[str, Any]) -> StageLock:
        """Decide how many steps there will be, and write down what is decided."""
        job, stage, parallel, runner = self.job, self.stage, self.parallel, self.runner
        self.fetched = next(self.stream) if stage.minutes is not None else None
        started, seconds_per_step = time.perf_counter(), None
        if self.fetched is not None:
            seed_step(parallel, job.seed, 0)
            seconds_per_step = parallel.largest(
                time_step(
                    runner.rehearse,
                    self.fetched,
                    self.optimizer,
                    lambda groups: OPTIMIZERS[stage.optimizer](groups, stage.betas),
                    slowest=parallel.largest,
                    shares=parallel.world > 1,
                    repeats=runner.rehearsals,
                )
            )
            self.runner.clear(self.optimizer)
        spent = parallel.largest(time.perf_counter() - started)
        decided = StageLock(
            steps=num_steps(stage, seconds_per_step, spent, name=job.name),
            compute_dtype=str(runner.compute_dtype).removeprefix("torch."),
            seconds_per_step=seconds_per_step,
            locked=locked,
        )
        parallel.on_main(lambda: write_lock(job.plan, decided))
        return decided

    def _fuse(self, dtype: torch.dtype, *, learns: bool) -> None:
        """Let decoders run fused, in this dtype of arithmetic, where the engine says so."""
        asked, device = self.job.engine.blocks, self.parallel.device
        if asked == "family" or (asked == "auto" and device.type != "cuda"):
            return
        for role, model in (("student", self.student), ("teacher", self.teacher.model)):
            if model is None:
                continue
            # a teacher computes in the dtype of its weights
            arithmetic = dtype if role == "student" else model.lm_head.weight.dtype
            reason = why_not(model, device=device, dtype=arithmetic)
            if reason is None:
                fuse(model, arithmetic, learns=learns and role == "student")
                self.console.say(f"{self.job.name}: the {role}'s layers run fused")
            elif asked == "fused":
                raise RecipeError(
                    f"the {role} cannot run fused: {reason}",
                    where="engine.blocks",
                    hint="use engine.blocks=auto, which fuses what can be, or engine.blocks=family",
                )
            else:
                self.console.say(f"{self.job.name}: the {role}'s layers run as its family has them: {reason}")

    def _capture(self) -> None:
        """Let passes be captured as CUDA graphs, where the engine says so."""
        asked, runner, parallel = self.job.engine.capture, self.runner, self.parallel
        teacher = self.teacher.model
        reason = why_not_captured(
            runner.plain_module,
            device=parallel.device,
            fused=is_fused(self.student) and (teacher is None or is_fused(teacher)),
            apart=parallel.captures,
            live=teacher is not None or not self.objective.needs,
        )
        if asked != "never" and reason is None:
            runner.capture(self.trained.values(), failed=self._not_captured)
        elif asked == "always":
            raise RecipeError(
                f"passes cannot be captured: {reason}",
                where="engine.capture",
                hint="use engine.capture=auto, which captures what can be",
            )

    def _not_captured(self, reason: str) -> None:
        """Say why passes are not captured after all."""
        if self.job.engine.capture == "always":
            raise TrainingError(
                f"passes cannot be captured: {reason}",
                where="engine.capture",
                hint="use engine.capture=auto, which goes on without graphs",
            )
        said = f"{self.job.name}: goes on without CUDA graphs ({reason})"
        if self.parallel.is_main:
            self.console.warn(said)
        else:
            # each decides alone, and the slowest sets the pace of all
            print(f"warning: rank {self.parallel.rank}: {said}", file=sys.stderr, flush=True)

    def _restore(self, checkpoint: Path) -> None:
        """Take weights, moments, rows and progress from a checkpoint."""
        state = load_checkpoint(
            checkpoint, trained=self.trained, optimizer=self.optimizer, parallel=self.parallel
        )
        self.stream.load_state_dict(state["stream"])
        self.progress = Progress(**state["progress"])

    def _meter(self) -> Meter:
        return Meter(
            1 + len(self.objective.part_names),
            self.parallel.device,
            in_a_row=self.stage.non_finite.in_a_row,
            tokens=self.progress.tokens,
            window=self.progress.window,
            unfinished=self.progress.unfinished,
        )

    def _open_metrics(self) -> MetricLog | None:
        """Open the metrics file on the main process, without lines of steps that are still to be taken."""
        if not self.parallel.is_main:
            return None
        path = self.job.folder / "metrics.jsonl"
        return MetricLog(path, up_to=self.progress.step, warn=self.console.warn)

    @property
    def is_over(self) -> bool:
        """Whether the last step has been taken."""
        return self.progress.step >= self.lock.steps

    def run(self) -> StageResult:
        """Train to the end of the stage; between two steps log, save or stop."""
        name, console = self.job.name, self.console
        for note in self.stream.notes:
            console.warn(f"{name}: {note}")
        with (
            stop_on_signal() as request,
            self.garbage.left_alone(),
            console.stage(name, num_steps=self.lock.steps, step=self.progress.step) as view,
            self.trackers,
        ):
            # trackers may take seconds to start
            self.watch.lap()
            while not self.is_over:
                self.step()
                self.due = self._due(request)
                self._ask("step")
                if not self.back and (self.due.log or self.wish):
                    self.log(view)
                if not self.back and (self.due.save or self.wish):
                    self.save()
                if self.back:
                    self._go_back(*self.back)
                elif self.wish:
                    self._end_here(view, *self.wish)
                if self.due.stop and not self.is_over:
                    raise self._stopped(request)
        return self._finish()

    def step(self) -> None:
        """Take one optimizer step; nothing here waits for the device."""
        clock, model = self.runner.clock, self.student.model
        blocks = [model.layers[layer] for layer in self.converted]
        with clock.step(
            model, blocks, measured=self.job.watch.speed and self._is_logged(self.progress.step + 1)
        ):
            self.micro_batches, self.fetched = self.fetched or next(self.stream), None
            seed_step(self.parallel, self.job.seed, self.progress.step)
            factor = learning_rate_factor(self.stage.schedule, self.progress.step, self.lock.steps)
            self.rates = set_learning_rates(self.optimizer, factor)
            self.runner.clear(self.optimizer)
            losses, tokens = self.runner.accumulate(self.micro_batches)
            with clock.part("optimizer"):
                norm = self.parallel.clip(self.trained.values(), self.stage.grad_clip)
                self.progress.step += 1
                # where this is 1, the fused step changes nothing: weights and moments stay as before a bad step
                self.optimizer.found_inf = self.meter.add(  # pyright: ignore
                    self.progress.step, losses, tokens, norm
                )
                self.optimizer.step()
        self.garbage.collect()

    def log(self, view: StageView) -> None:
        """Write and show a line about the steps since the last one."""
        reading = self.meter.read()
        seconds = self.watch.lap()
        self.progress = replace(self.progress, tokens=reading.tokens, seconds=self.progress.seconds + seconds)
        loss, *parts = reading.losses or [None]
        if loss is not None:
            first = self.progress.loss_first
            self.progress = replace(
                self.progress, loss_first=loss if first is None else first, loss_last=loss
            )
        row: dict[str, Any] = {
            "step": self.progress.step,
            "tokens": reading.tokens,
            "loss": loss,
            "parts": dict(zip(self.objective.part_names, parts, strict=True)) if parts else {},
            "lr": self.rates,
            "grad_norm": reading.grad_norm,
            "tokens_per_second": (reading.tokens - self.logged_tokens) / seconds,
            "seconds": self.progress.seconds,
        }
        if reading.skipped:
            row["skipped"] = reading.skipped
        if rewinds := self.progress.rewinds[self.progress.num_logged_rewinds :]:
            row["rewinds"], self.progress.num_logged_rewinds = rewinds, len(self.progress.rewinds)
        self.logged_tokens = reading.tokens
        self.meter.reset()
        if self.parallel.device.type == "cuda":
            row["memory_gib"] = self.runner.peak_bytes / 2**30
        with self.watch.paused():
            self._ask("log")
        if clash := row.keys() & self.found.keys():
            raise ValueError(
                f"MONITORS: {', '.join(sorted(clash))} is a name of the log line itself; choose another"
            )
        row, self.found = {**row, **self.found}, {}
        if self.metrics is not None:
            self.metrics.write(row)
        self.trackers.write(row)
        view.show(row)
        if not self.has_logged:
            self.has_logged = True
            for line in heavy_losses(self.stream):
                self.console.warn(f"{self.job.name}: {line}; gendistill data shows what is left")

    def save(self) -> None:
        """Write a checkpoint of the latest step, and show it to the monitors that ask for checkpoints.

        Among steps that are not finite, the one before them is the better place to go back to.
        """
        if self.meter.read().in_a_row and not (self.due.stop or self.wish or self.is_over):
            return
        self._write_checkpoint()
        with self.watch.paused():
            self._ask("save")

    def _write_checkpoint(self) -> None:
        with self.watch.paused():
            progress = replace(
                self.progress,
                tokens=self.meter.read().tokens,
                seconds=self.progress.seconds + self.watch.elapsed,
                window=self.meter.window,
                unfinished=self.meter.unfinished,
            )
            state = {"progress": asdict(progress), "stream": self.stream.state_dict()}
            tensors = gather_tensors(self.trained, self.optimizer, self.parallel)
            path = self.parallel.on_main(
                lambda: save_checkpoint(
                    self.job.checkpoints,
                    step=progress.step,
                    keep=None,
                    tensors=tensors,
                    state=state,
                )
            )
            # all know of the new one before those that they would name are deleted
            self.saved.append(path)
            self.parallel.on_main(
                lambda: rotate_checkpoints(
                    self.job.checkpoints, step=progress.step, keep=self.stage.keep_checkpoints
                )
            )
        self.last_save = time.perf_counter()

    def _due(self, request: StopRequest) -> Due:
        step, stage = self.progress.step, self.stage
        log = self._is_logged(step)
        stop, late = self._requests(request, asking=log)
        save = self.is_over or stop or late or _divides(stage.save_every_steps, step)
        return Due(log, save, stop, waits=log or save or self.parallel.device.type == "cpu")

    def _is_logged(self, step: int) -> bool:
        """Whether a line is written after a step, whatever happens in it."""
        asks = any(
            monitor.when == "log" and _divides(monitor.every, step) for monitor in self.monitors.values()
        )
        return step >= self.lock.steps or _divides(self.stage.log_every_steps, step) or asks

    def _requests(self, request: StopRequest, *, asking: bool) -> tuple[bool, bool]:
        """Say whether to stop and whether a checkpoint is due by time, alike on every process.

        Several processes ask each other at log steps only.
        """
        late = time.perf_counter() - self.last_save > 60 * self.stage.save_every_minutes
        if self.parallel.world == 1:
            return bool(request), late
        code = int(self.parallel.largest(2 * bool(request) + late)) if asking else 0
        return code >= 2, code == 1

    def _ask(self, when: When) -> None:
        """Ask the monitors whose moment it is, and keep what they find."""
        for name, monitor in self.monitors.items():
            if monitor.when != when or not (
                monitor.every is None or _divides(monitor.every, self.progress.step)
            ):
                continue
            found = self._answer(monitor)
            if isinstance(found, Rewind):
                self.back = name, found
                continue
            if isinstance(found, Stop):
                self.wish, found = (name, found), found.found
            if found:
                self.found[name] = dict(found)

    def _answer(self, monitor: Monitor) -> Mapping[str, float] | Stop | Rewind | None:
        """Ask a monitor; where memory runs out, once more without graphs, whose own nobody else could use."""
        graphs = self.runner.captured
        try:
            return monitor(self)
        except torch.OutOfMemoryError:
            # several processes are asked together
            if self.parallel.world > 1 or graphs is None or not graphs.num_graphs:
                raise
        graphs.release()
        return monitor(self)

    def _go_back(self, name: str, rewind: Rewind) -> None:
        """Go on from the newest intact checkpoint, with the rows behind those that led astray.

        The checkpoint is written again with that place in the data, so that a resume goes the same way.
        """
        job, parallel, limit = self.job, self.parallel, self.stage.non_finite.rewinds
        step, rewinds = self.progress.step, self.progress.rewinds
        checkpoint = parallel.on_main(lambda: find_checkpoint(job.checkpoints, self.console.say))
        if checkpoint is None or len(rewinds) >= limit:
            why = (
                f"the stage goes back {limit} times at most"
                if checkpoint
                else "no checkpoint has been saved yet"
            )
            raise TrainingError(
                f"{name} asks to go back at step {step:,}: {rewind.reason}; but {why}",
                where=f"stages.{job.name}",
                hint=f"raise stages.{job.name}.non_finite.rewinds, or save earlier with save_every_steps",
            )
        skip_to = step if rewind.skip_to is None else rewind.skip_to
        # without a search if the stream stands there
        rows = self.stream.state_dict() if skip_to == step else None
        self._restore(checkpoint)
        if rows is not None:
            self.stream.load_state_dict(rows)
        else:
            for _ in range(self.progress.step, skip_to):
                next(self.stream)
        # what comes next is in a row with nothing
        self.progress.unfinished = [0, *(self.progress.unfinished[1:] or [0])]
        back = {"step": step, "to": self.progress.step, "skipped_to": skip_to}
        self.progress.rewinds = [*rewinds, back]
        self.console.warn(
            f"{job.name}: {name} takes the stage from step {step:,} back to {self.progress.step:,} "
            f"({len(self.progress.rewinds)} of at most {limit} times), without the rows up to step {skip_to:,}: "
            f"{rewind.reason}"
        )
        self.meter, self.metrics = self._meter(), self._open_metrics()
        self.logged_tokens, self.found, self.wish, self.back = self.progress.tokens, {}, None, None
        self._write_checkpoint()
        self.watch.lap()

    def _end_here(self, view: StageView, name: str, stop: Stop) -> None:
        """Make the latest step the last one, also for a resume from the checkpoint just saved."""
        if not self.is_over:
            self.console.warn(
                f"{self.job.name}: {name} ends the stage at step {self.progress.step:,} of {self.lock.steps:,}: "
                f"{stop.reason}"
            )
            if self.meter.window[0]:
                # the wish came from a look at the checkpoint: it lacks what a last log line adds
                self.log(view)
                self._write_checkpoint()
            self.lock = replace(self.lock, steps=self.progress.step)
            self.parallel.on_main(lambda: write_lock(self.job.plan, self.lock))

    def _stopped(self, request: StopRequest) -> StageStopped:
        number = request.signal_number or signal.SIGTERM
        return StageStopped(
            f"{signal.Signals(number).name} at step {self.progress.step} of {self.lock.steps}",
            saved=f"a checkpoint is saved in {self.job.checkpoints}",
            signal_number=number,
            where=f"stages.{self.job.name}",
            hint="run the same command again: it resumes from there",
        )

    def _finish(self) -> StageResult:
        """See what training has changed, score held-out text and write the result."""
        self.runner.release()
        after = checksums(self.parallel.gather(self.trained))
        self.unchanged = self.parallel.on_main(
            lambda: [name for name in self.trained if after[name] == self.before[name]]
        )
        self.found = {}
        self._ask("end")
        for line in left_out_lines(self.stream):
            self.console.say(f"{self.job.name}: {line}")
        assert self.progress.loss_first is not None
        assert self.progress.loss_last is not None
        measured = heldout_measure(self)
        result = StageResult(
            stage=self.job.name,
            objective=self.stage.objective.kind,
            steps=self.progress.step,
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
            loss_first=self.progress.loss_first,
            loss_last=self.progress.loss_last,
            tensors_changed=self.tensors_changed,
            heldout=measured.scores,
            heldout_by_position=measured.by_position,
            skipped=self.meter.read().skipped,
            rewinds=self.progress.rewinds,
            data=data_record(self.stream),
            monitors={name: dict(found) for name, found in self.found.items()},
        )
        self.parallel.on_main(lambda: write_json(self.job.folder / "result.json", asdict(result)))
        return result

    @property
    def tensors_changed(self) -> float:
        """At the end, share of the trained tensors that differ from the start."""
        return 1 - len(self.unchanged) / len(self.trained)


def _when_lost(job: StageJob, saved: list[Path]) -> Situation:
    """Say what a lost process leaves behind."""
    return Situation(
        where=f"stages.{job.name}",
        kept=f"The checkpoint {saved[-1]} is intact" if saved else "No checkpoint had been saved yet",
        hint="run the same command again, on as many processes or fewer: "
        + ("the stage resumes from there" if saved else "the stage begins again"),
    )


def _check_apart(student: nn.Module, teacher: nn.Module | None) -> None:
    """Refuse a teacher that would learn with its student."""
    theirs = {} if teacher is None else {parameter: name for name, parameter in teacher.named_parameters()}
    for parameter in student.parameters():
        if parameter in theirs:
            raise RecipeError(
                f"student and teacher are one model in memory, or share {theirs[parameter]}: the teacher would change "
                "as the student learns",
                where="teacher.model",
                hint="load the teacher once more, as a model of its own",
            )


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def recompute_activations(student: Any, layers: bool | int) -> None:
    """Switch gradient checkpointing on for every decoder layer, for the first so many, or off."""
    with warnings.catch_warnings():
        # 5.17 knows only these names, later releases announce others for version 6
        warnings.simplefilter("ignore", FutureWarning)
        if layers is False:
            student.gradient_checkpointing_disable()
            _unhook_embeddings(student)
            return
        # the generator's state cannot be asked for while graphs are captured
        student.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": _may_draw(student)}
        )
    _unhook_embeddings(student)
    for layer in student.model.layers[len(student.model.layers) if layers is True else layers :]:
        layer.gradient_checkpointing = False


def _unhook_embeddings(student: Any) -> None:
    """Remove the hook by which transformers has embeddings require a gradient: nothing here needs one."""
    if getattr(student, "_require_grads_hook", None) is not None:
        student.disable_input_require_grads()


def _may_draw(student: Any) -> bool:
    """Whether a layer may draw random numbers; of modules from outside nothing is known."""
    known = ("torch", "transformers", "peft", "gendistill")
    return bool(getattr(student.config, "attention_dropout", 0)) or any(
        type(part).__module__.partition(".")[0] not in known or (isinstance(part, nn.Dropout) and part.p > 0)
        for part in student.modules()
    )

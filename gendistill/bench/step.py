"""Training steps on the shapes of real models, through the loop that trains: checked, timed, and taken apart."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from gendistill.anatomy.family import geometry_of
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.student import mixer_settings
from gendistill.bench.clock import Clock, Spans
from gendistill.bench.documents import synthetic_batch, synthetic_stream
from gendistill.bench.engines import PLAIN
from gendistill.bench.flops import Work
from gendistill.bench.pair import make_student, make_teacher
from gendistill.bench.shapes import Shape, stage_config
from gendistill.bench.step_rows import Check, StepTime, check_table, parts_of, time_table
from gendistill.bench.trace import Trace, trace_steps
from gendistill.config.engine import EngineConfig
from gendistill.data.batch import PADDING, Batch
from gendistill.engine.decoder import release
from gendistill.errors import GendistillError
from gendistill.results.table import ResultRow
from gendistill.teachers.base import Teacher
from gendistill.teachers.live import LiveTeacher
from gendistill.training.console import TrainingConsole
from gendistill.training.job import StageJob
from gendistill.training.parallel import Parallel, choose_parallel
from gendistill.training.stage import StageRun, recompute_activations

# relative errors that pass whatever the plain engine's own are, by dtype of the arithmetic
_FLOORS = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
_SLACK = 1.5
_CHECK_TOKENS, _CHECK_ROWS = 1024, 2
_SPAN_STEPS = 2
_HELDOUT_SEED = 999_983


class Found(NamedTuple):
    """A batch's loss and its gradients by name."""

    loss: float
    gradients: dict[str, Tensor]


class _TimedStream:
    """A stream that knows how long it was waited for."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.waited = stream, 0.0

    def __next__(self) -> list[Batch]:
        started = time.perf_counter()
        batches = next(self.stream)
        self.waited += time.perf_counter() - started
        return batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _TimedTeacher:
    """A teacher whose answers are timed."""

    def __init__(self, teacher: Teacher, spans: Spans) -> None:
        self.teacher, self.spans = teacher, spans

    def signals(self, *args: Any, **keywords: Any) -> Any:
        """Answer as the teacher does."""
        with self.spans.part("teacher"):
            return self.teacher.signals(*args, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)


@dataclass(slots=True, kw_only=True)
class StepBench:
    """The same stage on the same batches under several settings of the engine.

    Attributes:
        shape: Of teacher and student.
        stage: ``distill`` or ``block``.
        engines: By the name under which each is shown; the first is what the others are compared with.
        steps: Timed ones.
        warmup: Steps before; kernels are compiled in them.
        checkpointing: Whether activations are computed again.
        profile_steps: Steps of the first engine to profile on a GPU; 0 for none.
        trace: Where to write these for a browser.
        top: Kernels to list.
        check: Whether losses and gradients are compared first.
        cpu: Stay on the CPU even if there is a GPU.
        seed: Of weights and documents.
        console: Where to print.
    """

    shape: Shape
    stage: str = "distill"
    engines: Mapping[str, EngineConfig] = field(default_factory=lambda: {"default": EngineConfig()})
    steps: int = 8
    warmup: int = 3
    checkpointing: bool = False
    profile_steps: int = 0
    trace: Path | None = None
    top: int = 25
    check: bool = True
    cpu: bool = False
    seed: int = 0
    console: Console = field(default_factory=lambda: Console(highlight=False))
    parallel: Parallel = field(init=False)
    traced: Trace | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.parallel = choose_parallel(Accelerator(cpu=self.cpu))
        if not self.parallel.is_main:
            self.console.quiet = True

    @property
    def device(self) -> torch.device:
        """Where it all runs."""
        return self.parallel.device

    @property
    def teacher_dtype(self) -> torch.dtype:
        """As ``teacher.dtype: auto`` has it."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def run(self) -> list[ResultRow]:
        """Check and time every engine, and print it.

        Returns: Rows of a results file.
        Raises:
            GendistillError: An engine's loss or gradients are wrong; then nothing is timed.
        """
        shape = self.shape
        self.console.print(
            f"{shape.name}, {self.stage}: {shape.rows} x {shape.seq_len:,} tokens a step in micro-batches of "
            f"{shape.micro_batch} on {self.parallel.world} x {device_name(self.device)}; {shape.placement}; "
            f"documents log-normal, mean {shape.mean_tokens} tokens",
            markup=False,
        )
        if self.check and self.parallel.world == 1:
            self._refuse(self._checks())
        elif self.check:
            self.console.print("losses and gradients are compared on one process only: not here")
        found = []
        for number, (name, engine) in enumerate(self.engines.items()):
            found.append(self._time(name, engine, profile=number == 0))
            self.console.print(f"{name}: {found[-1]}", markup=False)
        self.console.print(time_table(found))
        return [
            row
            for number, each in enumerate(found)
            for row in each.rows(self.shape.name, self.stage, found[0], first_of_all=number == 0)
        ]

    @contextmanager
    def opened(self, engine: EngineConfig, *, exact: bool = False, stream: Any = None) -> Iterator[StageRun]:
        """Set up the stage as ``train_stage`` does.

        Args:
            engine: Settings.
            exact: Whether all arithmetic is float32 and eager, from the same weights.
            stream: Of batches; the synthetic one if None.
        """
        settings = stage_config(
            self.stage,
            seq_len=self.shape.seq_len,
            rows=self.shape.rows,
            micro_batch=self.shape.micro_batch,
            checkpointing=self.checkpointing,
        )
        if exact:
            settings = settings.model_copy(update={"compute_dtype": "float32"})
        model = make_teacher(self.shape, device=self.device, dtype=self.teacher_dtype, seed=self.seed)
        student = make_student(model, self.shape, impl="reference" if exact else "auto")
        teacher = LiveTeacher(model.float() if exact else model)
        with tempfile.TemporaryDirectory(prefix="gendistill-bench-") as folder:
            job = StageJob(
                name=self.stage,
                config=settings,
                folder=Path(folder),
                seed=self.seed,
                heldout=[self.batch(rows=1, seq_len=min(self.shape.seq_len, 256))],
                engine=engine,
            )
            console = TrainingConsole(main=False, console=self.console)
            try:
                yield StageRun(job, student, teacher, stream or self._stream(), self.parallel, console)
            finally:
                for each in (student, teacher.model):
                    release(each)
                if self.checkpointing:
                    recompute_activations(student, False)
                self.parallel.close()

    def batch(self, *, rows: int, seq_len: int) -> Batch:
        """Draw a batch that no step sees."""
        return synthetic_batch(
            vocab_size=self.shape.sizes["vocab_size"],
            seq_len=seq_len,
            mean_tokens=self.shape.mean_tokens,
            rows=rows,
            seed=_HELDOUT_SEED + self.seed,
        )

    def _stream(self) -> Any:
        return synthetic_stream(
            vocab_size=self.shape.sizes["vocab_size"],
            seq_len=self.shape.seq_len,
            mean_tokens=self.shape.mean_tokens,
            rows=self.shape.rows,
            micro_batch=self.shape.micro_batch,
            seed=self.seed,
            rank=self.parallel.rank,
            world=self.parallel.world,
        )

    def _checks(self) -> list[Check]:
        """Compare every engine's loss and gradients, and the plain engine's own, with float32 ones."""
        batch = self.batch(rows=_CHECK_ROWS, seq_len=min(self.shape.seq_len, _CHECK_TOKENS))
        exact, _ = self._solve(PLAIN, batch, exact=True)
        plain, dtype = self._solve(PLAIN, batch)
        loss, gradient = _errors(plain, exact)
        first = Check("plain", loss, gradient, bars=None)
        bars = max(_FLOORS[dtype], _SLACK * loss), max(_FLOORS[dtype], _SLACK * gradient)
        checks = [first]
        for name, engine in self.engines.items():
            if engine != PLAIN:
                found, _ = self._solve(engine, batch)
                checks.append(Check(name, *_errors(found, exact), bars=bars))
        self.console.print(check_table(checks, dtype=str(dtype).removeprefix("torch.")))
        return checks

    def _refuse(self, checks: list[Check]) -> None:
        if wrong := [check.engine for check in checks if not check.passed]:
            raise GendistillError(
                f"loss or gradients are wrong under {', '.join(wrong)}: what is wrong is not timed",
                where="gendistill bench step",
                hint="the table above says how far they are from float32; --no-check times all the same",
            )

    def _solve(self, engine: EngineConfig, batch: Batch, *, exact: bool = False) -> tuple[Found, torch.dtype]:
        with self.opened(engine, exact=exact, stream=_no_stream()) as run:
            losses, _ = run.runner.accumulate([batch])
            gradients = {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()
                for name, parameter in run.trained.items()
            }
            found = Found(losses[0].item(), gradients), run.runner.compute_dtype
            del run, gradients
        free_memory(self.device)
        return found

    def _time(self, name: str, engine: EngineConfig, *, profile: bool) -> StepTime:
        stream = _TimedStream(self._stream())
        clock = Clock(self.device)
        with self.opened(engine, stream=stream) as run:
            started = time.perf_counter()
            for _ in range(self.warmup):
                run.step()
            clock.wait()
            cold = time.perf_counter() - started
            if clock.on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            tokens, stream.waited = run.meter.read().tokens, 0.0
            marks, host, flops = [clock.mark()], [], []
            work = work_of(run)
            for _ in range(self.steps):
                begun = time.perf_counter()
                run.step()
                host.append(time.perf_counter() - begun)
                marks.append(clock.mark())
                flops.append(sum(work.flops(documents(run.micro_batches)).values()))
            clock.wait()
            seconds = [clock.seconds(*pair) for pair in pairwise(marks)]
            found = StepTime(
                engine=name,
                seconds=tuple(seconds),
                tokens=(run.meter.read().tokens - tokens) / self.steps,
                flops=statistics.mean(flops),
                device=device_name(self.device),
                world=self.parallel.world,
                host=min(host),
                waited=stream.waited / self.steps,
                cold=cold,
                memory_gb=torch.cuda.max_memory_allocated(self.device) / 1e9 if clock.on_gpu else None,
                parts=self._take_apart(run, clock),
                syncs=count_syncs(run.step) if clock.on_gpu else None,
            )
            if profile and self.profile_steps and clock.on_gpu:
                self.traced = trace_steps(run.step, steps=self.profile_steps, path=self.trace)
                self.console.print(self.traced.table(self.top))
                found = dataclasses.replace(found, trace=self.traced)
            del run
        free_memory(self.device)
        return found

    def _take_apart(self, run: StageRun, clock: Clock) -> dict[str, float]:
        """Time the parts of a few more steps, in shares of them."""
        spans = Spans(clock)
        accumulate = run.runner.accumulate
        teacher = run.runner.teacher

        def timed(micro_batches: Any) -> Any:
            with spans.part("gradients"):
                return accumulate(micro_batches)

        run.runner.accumulate = timed  # pyright: ignore[reportAttributeAccessIssue]
        run.runner.teacher = _TimedTeacher(teacher, spans)  # pyright: ignore[reportAttributeAccessIssue]
        handles = [
            *_time_forward(run.runner.plain_module, "objective", spans),
            *_time_forward(run.student.model, "student", spans),
        ]
        try:
            for _ in range(_SPAN_STEPS):
                with spans.part("step"):
                    run.step()
        finally:
            for handle in handles:
                handle.remove()
            run.runner.teacher = teacher
            del run.runner.accumulate
        return parts_of(spans.read())


def _no_stream() -> Any:
    """Return the stream of a run that takes no step."""
    return iter(())


def _time_forward(module: nn.Module, name: str, spans: Spans) -> list[Any]:
    return [
        module.register_forward_pre_hook(lambda *_: spans.start(name)),
        module.register_forward_hook(lambda *_: spans.stop(name)),
    ]


def _errors(found: Found, exact: Found) -> tuple[float, float]:
    """Return the relative error of the loss, and the relative norm of the gradients' error."""
    difference = sum(
        (found.gradients[name] - gradient).double().square().sum()
        for name, gradient in exact.gradients.items()
    )
    norm = sum(gradient.double().square().sum() for gradient in exact.gradients.values())
    ratio = torch.as_tensor(difference / norm).sqrt().item()
    return abs(found.loss - exact.loss) / abs(exact.loss), ratio


def work_of(run: StageRun) -> Work:
    """Say what a stage in progress has to multiply."""
    config = run.student.config.to_dict()
    geometry = geometry_of(config)
    tables = {
        kind: MIXERS[kind].parameters(geometry, mixer_settings(config, kind))
        for kind in dict.fromkeys(config["mixers"])
        if MIXERS[kind].replaces_attention
    }
    return Work(
        geometry=geometry,
        mixers={kind: {name: spec.shape for name, spec in table.items()} for kind, table in tables.items()},
        kinds=config["mixers"],
        train=run.stage.train,
        aligns=run.stage.objective.kind == "block_output",
    )


def documents(batches: list[Batch]) -> list[int]:
    """List the lengths of all documents, without padding."""
    return [
        length
        for batch in batches
        for length, name in zip(batch.segments.lengths, batch.document_ids, strict=True)
        if name != PADDING
    ]


def count_syncs(step: Any) -> int:
    """Count how often the host waits for the GPU in a step, as far as torch notices."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """Name a device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"

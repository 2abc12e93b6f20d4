"""Training steps on the shapes of real models, through the loop that trains: checked, timed, and taken apart."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from gendistill.bench.documents import synthetic_batch, synthetic_stream
from gendistill.bench.engines import PLAIN
from gendistill.bench.pair import make_student, make_teacher
from gendistill.bench.shapes import Shape, stage_config
from gendistill.bench.step_parts import (
    Operations,
    TimedStream,
    device_name,
    find_syncs,
    operations_of,
    take_apart,
    time_steps,
)
from gendistill.bench.step_rows import Check, StepTime, check_table, result_rows, time_table
from gendistill.bench.stock import Parts, StockStep
from gendistill.bench.trace import trace_steps
from gendistill.config.engine import EngineConfig
from gendistill.config.schema import StageConfig
from gendistill.data.batch import Batch, with_room
from gendistill.engine.decoder import release
from gendistill.errors import GendistillError
from gendistill.results.table import ResultRow
from gendistill.teachers.live import LiveTeacher
from gendistill.training.console import TrainingConsole
from gendistill.training.job import StageJob
from gendistill.training.parallel import Parallel, connect
from gendistill.training.stage import StageRun, recompute_activations

# relative errors that pass whatever the plain engine's own are, by dtype of the arithmetic
_FLOORS = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
_SLACK = 1.5
# a peer whose loss is further off computes something else
_PEER_BAR = 0.02
_CHECK_TOKENS, _CHECK_ROWS = 1024, 2
_HELDOUT_SEED = 999_983


class Found(NamedTuple):
    """A batch's mean loss and its gradients by name."""

    loss: float
    gradients: dict[str, Tensor]

    def errors(self, exact: Found) -> tuple[float, float]:
        """Return the relative error of the loss, and the relative norm of the error of all gradients together."""
        pairs = [(self.gradients[name], gradient) for name, gradient in exact.gradients.items()]
        difference = torch.stack([(ours - right).double().square().sum() for ours, right in pairs]).sum()
        norm = torch.stack([right.double().square().sum() for _, right in pairs]).sum()
        return abs(self.loss - exact.loss) / abs(exact.loss), (difference / norm).sqrt().item()


@dataclass(frozen=True, slots=True)
class Peer:
    """Stock parts to compare with.

    Attributes:
        parts: What its converted layers are made of; None: they mix nothing.
        missing: Why there are none.
    """

    parts: Parts | None
    missing: str | None = None

    @property
    def label(self) -> str:
        """Name it for people."""
        return f"transformers, {self.parts.label}" if self.parts else "transformers, mixers left out"


@dataclass(slots=True, kw_only=True)
class StepBench:
    """The same stage on the same batches under several settings of the engine.

    Attributes:
        shape: Of teacher and student.
        stage: ``distill`` or ``block``.
        engines: By the name under which each is shown; the first is what the others are compared with.
        peer: Stock parts to time as well.
        steps: Timed ones.
        warmup: Steps before; kernels are compiled in them, and passes captured.
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
    peer: Peer | None = None
    steps: int = 8
    warmup: int = 6
    checkpointing: bool = False
    profile_steps: int = 0
    trace: Path | None = None
    top: int = 25
    check: bool = True
    cpu: bool = False
    seed: int = 0
    console: Console = field(default_factory=lambda: Console(highlight=False))
    parallel: Parallel = field(init=False)
    _operations: Operations | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.parallel = connect(next(iter(self.engines.values())), cpu=self.cpu)
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
        """Check and time every engine and the peer, and print it.

        Returns: Rows of a results file.
        Raises:
            GendistillError: An engine's loss or gradients are wrong; then nothing is timed.
        """
        shape = self.shape
        self._say(
            f"{shape.name}, {self.stage}: {shape.rows} x {shape.seq_len:,} tokens a step in micro-batches of "
            f"{shape.micro_batch} on {self.parallel.world} x {device_name(self.device)}; {shape.placement}; "
            f"documents log-normal, mean {shape.mean_tokens} tokens"
        )
        exact = None
        if self.check and self.parallel.world == 1:
            exact = self._check_engines()
        elif self.check:
            self._say("losses and gradients are compared on one process only: not here")
        found = []
        for number, (name, engine) in enumerate(self.engines.items()):
            found.append(self._time(name, engine, profile=number == 0))
            self._say(f"{name}: {found[-1]}")
        peer = self._time_peer(exact) if self.peer and self.parallel.world == 1 else None
        self.console.print(time_table([*found, peer] if peer else found))
        return result_rows(shape.name, self.stage, found, peer)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def stage_config(self, *, micro_batch: int | None = None, exact: bool = False) -> StageConfig:
        """Describe the stage; exact: in float32."""
        stage = stage_config(
            self.stage,
            seq_len=self.shape.seq_len,
            rows=self.shape.rows,
            micro_batch=micro_batch or self.shape.micro_batch,
            checkpointing=self.checkpointing,
        )
        return stage.model_copy(update={"compute_dtype": "float32"}) if exact else stage

    @contextmanager
    def opened(self, engine: EngineConfig, *, stream: Any, exact: bool = False) -> Iterator[StageRun]:
        """Set up the stage as ``train_stage`` does.

        Args:
            engine: Settings.
            stream: Of batches; closed at the end.
            exact: Whether all arithmetic is float32 and eager, from the same weights.
        """
        # each has a way of its own to share a stage
        self.parallel = connect(engine, cpu=self.cpu)
        model = make_teacher(self.shape, device=self.device, dtype=self.teacher_dtype, seed=self.seed)
        student = make_student(model, self.shape, impl="reference" if exact else "auto")
        teacher = LiveTeacher(model.float() if exact else model)
        with tempfile.TemporaryDirectory(prefix="gendistill-bench-") as folder:
            job = StageJob(
                name=self.stage,
                config=self.stage_config(exact=exact),
                folder=Path(folder),
                seed=self.seed,
                heldout=[self.batch(rows=1, seq_len=min(self.shape.seq_len, 256))],
                engine=engine,
            )
            console = TrainingConsole(main=False, console=self.console)
            run = None
            try:
                run = StageRun(job, student, teacher, stream, self.parallel, console, saved=[])
                yield run
            finally:
                if run is not None:
                    run.runner.release()
                stream.close()
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

    def stream(self, engine: EngineConfig, *, micro_batch: int | None = None) -> TimedStream:
        """Start the synthetic documents from their beginning."""
        return TimedStream(
            synthetic_stream(
                vocab_size=self.shape.sizes["vocab_size"],
                seq_len=self.shape.seq_len,
                mean_tokens=self.shape.mean_tokens,
                rows=self.shape.rows,
                micro_batch=micro_batch or self.shape.micro_batch,
                seed=self.seed,
                rank=self.parallel.rank,
                world=self.parallel.world,
                prefetch=engine.prefetch,
                device=self.device,
                room=engine.may_capture(self.device.type),
            )
        )

    def _check_batch(self) -> Batch:
        return self.batch(rows=_CHECK_ROWS, seq_len=min(self.shape.seq_len, _CHECK_TOKENS))

    def _check_engines(self) -> float:
        """Compare every engine's loss and gradients, and the plain engine's own, with eager float32 ones.

        Returns: The loss in float32.
        """
        exact, _ = self._solve(PLAIN, exact=True)
        plain, dtype = self._solve(PLAIN)
        loss, gradient = plain.errors(exact)
        checks = [Check("plain", loss, gradient, bars=None)]
        bars = max(_FLOORS[dtype], _SLACK * loss), max(_FLOORS[dtype], _SLACK * gradient)
        for name, engine in self.engines.items():
            if engine != PLAIN:
                checks.append(Check(name, *self._solve(engine)[0].errors(exact), bars=bars))
        self.console.print(check_table(checks, dtype=str(dtype).removeprefix("torch.")))
        if wrong := [check.engine for check in checks if not check.passed]:
            raise GendistillError(
                f"loss or gradients are wrong under {', '.join(wrong)}: what is wrong is not timed",
                where="gendistill bench step",
                hint="the table above says how far they are from float32; --no-check times all the same",
            )
        return exact.loss

    def _solve(self, engine: EngineConfig, *, exact: bool = False) -> tuple[Found, torch.dtype]:
        """Compute the gradients of one batch; returns also the dtype of the arithmetic."""
        with self.opened(engine, stream=self.stream(engine), exact=exact) as run:
            batch = with_room(self._check_batch()).to(self.device)
            # what is compared is a launch of what has been captured
            for _ in range(run.runner.rehearsals + 1 if run.runner.captured else 1):
                run.runner.clear(run.optimizer)
                losses, _ = run.runner.accumulate([batch])
            gradients = {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()
                for name, parameter in run.trained.items()
            }
            found, dtype = Found(losses[0].item(), gradients), run.runner.compute_dtype
            del run
        self._free()
        return found, dtype

    def _time(self, name: str, engine: EngineConfig, *, profile: bool) -> StepTime:
        on_gpu = self.device.type == "cuda"
        stream = self.stream(engine)
        with self.opened(engine, stream=stream) as run, run.garbage.left_alone():
            self._operations = operations_of(run)
            found = self._time_steps(name, run.step, stream, peak=lambda runner=run.runner: runner.peak_bytes)
            found = dataclasses.replace(found, parts=take_apart(run))
            if on_gpu:
                waits = find_syncs(run.step)
                found = dataclasses.replace(found, syncs=sum(waits.values()))
                for place, number in waits.items():
                    self._say(f"{name}: waits for the GPU {number} times a step at {place}")
            if profile and self.profile_steps and on_gpu:
                trace = trace_steps(run.step, steps=self.profile_steps, path=self.trace)
                self.console.print(trace.table(self.top))
                found = dataclasses.replace(found, trace=trace)
            del run
        self._free()
        return found

    def _time_steps(self, name: str, step: Any, stream: TimedStream, **more: Any) -> StepTime:
        assert self._operations is not None
        return time_steps(
            name,
            step,
            stream=stream,
            operations=self._operations,
            parallel=self.parallel,
            steps=self.steps,
            warmup=self.warmup,
            **more,
        )

    def _time_peer(self, exact: float | None) -> StepTime | None:
        """Time the step of stock parts with the largest micro-batch that fits; None if its loss is another."""
        assert self.peer is not None
        if self.peer.missing:
            self._say(f"the peer's mixers are left out: {self.peer.missing}")
        rows = self.shape.micro_batch
        while True:
            try:
                found = self._try_peer(self.peer, rows, exact)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                # the frames that the error holds are gone here
                found = "too large"
            self._free()
            if not isinstance(found, str):
                return found
            self._say(f"{self.peer.label}: micro-batches of {rows} do not fit")
            rows = max(divisor for divisor in range(1, rows) if self.shape.rows % divisor == 0)

    def _try_peer(self, peer: Peer, rows: int, exact: float | None) -> StepTime | None:
        stage = self.stage_config(micro_batch=rows)
        settings = {"device": self.device, "teacher_dtype": self.teacher_dtype, "seed": self.seed}
        stock = StockStep(self.shape, stage, parts=peer.parts, **settings)
        if exact is not None and peer.parts is not None:
            batch = self._check_batch()
            with torch.no_grad():
                error = abs(stock.loss(batch).item() / batch.num_labels / exact - 1)
            self._say(f"{peer.label}: its loss is {error:.1e} from eager float32")
            if not error <= _PEER_BAR:
                self._say(f"that is above {_PEER_BAR:g}: it computes something else and is not timed")
                return None
        stream = self.stream(EngineConfig(), micro_batch=rows)
        with contextlib.closing(stream):
            found = self._time_steps(peer.label, lambda: stock.step(next(stream)), stream)
        self._say(f"{peer.label}, micro-batches of {rows}: {found}")
        return found

    def _free(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

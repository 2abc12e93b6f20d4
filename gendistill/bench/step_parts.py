"""What a training step consists of, seen from outside: its parts, what it waits for, and what it has to multiply."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gendistill.anatomy.family import geometry_of
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.student import mixer_settings
from gendistill.bench.clock import Clock, Spans
from gendistill.bench.flops import Work
from gendistill.bench.step_rows import StepTime, parts_of
from gendistill.config.schema import StageConfig
from gendistill.data.batch import PADDING, Batch
from gendistill.teachers.base import Teacher
from gendistill.training.parallel import Parallel
from gendistill.training.stage import StageRun

_SPAN_STEPS = 2


class TimedStream:
    """A stream that knows how long it was waited for.

    Attributes:
        waited: Seconds.
        latest: What it gave last.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.waited = stream, 0.0
        self.latest: Sequence[Batch] = ()

    def __next__(self) -> list[Batch]:
        started = time.perf_counter()
        batches = next(self.stream)
        self.waited += time.perf_counter() - started
        self.latest = batches
        return batches

    def close(self) -> None:
        """End the stream."""
        self.stream.close()

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


def time_steps(
    name: str,
    step: Callable[[], Any],
    *,
    stream: TimedStream,
    work: Work,
    parallel: Parallel,
    steps: int,
    warmup: int,
) -> StepTime:
    """Time steps; nothing waits for the device between two of them.

    Args:
        name: What is timed.
        step: Takes one step on what the stream gives.
        stream: Of batches.
        work: What is to be multiplied.
        parallel: Where.
        steps: To be timed.
        warmup: Steps before.
    """
    device, clock = parallel.device, Clock(parallel.device)
    started = time.perf_counter()
    for _ in range(warmup):
        step()
    clock.wait()
    cold = time.perf_counter() - started
    if clock.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    stream.waited = 0.0
    marks, host, flops, tokens = [clock.mark()], [], [], 0
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        host.append(time.perf_counter() - begun)
        marks.append(clock.mark())
        lengths = documents(stream.latest)
        tokens += sum(lengths)
        flops.append(sum(work.flops(lengths).values()))
    clock.wait()
    return StepTime(
        name=name,
        seconds=tuple(clock.seconds(*pair) for pair in pairwise(marks)),
        tokens=parallel.sum(torch.tensor(tokens, device=device)).item() / steps,
        flops=statistics.mean(flops),
        device=device_name(device),
        world=parallel.world,
        host=min(host),
        waited=stream.waited / steps,
        cold=cold,
        memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if clock.on_gpu else None,
    )


def take_apart(run: StageRun) -> dict[str, float]:
    """Time the parts of a few more steps, in shares of them; the stage is then as before."""
    spans = Spans(Clock(run.parallel.device))
    accumulate, teacher = run.runner.accumulate, run.runner.teacher

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


def _time_forward(module: nn.Module, name: str, spans: Spans) -> list[Any]:
    return [
        module.register_forward_pre_hook(lambda *_: spans.start(name)),
        module.register_forward_hook(lambda *_: spans.stop(name)),
    ]


def work_of(student_config: Any, stage: StageConfig) -> Work:
    """Say what a stage has to multiply.

    Args:
        student_config: Of the student.
        stage: Whose steps.
    """
    config = student_config.to_dict()
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
        train=stage.train,
        aligns=stage.objective.kind == "block_output",
    )


def documents(batches: Sequence[Batch]) -> list[int]:
    """List the lengths of all documents, without padding."""
    return [
        length
        for batch in batches
        for length, name in zip(batch.segments.lengths, batch.document_ids, strict=True)
        if name != PADDING
    ]


def find_syncs(step: Callable[[], Any]) -> dict[str, int]:
    """Count how often the host waits for the GPU in a step, by place in the code, as far as torch notices."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
    return Counter(f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in waits)


def device_name(device: torch.device) -> str:
    """Name a device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"

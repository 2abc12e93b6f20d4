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

from gendistill.bench.clock import Clock
from gendistill.bench.step_rows import StepTime
from gendistill.data.batch import Batch
from gendistill.training.monitors import speed
from gendistill.training.parallel import Parallel
from gendistill.training.stage import StageRun

_MOST_MEASURED = 8

Operations = Callable[[Sequence[Batch]], float]


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


def time_steps(
    name: str,
    step: Callable[[], Any],
    *,
    stream: TimedStream,
    operations: Operations,
    parallel: Parallel,
    steps: int,
    warmup: int,
    peak: Callable[[], int] | None = None,
) -> StepTime:
    """Time steps; nothing waits for the device between two of them.

    Args:
        name: What is timed.
        step: Takes one step on what the stream gives.
        stream: Of batches.
        operations: What batches cost.
        parallel: Where.
        steps: To be timed.
        warmup: Steps before.
        peak: Returns the most bytes of a GPU in use since its peaks were last forgotten; by default what is allocated.
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
    marks, host, seen = [clock.mark()], [], []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        host.append(time.perf_counter() - begun)
        marks.append(clock.mark())
        seen.append(stream.latest)
    clock.wait()
    tokens = sum(sum(documents(batches)) for batches in seen)
    return StepTime(
        name=name,
        seconds=tuple(clock.seconds(*pair) for pair in pairwise(marks)),
        tokens=parallel.sum(torch.tensor(tokens, device=device)).item() / steps,
        flops=statistics.mean(operations(batches) for batches in seen),
        device=device_name(device),
        world=parallel.world,
        host=min(host),
        waited=stream.waited / steps,
        cold=cold,
        memory_gb=(peak or torch.cuda.max_memory_allocated)() / 1e9 if clock.on_gpu else None,
    )


def operations_of(run: StageRun) -> Operations:
    """Return what counts the operations of a stage's batches on this process; it outlives the stage."""
    count = speed.operations_of(run)
    assert count is not None, "a live teacher says what it is made of"
    return lambda batches: count(Counter(documents(batches)), sum(batch.num_labels for batch in batches))


def take_apart(run: StageRun) -> dict[str, float]:
    """Take a step more, or some, and return the shares of its parts, as the trainer's own clock has them."""
    clock, model = run.runner.clock, run.student.model
    shares: dict[str, float] = {}
    # none are known of a step in which passes are captured: there are as many as there are kinds of batches
    for _ in range(_MOST_MEASURED):
        with clock.step(model, [model.layers[layer] for layer in run.converted], measured=True):
            run.step()
        shares = clock.read()
        if shares:
            break
    return {part: share for part, share in shares.items() if part != "seconds"}


def documents(batches: Sequence[Batch]) -> list[int]:
    """List the lengths of all documents, without padding."""
    return [length for batch in batches for length in speed.lengths(batch)]


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

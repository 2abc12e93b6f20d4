"""Measure one callable on a CUDA device: error, repeatability, time, memory and launches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gendistill.bench.inputs import (
    DecodeInputs,
    SequenceInputs,
    exact_decode,
    exact_sequence,
)
from gendistill.bench.peers import Contestant
from gendistill.engine.graphs import recorded
from gendistill.ops import OpOutput

Step = Callable[[], Any]
ROUNDS = 3
_ROUND_MS = 200
_REPEATS = 3


class Timing(NamedTuple):
    """Milliseconds of a call.

    Attributes:
        median: Of the rounds' medians.
        low, high: The lowest and the highest round.
        early, late: 20% and 80% quantiles of all calls.
    """

    median: float
    low: float
    high: float
    early: float
    late: float


def attempt(step: Step) -> tuple[Any, str | None]:
    """Return what a step returns, or the reason why it cannot run: what others raise is not ours to list."""
    try:
        return step(), None
    except Exception as error:
        lines = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Divide the rms of the difference by the rms of the right answer."""
    exact = exact.detach()
    difference = (found.detach().double() - exact).square().mean().sqrt()
    return (difference / (exact.square().mean().sqrt() + 1e-30)).item()


class Expected(NamedTuple):
    """A small problem and its float64 answer, by name; ``step`` runs a contestant on it."""

    step: Callable[[Contestant], dict[str, Tensor]]
    answer: dict[str, Tensor]


def expect_sequence(x: SequenceInputs) -> Expected:
    """Solve a small case with a state, and gradients of everything."""
    exact, result = exact_sequence(x)
    grads = OpOutput(torch.randn_like(result.out).to(x.v.dtype), torch.randn_like(result.state).float())

    def solve(leaves: dict[str, Tensor], found: OpOutput) -> dict[str, Tensor]:
        upstream = [grad.to(part.dtype) for part, grad in zip(found, grads, strict=True)]
        gradients = torch.autograd.grad(list(found), list(leaves.values()), upstream)
        named = {f"d {name}": grad for name, grad in zip(leaves, gradients, strict=True)}
        return {"out": found.out.detach(), "state": found.state.detach(), **named}

    return Expected(lambda who: solve(x.leaves, who.sequence(x)), solve(exact.leaves, result))


def expect_decode(x: DecodeInputs) -> Expected:
    """Solve one decode step."""
    result = exact_decode(x)

    def run(who: Contestant) -> dict[str, Tensor]:
        with torch.no_grad():
            # the first call may tune kernels that change their inputs
            who.decode(x)()
            return who.decode(x)()._asdict()

    return Expected(run, result._asdict())


def errors_of(who: Contestant, expected: Expected) -> tuple[dict[str, float], bool]:
    """Return the relative error of every result, and whether repeated runs agree bit by bit."""
    runs = [expected.step(who) for _ in range(_REPEATS)]
    errors = {name: relative_error(runs[0][name], exact) for name, exact in expected.answer.items()}
    same = all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in run)
    return errors, same


def forward(who: Contestant, x: SequenceInputs) -> Step:
    """Return a step that runs the op without gradients."""

    def step() -> OpOutput:
        with torch.no_grad():
            return who.sequence(x)

    return step


def train(who: Contestant, x: SequenceInputs) -> Step:
    """Return a step that runs the op and differentiates it with respect to every input."""
    grad_out = torch.randn(*x.decay.shape[:3], x.v.shape[3], device=x.v.device).to(x.v.dtype)
    leaves = list(x.leaves.values())

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(who.sequence(x).out, leaves, grad_out)

    return step


def time_rounds(steps: Mapping[str, Step]) -> dict[str, Timing]:
    """Time steps in turn, several rounds, with a cleared cache before every call."""
    from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(do_bench(step, warmup=25, rep=_ROUND_MS, return_mode="all"))  # pyright: ignore
    return {name: summarise(rounds) for name, rounds in times.items()}


def summarise(rounds: list[list[float]]) -> Timing:
    """Reduce the times of several rounds."""
    medians = [statistics.median(times) for times in rounds]
    calls = sorted(time for times in rounds for time in times)
    early, late = (calls[min(len(calls) - 1, int(len(calls) * part))] for part in (0.2, 0.8))
    return Timing(statistics.median(medians), min(medians), max(medians), early, late)


def capture(step: Step) -> torch.cuda.CUDAGraph:
    """Record a step that has been warmed up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with recorded(graph, device=torch.device("cuda"), pool=torch.cuda.graph_pool_handle()):
        step()
    return graph


def capture_all(steps: Mapping[str, Step]) -> tuple[dict[str, Step], dict[str, str]]:
    """Capture steps by name; returns what launches each that can be captured, and why the others cannot."""
    replays, reasons = {}, {}
    for name, step in steps.items():
        graph, reason = attempt(lambda step=step: capture(step))
        if reason is None:
            replays[name] = graph.replay
        else:
            reasons[name] = reason
    return replays, reasons


def peak_extra_mib(step: Step) -> float:
    """Return how much memory a step needs at most besides what is there already."""
    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _device_events(step: Step) -> list[Any]:
    """Run a step that has run before; what it starts on the device, copies and fills included."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return [event for event in profiler.events() or () if event.device_type.name == "CUDA"]


def count_launches(step: Step) -> int | None:
    """Count what a step starts on the device; None where the profiler sees nothing."""
    return len(_device_events(step)) or None


def kernel_times(step: Step, repeats: int = 5) -> dict[str, float]:
    """Return the milliseconds on the device of every kernel of a step, the most first: medians of several runs."""
    runs: dict[str, list[float]] = {}
    for number in range(repeats):
        for event in _device_events(step):
            times = runs.setdefault(event.name, [0.0] * repeats)
            times[number] += event.device_time / 1000
    found = {name: statistics.median(times) for name, times in runs.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def rotating_steps(who: Contestant, x: DecodeInputs, number: int) -> Step:
    """Return one step that takes ``number`` decode steps, each on states of its own that no cache holds."""
    steps = [who.decode(x) for _ in range(number)]
    kept: list[OpOutput] = []

    def step() -> None:
        kept.clear()
        with torch.no_grad():
            # kept until the last: memory that one step gives back is in the cache when the next one takes it
            kept.extend(one() for one in steps)

    return step


def rotations(state_bytes: int) -> int:
    """Return how many states are three times as large as the device's second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-3 * cache // state_bytes))

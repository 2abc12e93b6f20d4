"""Check and time the delta rule's prefill on a GPU within 90 seconds: ``python tests/ops/scan_visit.py``.

Errors against the definition in float64 first, with room, without, and cut into spans or not. Then forward passes
without gradients as CUDA graphs, in spans of several lengths, and what their kernels take alone. ``--configs`` adds
launches of these in several configurations. A program that waits for ever ends with a traceback after 300 seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gendistill.bench.launches import Launch, compile_all, watch
from gendistill.bench.measure import attempt, capture, relative_error
from gendistill.ops import Segments
from gendistill_kernels.delta import layout
from gendistill_kernels.delta.chunk import chunk_forward
from gendistill_kernels.delta.layout import CHUNK, InferenceChunks
from gendistill_kernels.delta.rule import Inputs, Rule
from gendistill_kernels.runtime.lookup import Config, forced

START = time.perf_counter()
RULE = Rule("softplus")
# heads of queries and of keys and values, and channels: Qwen3-0.6B, and Qwen2.5-0.5B
SHAPES = {"16/8 of 128": (16, 8, 128), "14/2 of 64": (14, 2, 64)}
PROMPTS = ([4096], [8192], [2048], [1024] * 8, [4160], [4096, 4096])
# chunks of a span; None: as the library cuts them, 0: not at all
SPANS = (None, 0, 8, 16, 32, 64)
# calls of a graph, as many as a model has layers that differ in little else
CALLS = 8
KERNELS = ("prepare", "prepare_levels", "summary", "carry", "scan")
SCANS = [
    Config(block, warps, stages=stages)
    for block in (16, 32, 64)
    for warps in (2, 4, 8)
    for stages in (2, 3, 4)
]
PREPARES = [Config(64, 4), Config(128, 4), Config(128, 8), Config(64, 8)]
# of a prompt that is cut, besides the first
SUMMARIES = [
    Config(64, 4, stages=2),
    Config(64, 4, stages=3),
    Config(128, 8, stages=2),
    Config(32, 4, stages=3),
]
CARRIES = [
    Config(block, warps, stages=stages)
    for block, warps in ((16, 8), (32, 8), (16, 4))
    for stages in (1, 2, 3)
]
CUT_SCANS = [*SUMMARIES, Config(128, 8, stages=3), Config(32, 4, stages=2)]


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def load_cases() -> ModuleType:
    path = Path(__file__).with_name("gpu_cases.py")
    spec = importlib.util.spec_from_file_location("gpu_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = load_cases()


@contextmanager
def spans_of(chunks: int) -> Iterator[None]:
    """Cut whatever is longer into spans of so many chunks."""

    def span(cls: type, number: int) -> int:
        return chunks if number > chunks else max(number, 1)

    with (
        mock.patch.object(layout, "UNCUT", chunks),
        mock.patch.object(InferenceChunks, "span", classmethod(span)),
    ):
        yield


def table_of(lengths: Sequence[int], chunks: int | None, *, room: bool = True) -> InferenceChunks:
    """Say where chunks and spans are, as ``SPANS`` says."""
    full = [*lengths, *[0] * max(1, 4 - len(lengths))]
    tiles = sum(lengths) // CHUNK + len(full) if room else 0
    with spans_of(chunks) if chunks else nullcontext():
        table = Segments(full, device=CASES.DEVICE, room=tiles).table(InferenceChunks.of)
    return table._replace(spans=None, first_spans=None) if chunks == 0 else table


def draw(name: str, lengths: Sequence[int]) -> Inputs:
    H, KV, D = SHAPES[name]
    return CASES.draw(RULE, 1, sum(lengths), H, D, heads=(H, KV, KV))


def state_of(x: Inputs, table: InferenceChunks) -> Tensor:
    assert table.sequences is not None
    return CASES.normal(len(table.sequences), x.decay.shape[2], x.k.shape[3], x.v.shape[3])


def check(name: str) -> None:
    """Print errors against float64 on the same inputs."""
    lengths = [2400, 1, 0, 700, 64]
    x = draw(name, lengths)
    wide = Inputs(**{part: None if value is None else value.double() for part, value in x._asdict().items()})
    state = state_of(x, table_of(lengths, None))
    for given in (state, None):
        own = None if given is None else given.double()
        expected = CASES.exact_packed(wide, RULE, own, [*lengths, 0])
        line, found = [], {}
        for chunks in (None, 0, 8):
            for room in (True, False):
                table = table_of(lengths, chunks, room=room)
                found[chunks, room] = chunk_forward(x, RULE, state=given, chunks=table)[:2]
            pair = zip(found[chunks, True], expected, strict=True)
            off = [relative_error(one, other) for one, other in pair]
            same = all(
                torch.equal(*pair) for pair in zip(found[chunks, True], found[chunks, False], strict=True)
            )
            words = {None: "cut", 0: "whole"}.get(chunks, f"spans of {chunks}")
            bad = "" if max(off) < 6e-3 and same else "  WRONG"
            line.append(f"{words} {off[0]:.1e}, {off[1]:.1e}{'' if same else ' ROOM CHANGES BITS'}{bad}")
        say(f"{name}, {'a' if given is not None else 'no'} state:", "; ".join(line))


def microseconds(step: Callable[[], Any], calls: int = 1, repeats: int = 9) -> float:
    """Return the median time of a call of a step in a graph."""

    def several() -> None:
        for _ in range(calls):
            step()

    graph = capture(several)
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in events:
        first.record()
        graph.replay()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events) * 1e3 / calls


def alone(x: Inputs, state: Tensor | None, table: InferenceChunks, kernel: str) -> float | None:
    """Return what a launch of a call takes; None if the call has no such launch."""
    with watch(kernel) as launches:
        chunk_forward(x, RULE, state=state, chunks=table)
    return microseconds(launches[-1].again, CALLS) if launches else None


def time_prompts(name: str) -> None:
    for lengths in PROMPTS:
        x = draw(name, lengths)
        title = f"{len(lengths)} x {lengths[0]:,}"
        for chunks in SPANS:
            if chunks is not None and chunks and chunks * CHUNK >= lengths[0]:
                continue
            table = table_of(lengths, chunks)
            state = state_of(x, table)
            took = [
                microseconds(functools.partial(chunk_forward, x, RULE, state=given, chunks=table), CALLS)
                for given in (state, None)
            ]
            # the last, since the prompt begins with no state
            parts = {kernel: alone(x, None, table, kernel) for kernel in KERNELS}
            line = ", ".join(f"{kernel} {one:.1f}" for kernel, one in parts.items() if one is not None)
            words = {None: "the library's", 0: "whole"}.get(chunks, f"spans of {chunks}")
            say(
                f"{name}, {title}, {words:13}: {took[0]:6.1f} us with a state, {took[1]:6.1f} without: {line}"
            )


def choices(name: str) -> list[tuple[str, Config, int | None]]:
    """Return kernels, each with a configuration to try, and how the prompt is cut."""
    D = SHAPES[name][2]
    found: list[tuple[str, Config, int | None]] = [("prepare", one, 0) for one in PREPARES]
    found += [("scan", one, 0) for one in SCANS]
    found += [("summary", one, None) for one in SUMMARIES]
    found += [("carry", one, None) for one in CARRIES]
    found += [("scan", one, None) for one in CUT_SCANS]
    return [one for one in found if one[1].block <= D]


def time_configs(name: str) -> None:
    x = draw(name, [4096])
    for kernel, config, chunks in choices(name):
        table = table_of([4096], chunks)

        def call(kernel: str = kernel, table: InferenceChunks = table) -> float:
            took = alone(x, None, table, kernel)
            assert took is not None
            return took

        with forced(kernel, config):
            took, reason = attempt(call)
        words = f"{config.block} in {config.warps} warps, {config.stages} stages"
        cut = "whole" if chunks == 0 else "cut"
        say(f"    {name}, {cut}, {kernel} {words}: " + (reason or f"{took:6.1f} us"))


def precompile(names: Sequence[str], *, configs: bool) -> None:
    """Compile at once what is launched later; compilers run outside Python's lock."""
    launches: dict[str, Launch] = {}

    def collect(x: Inputs, given: Tensor | None, table: InferenceChunks, kernels: Sequence[str]) -> None:
        for kernel in kernels:
            with watch(kernel, run=False) as found:
                chunk_forward(x, RULE, state=given, chunks=table)
            for one in found:
                # compiled code depends on nothing else that differs here
                nothing = [part is None for part in one.arguments]
                launches[f"{kernel}, {nothing}, {one.settings}"] = one

    for name in names:
        x = draw(name, [4096])
        for chunks in (None, 0):
            table = table_of([4096], chunks)
            for given in (state_of(x, table), None):
                collect(x, given, table, KERNELS)
        for kernel, config, chunks in choices(name) if configs else ():
            with forced(kernel, config):
                collect(x, None, table_of([4096], chunks), [kernel])

    say(f"compiled {len(launches)} kernels", *compile_all(launches.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=SHAPES)
    parser.add_argument("--configs", action="store_true", help="other launches, too")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(300, exit=True)
    say(torch.cuda.get_device_name(), torch.__version__)
    precompile(arguments.shapes, configs=arguments.configs)
    for name in arguments.shapes:
        check(name)
    for name in arguments.shapes:
        time_prompts(name)
        if arguments.configs:
            time_configs(name)
    say("done")


if __name__ == "__main__":
    main()

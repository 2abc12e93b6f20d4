"""Check and time products of few rows on a GPU within a minute: ``python tests/ops/thin_visit.py``.

Errors first, then times beside what they replace, as CUDA graphs of a product with many matrices one after the other,
so that none is found in the cache. ``--configs`` adds other configurations.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import statistics
import time
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from gendistill.bench.measure import attempt, capture
from gendistill.ops.block import rms_norm
from gendistill.ops.contracts.block import swiglu_forward
from gendistill.ops.thin import thin_linear, thin_mlp
from gendistill.ops.types import THIN_ROWS
from gendistill_kernels.runtime.lookup import Config, forced

START = time.perf_counter()
# of the weights that a replay reads: several times what the cache holds
COLD_BYTES = 250e6
ROWS = (1, 2, 3, 4)
LINEAR = (
    *((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (320, 1024), (2048, 128)),
    *((1152, 896), (9728, 896), (896, 4864)),
)
# width, and width inside
MLP = ((1024, 3072), (896, 4864))
EPS = 1e-6
CONFIGS = [
    Config(block, warps, stages=stages, registers=registers, programs=programs)
    for block, warps in ((8, 4), (16, 4), (32, 4), (16, 8), (32, 8), (4, 2))
    for stages in (12, 24, 32)
    for registers in (None, 128)
    for programs in (115, 264)
]


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("thin_cases", Path(__file__).with_name("thin_cases.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def microseconds(step, number: int, repeats: int = 7) -> float:
    """Return the median time of one of the ``number`` products of a step, which is recorded first."""
    graph = capture(step)
    graph.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for first, last in events:
        first.record()
        graph.replay()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events) / number * 1e3


def copies(*shapes: tuple[int, int]) -> list[list[torch.Tensor]]:
    size = sum(2 * rows * columns for rows, columns in shapes)
    # a graph of too many kernels takes long to record
    number = min(300, max(2, int(-(-COLD_BYTES // size))))
    return [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5 for shape in shapes]
        for _ in range(number)
    ]


def check(cases: ModuleType) -> None:
    """Print the largest relative error of a row, beside that of eager torch."""
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    for N, K in (*LINEAR, (7, 8), (1000, 1160)):
        line = []
        # what is timed has no bias, and is compiled but once
        drawn, matrix, bias = cases.linear(THIN_ROWS, N, K, bias=(N, K) not in LINEAR, **kind)
        for rows in ROWS:
            x = drawn[:rows]
            expected = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
            off = [
                cases.distance(thin_linear(x, matrix, bias, impl=impl), expected)
                for impl in ("triton", "reference")
            ]
            line.append(f"{rows}: {off[0]:.1e} ({off[1]:.1e})")
        say(f"linear {N} x {K}:", "  ".join(line))
    for K, inner in MLP:
        for stream in (None, torch.float32):
            line = []
            drawn = cases.mlp(THIN_ROWS, K, inner, stream=stream, **kind)
            for rows in ROWS:
                x = drawn._replace(stream=drawn.stream[:rows], mixed=drawn.mixed[:rows])
                expected = cases.whole(x, eps=EPS)
                off = [
                    cases.distance(thin_mlp(*x, eps=EPS, impl=impl), expected)
                    for impl in ("triton", "reference")
                ]
                line.append(f"{rows}: {off[0]:.1e} ({off[1]:.1e})")
            say(f"mlp {K} / {inner}, stream {stream or torch.bfloat16}:", "  ".join(line))


def cell(took: float, size: int) -> str:
    return f"{took:6.2f} us {size / took / 1e6:4.2f} TB/s"


def time_configs(step, number: int, size: int) -> None:
    found = []
    for config in CONFIGS:
        with forced("thin_product", config):
            took, reason = attempt(lambda: microseconds(step, number))
        if reason is not None:
            say(f"    {config}: {reason}")
        else:
            found.append((took, config))
    for took, config in sorted(found, key=lambda one: one[0])[:6]:
        say(f"    {cell(took, size)}  {config}")


def time_linear(N: int, K: int, *, configs: bool) -> None:
    matrices = [matrix for (matrix,) in copies((N, K))]
    size, number = 2 * N * K, len(matrices)
    for rows in ROWS:
        x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)

        def ours(x=x):
            for matrix in matrices:
                thin_linear(x, matrix, impl="triton")

        def general(x=x):
            for matrix in matrices:
                F.linear(x, matrix)

        took = microseconds(general, number), microseconds(ours, number)
        say(
            f"linear {N:5} x {K:4}, {rows} rows: general {cell(took[0], size)}  ours {cell(took[1], size)}",
        )
        if configs:
            time_configs(ours, number, size)


def time_mlp(K: int, inner: int, *, configs: bool) -> None:
    layers = copies((2 * inner, K), (K, inner))
    size, number = 6 * inner * K, len(layers)
    gain = torch.ones(K, device="cuda", dtype=torch.bfloat16)
    for rows in ROWS:
        stream, mixed = torch.randn(2, rows, K, device="cuda", dtype=torch.bfloat16)

        def ours(stream=stream, mixed=mixed):
            for gate_up, down in layers:
                thin_mlp(stream, mixed, gain, gate_up, down, eps=EPS, impl="triton")

        def general(stream=stream, mixed=mixed):
            for gate_up, down in layers:
                total, x = rms_norm(stream, gain, mixed, eps=EPS, dtype=torch.bfloat16, impl="triton")
                hidden = swiglu_forward(F.linear(x, gate_up))
                torch.addmm(total, hidden, down.T, out=total)

        took = microseconds(general, number), microseconds(ours, number)
        say(
            f"mlp {K:4} / {inner}, {rows} rows: general {cell(took[0], size)}  ours {cell(took[1], size)}",
        )
        if configs:
            time_configs(ours, number, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["check", "linear", "mlp"])
    parser.add_argument("--configs", action="store_true", help="other launches, too")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(500, exit=True)
    say(torch.cuda.get_device_name(), torch.__version__)
    with torch.no_grad():
        if "check" in arguments.parts:
            check(load_cases())
        if "mlp" in arguments.parts:
            for K, inner in MLP:
                time_mlp(K, inner, configs=arguments.configs)
        if "linear" in arguments.parts:
            for N, K in LINEAR:
                time_linear(N, K, configs=arguments.configs)
    say("done")


if __name__ == "__main__":
    main()

"""Check and time paged attention on a GPU within a few minutes: ``python tests/ops/paged_visit.py``.

Errors first, then decode steps as CUDA graphs and the bytes of keys and values that they read in a second, then
prefill beside torch's flash attention and training's kernel, both of which read keys that lie in a row. ``--configs``
adds launches in several configurations. A program that waits for ever ends with a traceback after 400 seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import statistics
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gendistill.bench.measure import attempt, capture
from gendistill.ops.paged import PAGE, Pages, paged_attend
from gendistill_kernels.block.attention import attend_forward
from gendistill_kernels.block.layout import Tiles
from gendistill_kernels.paged.decode import Shares, decode
from gendistill_kernels.paged.prefill import prefill
from gendistill_kernels.paged.rows import TABLE
from gendistill_kernels.runtime.lookup import Config, forced

START = time.perf_counter()
# of keys and values that a replay reads, so that none is found in the cache: as much as several layers have
COLD_BYTES = 300e6
MOST_BYTES = 60e9
# heads and channels: Qwen3-0.6B, and Qwen2.5-0.5B
SHAPES = {"16/8 of 128": (16, 8, 128), "14/2 of 64": (14, 2, 64)}
BATCHES, LENGTHS = (1, 32, 256), (1024, 4096, 32_768, 131_072)
# rows, tokens of each, and how many of them are new
PROMPTS = (
    (1, 4096, 4096),
    (8, 4096, 4096),
    (1, 32_768, 32_768),
    (1, 131_072, 131_072),
    (1, 131_072, 4096),
    (32, 1024, 64),
)
DECODE = [
    Config(64, 4, stages=stages, programs=programs) for stages in (2, 3, 4) for programs in (396, 528, 792, 1584)
] + [Config(64, 8, stages=3, programs=528), Config(32, 4, stages=4, programs=792)]  # fmt: skip
PREFILL = [
    Config(block, warps, stages=stages) for block in (32, 64) for warps in (4, 8) for stages in (2, 3, 4)
]


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def load_cases() -> ModuleType:
    path = Path(__file__).with_name("paged_cases.py")
    spec = importlib.util.spec_from_file_location("paged_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def milliseconds(step, repeats: int = 10) -> float:
    """Return the median time of a call."""
    step()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for first, last in events:
        first.record()
        step()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


class Store(NamedTuple):
    """Sequences of one length in pages that lie in no order, as often as the cache does not hold them."""

    layers: list[Tensor]
    table: Tensor
    lengths: Tensor
    cells: Tensor

    @property
    def size(self) -> float:
        """Bytes of keys and values of a layer."""
        return self.layers[0][:, 1:].nbytes

    @classmethod
    def of(cls, rows: int, length: int, KV: int, D: int, *, cold: bool = True) -> Store | None:
        width = -(-length // PAGE)
        size = 4 * rows * width * PAGE * KV * D
        number = max(1, int(-(-COLD_BYTES // size))) if cold else 1
        if size * number > MOST_BYTES:
            return None
        table = (1 + torch.randperm(rows * width, device="cuda")).view(rows, width).int()
        shape = (2, 1 + rows * width, PAGE, KV, D)
        layers = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(number)]
        lengths = torch.full((rows,), length, dtype=torch.int32, device="cuda")
        cells = table[:, -1].long() * PAGE + (length - 1) % PAGE
        return cls(layers, table, lengths, cells)


def check(cases: ModuleType) -> None:
    """Print errors against float64 on the same inputs."""
    lengths = [700, 1, 64, 130, 0, 5]
    for heads, D, window in (
        ((16, 8), 128, None),
        ((14, 2), 64, None),
        ((8, 4), 256, None),
        ((16, 8), 128, 200),
    ):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            inputs = cases.draw(lengths, H=heads[0], KV=heads[1], D=D, dtype=dtype, device="cuda")
            exact = cases.Inputs(*(part.double() for part in inputs))
            expected = cases.whole(exact, lengths, heads=heads, window=window)
            line = []
            for impl in ("triton", "reference"):
                store = cases.Keeper(inputs, lengths, heads=heads, window=window, impl=impl)
                store.prefill(333, until=[max(0, length - 2) for length in lengths])
                store.decode(dead=1)
                off = (store.out.double() - expected).norm() / expected.norm()
                line.append(f"{impl} {off.item():.1e}")
            say(f"{heads} of {D}, window {window}, {str(dtype)[6:]}:", "  ".join(line))


def time_decode(name: str, configs: list[Config]) -> None:
    H, KV, D = SHAPES[name]
    for rows in BATCHES:
        for length in LENGTHS:
            store = Store.of(rows, length, KV, D)
            if store is None:
                continue
            qkv = torch.randn(rows, (H + 2 * KV) * D, device="cuda", dtype=torch.bfloat16)
            q = torch.randn(rows, H, D, device="cuda", dtype=torch.bfloat16)
            gain, angle = torch.ones(D, device="cuda"), torch.rand(2, rows, D, device="cuda")
            nothing = torch.zeros(rows + 1, dtype=torch.int32, device="cuda")
            pages = Pages(store.table, store.lengths, nothing, store.cells, True)

            def step(store=store, pages=pages, qkv=qkv, gain=gain, angle=angle):
                for memory in store.layers:
                    paged_attend(
                        qkv, gain, gain, *angle, *memory, heads=(H, KV), pages=pages, impl="triton"
                    )  # fmt: skip

            def attend(store=store, q=q):
                for keys, values in store.layers:
                    decode(q, keys, values, store.table, store.lengths, window=None)

            took = [milliseconds(capture(one).replay) / len(store.layers) for one in (step, attend)]
            best = TABLE.lookup(q.device, "paged_decode", 2)
            shares = Shares.of(rows, KV, store.table.shape[1], best.programs)
            say(
                f"{name}, {rows:3} x {length:7,}: op {took[0] * 1e3:8.1f} us, attention alone {took[1] * 1e3:8.1f} us"
                f" = {store.size / took[1] / 1e9:.2f} TB/s; {shares}"
            )
            for config in configs:
                with forced("paged_decode", config):
                    graph, reason = attempt(lambda attend=attend: capture(attend))
                if reason is not None:
                    say(f"    {config}: {reason}")
                    continue
                one = milliseconds(graph.replay) / len(store.layers)
                say(f"    {config}: {one * 1e3:8.1f} us = {store.size / one / 1e9:.2f} TB/s")
            del store, pages
            torch.cuda.empty_cache()


def time_prefill(name: str, configs: list[Config]) -> None:
    H, KV, D = SHAPES[name]
    for rows, length, new in PROMPTS:
        store = Store.of(rows, length, KV, D, cold=False)
        assert store is not None
        q = torch.randn(rows * new, H, D, device="cuda", dtype=torch.bfloat16)
        starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda") * new
        keys, values = store.layers[0]
        work = 4 * H * D * rows * new * (length - new / 2 + 0.5)

        def ours(q=q, keys=keys, values=values, store=store, starts=starts):
            return prefill(q, keys, values, store.table, store.lengths, starts, window=None)

        k, v = (side[store.table.long()].flatten(1, 2)[:, :length].flatten(0, 1) for side in (keys, values))
        ends = torch.arange(rows + 1, dtype=torch.int32, device="cuda") * length

        def flash(q=q, k=k, v=v, starts=starts, ends=ends, new=new, length=length):
            return torch.ops.aten._flash_attention_forward(
                q, k, v, starts, ends, new, length, 0.0, True, False
            )[0]

        contestants = {"ours": ours, "flash": flash}
        if new == length:
            tiles = Tiles.of([length] * rows, "cuda")

            def training(q=q, k=k, v=v, tiles=tiles):
                return attend_forward(q, k, v, tiles, window=None)[0]

            contestants["training's"] = training
        line, found = [], {}
        for who, step in contestants.items():
            found[who], reason = attempt(step)
            if reason is not None:
                line.append(f"{who}: {reason}")
                continue
            took = milliseconds(step, 5)
            line.append(f"{who} {took:.3f} ms = {work / took / 1e9:.0f} TFLOP/s")
        if found.get("flash") is not None and found["ours"] is not None:
            off = (found["ours"].float() - found["flash"].float()).norm() / found["flash"].float().norm()
            line.append(f"apart by {off.item():.1e}")
        say(f"{name}, {rows} x {new:,} new of {length:,}:", "; ".join(line))
        for config in configs:
            with forced("paged_prefill", config):
                took, reason = attempt(lambda ours=ours: milliseconds(ours, 3))
            say(f"    {config}: " + (reason or f"{took:.3f} ms = {work / took / 1e9:.0f} TFLOP/s"))
        del store, k, v, found
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["check", "decode", "prefill"])
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=SHAPES)
    parser.add_argument("--configs", action="store_true", help="other launches, too")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(400, exit=True)
    say(torch.cuda.get_device_name(), torch.__version__)
    if "check" in arguments.parts:
        check(load_cases())
    for name in arguments.shapes:
        if "decode" in arguments.parts:
            time_decode(name, DECODE if arguments.configs else [])
        if "prefill" in arguments.parts:
            time_prefill(name, PREFILL if arguments.configs else [])
    say("done")


if __name__ == "__main__":
    main()

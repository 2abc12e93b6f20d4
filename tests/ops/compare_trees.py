"""Time KDA's calls of two checkouts in turns on one GPU: ``python compare_trees.py ROUNDS OUT.json BEFORE AFTER``.

Every round starts a process for each, in changing order; printed are the medians over rounds and their ratio. Device
times (ms) are medians of 30 calls, or 50 replays of a CUDA graph; host times (us) are the fastest tenth of 60 runs of
100 calls that nothing waits for, on one core. The gate is bounded, half-lives are 4 to 512 tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

GPU = torch.device("cuda")


def timed(work, calls=30):
    """Return the median time of a call on the device, in ms."""
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    found = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def graphed(work):
    """Return the median time of replaying a graph of the call, in ms."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return timed(graph.replay, 50)


def on_host(work, calls=100):
    """Return the time that the host needs for a call, in us; the machine is shared, so only the fastest count."""
    for _ in range(30):
        work()
    found = []
    for _ in range(60):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.mean(sorted(found)[:6])


def calls_of(batch, tokens, heads, channels):
    """Return a forward call and a training call of the op on new inputs."""
    from gendistill import ops

    # before the kernels were sorted into folders the op had another name
    op = ops.chunk_kda if hasattr(ops, "chunk_kda") else ops.gated_kda
    wide, narrow = (batch, tokens, heads, channels), (batch, tokens, heads)
    tensors = [torch.randn(shape, device=GPU, dtype=torch.bfloat16) for shape in (*[wide] * 4, narrow)]
    half_lives = torch.empty(heads * channels, device=GPU).uniform_(1.386, 6.238).exp()
    share = (2.0 ** (-1 / half_lives)).log() / -5.0
    gates = [torch.zeros(heads, device=GPU), (share / (1 - share)).log()]
    leaves = [part.requires_grad_() for part in (*tensors, *gates)]
    grad = torch.randn(wide, device=GPU, dtype=torch.bfloat16)

    def run(*parts):
        settings = {"gate": "bounded", "a_log": parts[5], "dt_bias": parts[6], "lower_bound": -5.0}
        return op(*parts[:5], **settings, impl=ops.Impl.TRITON)[0]

    def forward():
        with torch.no_grad():
            run(*leaves)

    def train():
        for part in leaves:
            part.grad = None
        run(*leaves).backward(grad)

    return {"forward": forward, "forward+backward": train}


def measure() -> dict[str, float]:
    """Time the checkout that imports come from."""
    from gendistill.mixers import KDA

    torch.manual_seed(0)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = {}
    for shape in ((8, 4096, 16, 128), (4, 2048, 16, 128)):
        for name, work in calls_of(*shape).items():
            title = f"{'x'.join(map(str, shape))} {name}"
            rows[title], rows[f"{title}, graph"] = timed(work), graphed(work)
    for name, work in calls_of(1, 64, 2, 64).items():
        rows[f"host, short {name}"] = on_host(work)
    layer = KDA(hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=64, impl="triton").to(GPU)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 16, 256, device=GPU))
        step = torch.randn(1, 1, 256, device=GPU)
        owned = state._replace(owned=True)
        rows["host, decode step of the layer"] = on_host(lambda: layer(step, state=state))
        rows["decode step of the layer, graph"] = graphed(lambda: layer(step, state=state))
        rows["host, decode step in place"] = on_host(lambda: layer(step, state=owned))
    return rows


def compare(rounds: int, out: Path, trees: list[str]) -> None:
    """Measure both checkouts in turns, write all times, and print a table."""
    found: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
    for number in range(rounds):
        for tree in trees if number % 2 == 0 else reversed(trees):
            paths = [tree, f"{tree}/kernels", f"{tree}/evals", os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
            command = [sys.executable, str(Path(__file__).resolve()), "measure"]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            found[tree].append(json.loads(done.stdout.splitlines()[-1]))
            out.write_text(json.dumps(found, indent=1))
    for name in found[trees[0]][0]:
        old, new = (statistics.median(each[name] for each in found[tree]) for tree in trees)
        print(f"{name:45} {old:9.4f} {new:9.4f} {new / old:6.3f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        print(json.dumps(measure()))
    else:
        compare(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

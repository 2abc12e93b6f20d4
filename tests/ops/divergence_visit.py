"""Check and time the linear divergence on a GPU within a minute or two: ``python tests/ops/divergence_visit.py``.

Errors first, then the whole op at the size of its bar, then launches of the kernel alone in several configurations. A
program that waits for ever ends with a traceback after 200 seconds. Most of the time goes into compiling.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import statistics
import time
from pathlib import Path

import torch

from gendistill.bench.measure import capture, peak_extra_mib
from gendistill.ops.divergence import Term, linear_divergence, unrounded
from gendistill_kernels.divergence.dense import compare
from gendistill_kernels.divergence.layout import CE, JSD, KL, REVERSE_KL, Mix
from gendistill_kernels.runtime.lookup import Config, forced

START = time.perf_counter()
# of the forward divergence; of the others the first three
BLOCKS = [(4096, 8), (4096, 4), (8192, 4), (2048, 4), (8192, 8), (8192, 16)]
FEW = ("kl at 1.0", "reverse_kl at 2.0", "jsd at 1.0", "kl and ce", "all")


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def load_cases():
    path = Path(__file__).with_name("divergence_cases.py")
    spec = importlib.util.spec_from_file_location("divergence_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(problem, leaves, terms, impl, **settings):
    teacher = {"teacher_hidden": problem.teacher_hidden, "teacher_weight": problem.teacher_weight}
    found = linear_divergence(*leaves, problem.labels, terms=terms, impl=impl, **(settings or teacher))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return found, torch.autograd.grad(found.total, wanted)


def check(cases) -> None:
    """Print errors against float64 on the same inputs: of the total, and of both gradients."""
    for dtype, vocab, names in (
        (torch.float32, 5003, tuple(cases.MIXES)),
        (torch.bfloat16, 151_936, FEW),
        (torch.float32, 151_936, FEW[:1]),
    ):
        problem = cases.draw(vocab, (2, 40), 256, 128, dtype=dtype, device="cuda", size=3.0)
        wide = problem.double()
        for name in names:
            terms = cases.MIXES[name]
            leaves = wide.leaves()
            expected = cases.exact(wide, terms, leaves)
            gradients = torch.autograd.grad(expected, leaves)
            line = []
            for impl in ("reference", "triton"):
                found, grads = call(problem, problem.leaves(), terms, impl)
                errors = [cases.error(found.total, expected)]
                errors += [cases.error(*pair) for pair in zip(grads, gradients, strict=True)]
                line.append(f"{impl} " + " ".join(f"{one:.1e}" for one in errors))
            say(f"{str(dtype)[6:]} V {vocab:,} {name:18}", "   ".join(line))
    problem = cases.draw(32_003, (2, 40), 64, 96, device="cuda", size=3.0)
    wide = problem.double()
    teacher = cases.top_k_of(problem.teacher_hidden @ problem.teacher_weight.T, 20)
    for name, terms in cases.AT_ONE.items():
        leaves = wide.leaves()
        expected = cases.exact_top_k(*leaves, problem.labels, teacher, terms)
        gradients = torch.autograd.grad(expected, leaves)
        line = []
        for impl in ("reference", "triton"):
            found, grads = call(problem, problem.leaves(), terms, impl, teacher_top_k=teacher)
            errors = [cases.error(found.total, expected)]
            errors += [cases.error(*pair) for pair in zip(grads, gradients, strict=True)]
            line.append(f"{impl} " + " ".join(f"{one:.1e}" for one in errors))
        say(f"20 tokens of {name:14}", "   ".join(line))
    problem = cases.draw(151_936, (2, 300), 256, 128, dtype=torch.bfloat16, device="cuda")
    runs = [call(problem, problem.leaves(), cases.MIXES["all"], "triton") for _ in range(5)]
    same = all(torch.equal(runs[0][0].parts, run[0].parts) for run in runs) and all(
        torch.equal(one, other) for run in runs for one, other in zip(runs[0][1], run[1], strict=True)
    )
    say("five runs:", "same bits" if same else "DIFFER")


def milliseconds(step, repeats: int = 5) -> float:
    """Return the median time of a step, after one that warms up."""
    step()
    times = []
    for _ in range(repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        step()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return statistics.median(times)


def time_op(cases, impls) -> None:
    """Time forward and backward at N 8192, D 1024, V 151,936, and measure memory."""
    problem = cases.draw(151_936, (8, 1024), 1024, 1024, dtype=torch.bfloat16, device="cuda")
    problem = problem._replace(labels=problem.labels.clamp(min=0))
    for name, terms in (
        ("kl", [Term(cases.KL)]),
        ("kl at 2 and ce", [Term(cases.KL, 0.9, 2.0), Term(cases.CE, 0.1)]),
        ("reverse_kl", [Term(cases.REVERSE)]),
        ("jsd", [Term(cases.JSD)]),
    ):
        for trained in (True, False):
            for impl in impls:
                leaves = problem.leaves()
                leaves[1].requires_grad_(trained)

                def step(leaves=leaves, terms=terms, impl=impl):
                    return call(
                        problem, leaves, terms, impl,
                        teacher_hidden=problem.teacher_hidden, teacher_weight=problem.teacher_weight,
                        num_labels=problem.labels.numel(),
                    )  # fmt: skip

                took, extra = milliseconds(step), peak_extra_mib(step) * 2**20 / 1e9
                head = "trained" if trained else "frozen"
                say(f"op {name:16} head {head:8} {impl:10} {took:6.2f} ms  {extra:.2f} GB")
                if name == "kl" and impl == "triton":
                    expected = step()[1]
                    graph_out = []
                    graph = capture(lambda step=step, out=graph_out: out.append(step()[1]))
                    graph.replay()
                    same = all(
                        torch.equal(one, two) for one, two in zip(graph_out[-1], expected, strict=True)
                    )
                    replayed = milliseconds(graph.replay)
                    say(f"   as a CUDA graph {replayed:.2f} ms, {'same bits' if same else 'DIFFER'}")
                    del graph, graph_out, expected
                torch.cuda.empty_cache()


def time_kernel() -> None:
    """Time a chunk of 1024 rows in every configuration, and what its products take."""
    N, V, D = 1024, 151_936, 1024
    student, teacher = (torch.randn(N, V, device="cuda") * 3 for _ in range(2))
    targets = torch.randint(0, V, (N,), device="cuda")
    x, head = (torch.randn(n, D, device="cuda", dtype=torch.bfloat16) for n in (N, V))
    took = milliseconds(lambda: unrounded(x, head.T, out=student), 10)
    say(f"product of {N} rows: {took:.3f} ms")
    mixes = {
        "kl": Mix((KL,), (1.0,), (1.0,), (0.0,)),
        "kl at 2 and ce": Mix((KL, CE), (0.9, 0.1), (2.0, 1.0), (0.0, 0.0)),
        "reverse_kl": Mix((REVERSE_KL,), (1.0,), (1.0,), (0.0,)),
        "jsd": Mix((JSD,), (1.0,), (1.0,), (0.5,)),
    }
    for name, mix in mixes.items():
        line = []
        for block, warps in BLOCKS if name == "kl" else BLOCKS[:3]:
            with forced("divergence_mixture" if name == "jsd" else "divergence", Config(block, warps)):

                def step(mix=mix):
                    compare(student, teacher, targets, mix, grad_dtype=torch.bfloat16)

                # the gradient overwrites logits: whatever they are, a launch takes as long
                took = milliseconds(step, 10)
            line.append(f"{block}x{warps} {took:.3f} ms ({10 * N * V / took / 1e9:.2f} TB/s)")
        say(f"kernel {name:16}", "  ".join(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["check", "op", "kernel"])
    parser.add_argument("--impls", nargs="+", default=["triton", "reference"])
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(200, exit=True)
    say(torch.cuda.get_device_name(), torch.__version__)
    cases = load_cases()
    if "check" in arguments.parts:
        check(cases)
    if "kernel" in arguments.parts:
        time_kernel()
    if "op" in arguments.parts:
        time_op(cases, arguments.impls)
    say("done")


if __name__ == "__main__":
    main()

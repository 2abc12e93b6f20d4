"""Check and time the decode step of a delta-rule layer on a GPU: ``python tests/ops/decode_visit.py``.

Errors against the definition in float64 first, then steps as CUDA graphs over as many states as no cache holds, and the
bytes of state that they read and write in a second. ``--configs`` adds launches in several configurations, ``--alive``
steps in which only a share of the rows has a sequence. A program that waits for ever ends with a traceback after 300
seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from gendistill.bench.cases import DecodeCase
from gendistill.bench.inputs import LOWER_BOUND, NORM_EPS, DecodeInputs, decode_settings, draw_decode
from gendistill.bench.launches import compile_all, watch
from gendistill.bench.measure import attempt, capture, relative_error
from gendistill.ops import decode_delta_rule
from gendistill_kernels.delta.decode import decode_step
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Rule
from gendistill_kernels.runtime.lookup import Config, forced

START = time.perf_counter()
# states that a replay goes through, so that none is found in the cache; several layers have as much
COLD_BYTES = 400e6
MOST_LAYERS = 32
# heads, heads of keys and values, channels: Qwen2.5-0.5B, Qwen3-0.6B, SmolLM2-135M, and nothing shared
SHAPES = {
    "14/2/2 of 64": (14, 2, 64),
    "16/8/8 of 128": (16, 8, 128),
    "9/3/3 of 64": (9, 3, 64),
    "16/16/16 of 128": (16, 16, 128),
}
BATCHES = (1, 8, 32, 128, 256, 512)
# elements of the state, warps and registers, by channels
CONFIGS = {
    64: (
        (4096, 2, 96),
        (4096, 2, 128),
        (4096, 2, 168),
        (4096, 4, 64),
        (4096, 4, 72),
        (4096, 4, 80),
        (4096, 4, 96),
        (2048, 2, 64),
        (2048, 2, 96),
    ),
    128: (
        (16384, 4, 255),
        (16384, 8, 96),
        (16384, 8, 128),
        (16384, 16, 64),
        (8192, 4, 128),
        (8192, 8, 64),
        (8192, 4, 168),
    ),
}
# channels and warps
CONVOLUTIONS = ((64, 2), (128, 4), (256, 4), (256, 8), (512, 8))


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def words(config: Config) -> str:
    limit = "" if config.registers is None else f", {config.registers} registers"
    return f"{config.block} in {config.warps} warps{limit}"


class Layers(NamedTuple):
    """Inputs of a step, and states of as many layers as a replay takes."""

    x: DecodeInputs
    states: Sequence[torch.Tensor]
    windows: Sequence[torch.Tensor]
    lives: torch.Tensor | None = None

    @classmethod
    def of(cls, shape: str, rows: int, number: int | None = None) -> Layers:
        H, shared, D = SHAPES[shape]
        x = draw_decode(DecodeCase(shape, rows, H, D, shared), device="cuda", dtype=torch.bfloat16)
        number = number or int(min(MOST_LAYERS, max(2, -(-COLD_BYTES // x.state.nbytes))))
        return cls(x, [x.state.clone() for _ in range(number)], [x.conv_state.clone() for _ in range(number)])

    def step(self, layer: int = 0) -> torch.Tensor:
        """Take one layer's step."""
        x = self.x
        return decode_step(
            x.qkv, x.decay, x.beta, self.states[layer],
            rule=Rule("bounded", LOWER_BOUND), heads=Heads(x.heads, x.kv_heads, x.kv_heads),
            A_log=x.a_log, dt_bias=x.dt_bias,
            convolution=Convolution(x.conv_weight, self.windows[layer], x.conv_bias, "silu"),
            finish=Finish(x.norm_weight, NORM_EPS, x.output_gate, "silu"), lives=self.lives,
        )  # fmt: skip

    def all(self) -> None:
        """Take every layer's."""
        for layer in range(len(self.states)):
            self.step(layer)


def microseconds(layers: Layers, repeats: int = 9) -> float:
    """Return the median time of a layer's step in a graph."""
    graph = capture(layers.all)
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in events:
        first.record()
        graph.replay()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events) * 1e3 / len(layers.states)


def exact(x: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the definition in float64; returns the output and the state."""
    wide = {name: part.double() for name, part in x._asdict().items() if isinstance(part, torch.Tensor)}
    y = x._replace(**wide)
    (q, k, v), settings = y.split(y.qkv, 2), decode_settings(y)
    out = decode_delta_rule(
        q, k, v, y.decay, y.beta, y.state, conv_state=y.conv_state, conv_activation="silu", **settings
    )
    return out, y.state


def errors_of(shape: str, rows: int) -> str:
    """Compare output and states with the definition, and the convolution's state with what it has to be."""
    layers = Layers.of(shape, rows, 1)
    answer, state = exact(layers.x)
    out = layers.step()
    window = torch.cat([layers.x.conv_state[..., 1:], layers.x.qkv.transpose(1, 2)], -1)
    off = relative_error(out, answer), relative_error(layers.states[0], state)
    moved = torch.equal(layers.windows[0], window)
    bad = "" if off[0] < 6e-3 and off[1] < 6e-3 and moved else "  WRONG"
    return f"out {off[0]:.1e}, state {off[1]:.1e}, window {'moved' if moved else 'NOT MOVED'}{bad}"


def choices(shape: str, *, wanted: bool) -> list[tuple[str, Config]]:
    """Return kernels of a step, each with a configuration to try instead of the table's."""
    heads, shared, channels = SHAPES[shape]
    found = [("decode", Config(*one[:2], registers=one[2])) for one in CONFIGS[channels]]
    if heads != shared:
        found += [("decode_convolution", Config(*one)) for one in CONVOLUTIONS]
    return found if wanted else []


def precompile(shapes: Sequence[str], batches: Sequence[int], *, wanted: bool) -> None:
    """Compile at once what is launched later; compilers run outside Python's lock."""
    launches = {}
    for shape in shapes:
        for rows in batches:
            layers = Layers.of(shape, rows, 1)
            for choice in [None, *choices(shape, wanted=wanted)]:
                for kernel in ("decode", "decode_convolution"):
                    with forced(*choice) if choice else nullcontext(), watch(kernel, run=False) as found:
                        layers.step()
                    # compiled code depends on nothing else that differs here
                    launches |= {repr(sorted(one.settings.items(), key=str)): one for one in found}

    say(f"compiled {len(launches)} kernels", *compile_all(launches.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[*BATCHES])
    parser.add_argument(
        "--alive", nargs="+", type=float, default=[], help="steps with this share of rows, too"
    )
    parser.add_argument("--configs", action="store_true", help="other launches of the first two shapes, too")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(300, exit=True)
    say(torch.cuda.get_device_name(), torch.__version__)
    shapes = arguments.shapes or [*SHAPES][: 2 if arguments.configs else None]
    precompile(shapes, arguments.batches, wanted=arguments.configs)
    for shape in shapes:
        for rows in (1, 200):
            say(f"{shape}, {rows:3}: {errors_of(shape, rows)}")
        for kernel, config in choices(shape, wanted=arguments.configs):
            with forced(kernel, config):
                found, reason = attempt(lambda shape=shape: errors_of(shape, 40))
            say(f"    {kernel} {words(config)}: {reason or found}")
    for shape in shapes:
        for rows in arguments.batches:
            layers = Layers.of(shape, rows)
            size = 2 * layers.x.state.nbytes
            took = microseconds(layers)
            say(f"{shape}, {rows:3}: {took:7.2f} us = {size / took / 1e6:.2f} TB/s")
            for alive in arguments.alive:
                some = layers._replace(lives=torch.arange(rows, device="cuda") < round(alive * rows))
                say(f"    {alive:4.0%} of rows live: {microseconds(some):7.2f} us")
            for kernel, config in choices(shape, wanted=arguments.configs):
                with forced(kernel, config):
                    took, reason = attempt(lambda layers=layers: microseconds(layers, 5))
                speed = reason or f"{took:7.2f} us = {size / took / 1e6:.2f} TB/s"
                say(f"    {kernel} {words(config)}: {speed}")
            del layers
            torch.cuda.empty_cache()
    say("done")


if __name__ == "__main__":
    main()

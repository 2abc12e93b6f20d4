"""Time every kernel's launch configuration beside a few others, and print rows for the table of the best.

A candidate is forced, the pass that the kernel is part of runs, and its results are compared with those of the
configuration in the table; then the kernel's own launch is repeated and timed. Nothing is changed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from gendistill.bench import measure
from gendistill.bench.cases import GATES, LOWER_BOUND, VOCABULARY, Case, DecodeCase
from gendistill.bench.inputs import DecodeInputs, SequenceInputs, draw_decode, draw_sequence
from gendistill.bench.launches import PLACES, Launch, table_of, watch
from gendistill.bench.measure import attempt, relative_error
from gendistill.ops.types import PAGE
from gendistill.results.table import ResultRow
from gendistill_kernels.block import attention, glu, rope
from gendistill_kernels.block import norm as block_norm
from gendistill_kernels.block.layout import Tiles as AttentionTiles
from gendistill_kernels.conv.causal import conv_backward, conv_forward
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta.chunk import chunk_backward, chunk_forward
from gendistill_kernels.delta.decode import decode_step
from gendistill_kernels.delta.layout import Chunks, InferenceChunks, power_of_2
from gendistill_kernels.delta.rows import ANY, is_many
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Inputs, Rule
from gendistill_kernels.divergence import layout as divergence
from gendistill_kernels.divergence.dense import compare
from gendistill_kernels.divergence.tail import log_sum, spread
from gendistill_kernels.norm.gated import gated_norm_backward, gated_norm_forward
from gendistill_kernels.paged.decode import decode as paged_decode
from gendistill_kernels.paged.prefill import prefill as paged_prefill
from gendistill_kernels.paged.store import turn_and_store
from gendistill_kernels.runtime.hardware import architecture
from gendistill_kernels.runtime.lookup import Config, Row, forced
from gendistill_kernels.thin import product as thin

# a candidate must save this part of the time to be called better: rounds differ by a percent or two
MARGIN = 0.03
# Of results to those of the configuration in the table; rounding to bfloat16 alone costs 1.7e-3. The gradients of a
# gate's parameters are sums in which most cancels.
TOLERANCE, SUMMED = 5e-3, {"A_log": 5e-2, "dt_bias": 2e-2}
# what to try, besides what the table has
_SCANS = tuple(
    Config(block, warps, stages)
    for block, warps in ((32, 4), (64, 4), (128, 4), (128, 8))
    for stages in (1, 2, 3)
)
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "prepare": tuple(Config(block, warps) for block in (32, 64, 128) for warps in (4, 8)),
    "prepare_levels": tuple(Config(block, warps) for block in (32, 64, 128) for warps in (4, 8)),
    "scan": _SCANS,
    "summary": _SCANS,
    "reverse_scan": _SCANS,
    "reverse_summary": _SCANS,
    "carry": (
        *(Config(block, warps) for block in (16, 32, 64) for warps in (4, 8)),
        *(Config(block, 8, stages=stages) for block in (16, 32) for stages in (2, 3)),
    ),
    "values": tuple(Config(256, warps) for warps in (4, 8)),
    "keys": tuple(Config(block, warps) for block in (16, 32, 64) for warps in (4, 8)),
    "keys_levels": tuple(Config(1, warps) for warps in (4, 8)),
    "sum_heads": tuple(Config(block, warps) for block in (512, 1024, 2048) for warps in (4, 8)),
    "sum_chunks": tuple(Config(block, warps) for block in (1024, 4096, 8192) for warps in (4, 8)),
    "conv_forward": tuple(
        Config(block, warps, registers=limit)
        for block in (128, 256)
        for warps in (4, 8)
        for limit in (None, 128)
    ),
    "conv_backward": tuple(
        Config(block, warps, programs=number)
        for block in (128, 256)
        for warps in (2, 4)
        for number in (1024, 2048)
    ),
    "norm_forward": tuple(Config(block, warps) for block in (2048, 4096, 8192) for warps in (4, 8)),
    "norm_backward": tuple(
        Config(block, 4, programs=number) for block in (1024, 2048, 4096) for number in (396, 660, 1056)
    ),
    **{
        f"block_{part}_{way}": tuple(Config(block, warps) for block in (1024, 2048, 4096) for warps in (4, 8))
        for part, way in (("norm", "forward"), ("glu", "forward"), ("glu", "backward"), ("rope", "forward"))
    },
    **{
        f"block_{part}_backward": tuple(
            Config(block, warps, programs=number)
            for block in (1024, 2048, 4096)
            for warps in (4, 8)
            for number in (264, 528)
        )
        for part in ("norm", "rope")
    },
    **{
        f"block_attention{part}": tuple(
            Config(block, warps, stages=stages) for block in blocks for warps in (4, 8) for stages in (2, 3)
        )
        for part, blocks in (("", (32, 64, 128)), ("_queries", (32, 64, 128)), ("_keys", (32, 64)))
    },
    "decode": tuple(
        Config(block, warps, registers=limit)
        for block, warps, limit in (
            (4096, 2, 128),
            (4096, 2, 168),
            (4096, 4, 80),
            (4096, 4, 96),
            (8192, 4, 128),
            (8192, 4, 168),
            (16384, 4, 255),
            (16384, 8, 96),
            (16384, 8, 128),
        )
    ),
    "decode_convolution": tuple(Config(block, warps) for block in (128, 256, 512, 1024) for warps in (2, 4)),
    "divergence": tuple(Config(block, warps) for block in (2048, 4096, 8192) for warps in (4, 8)),
    "divergence_mixture": tuple(Config(block, warps) for block in (2048, 4096, 8192) for warps in (4, 8)),
    "tail_sum": tuple(Config(block, warps) for block in (2048, 4096, 8192) for warps in (4, 8)),
    "tail_gradient": tuple(Config(block, warps) for block in (2048, 4096, 8192) for warps in (4, 8)),
    "paged_store": tuple(Config(block, warps) for block in (512, 1024, 2048, 4096) for warps in (2, 4)),
    "paged_prefill": tuple(
        Config(block, warps, stages=stages) for block in (32, 64) for warps in (4, 8) for stages in (2, 3)
    ),
    "paged_decode": tuple(
        Config(block, warps, stages=stages, programs=number)
        for block, warps in ((32, 4), (64, 4), (64, 8))
        for stages in (2, 3)
        for number in (396, 792)
    ),
    "paged_join": tuple(Config(block, warps) for block in (2048, 4096, 8192) for warps in (2, 4)),
    "thin_product": tuple(
        Config(block, warps, stages=stages, programs=115)
        for block, warps in ((8, 4), (16, 4), (16, 8))
        for stages in (12, 16, 24, 32)
    ),
}
# kernels of the chunked rule, and whether states are kept; only the scan is launched both ways
_CHUNKED = (
    ("prepare", False),
    ("prepare_levels", False),
    ("scan", False),
    ("scan", True),
    ("summary", False),
    ("carry", False),
    ("reverse_scan", True),
    ("reverse_summary", True),
    ("values", True),
    ("keys", True),
    ("keys_levels", True),
    ("sum_heads", True),
    ("sum_chunks", True),
)
# whose block the table takes from elsewhere
_NO_BLOCK = ("keys_levels", "values")


class Job(NamedTuple):
    """What to tune, and how to reach it.

    Attributes:
        kernel: Its name in the table.
        case: Name of the case.
        key: What the kernel's table is asked for besides; jobs that share both are one.
        step: Runs the pass that the kernel is part of; returns its results by name.
    """

    kernel: str
    case: str
    key: tuple[Any, ...]
    step: Callable[[], dict[str, Tensor]]

    @property
    def shape(self) -> str:
        """What tables call it."""
        if len(self.key) == 1:
            return f"{self.key[0]} bytes"
        keys, values, size, many, save = self.key
        words = [f"K {keys}, V {values}, {size} bytes", "many chains" if many else "few chains"]
        return ", ".join([*words, "saving"] if save else words)

    @property
    def row(self) -> Row:
        """The row that the running GPU's part of the table has for it."""
        where = architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return table_of(self.kernel).find(where, self.kernel, *self.key)


class Trial(NamedTuple):
    """What was found out about a configuration.

    Attributes:
        config: It.
        ms: Time of one launch; None if it was dropped.
        reason: Why it was dropped.
    """

    config: Config
    ms: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The trials of one job; the first is the configuration in the table."""

    job: Job
    trials: Sequence[Trial]

    @property
    def now(self) -> Trial:
        """What the table has."""
        return self.trials[0]

    @property
    def best(self) -> Trial:
        """The fastest, if it beats what the table has by ``MARGIN``; else what the table has."""
        timed = [trial for trial in self.trials if trial.ms is not None]
        if not timed:
            return self.now
        fastest = min(timed, key=lambda trial: trial.ms or 0.0)
        if self.now.ms is not None and (fastest.ms or 0.0) > self.now.ms * (1 - MARGIN):
            return self.now
        return fastest

    def paste(self) -> str:
        """Write the best as a row for the table, covering this job's sizes and those below."""
        row: Any = self.job.row.narrowed(self.best.config, *self.job.key)
        kernel, *sizes, config = row
        words = [f'"{kernel}"', *("ANY" if size == ANY else str(size) for size in sizes), code(config)]
        # two cases may ask for different rows of the same sizes
        return f"{type(row).__name__}({', '.join(words)}),  # {self.job.case}"

    def rows(self) -> list[ResultRow]:
        """Return the times as rows of a results file."""
        return [
            ResultRow(
                name=f"{self.job.kernel}, {self.job.shape}, {self.job.case}: {code(trial.config)}",
                value=trial.ms,
                unit="ms",
                better="lower",
                n=None,
                note="; ".join(self.words(trial)) or None,
            )
            for trial in self.trials
            if trial.ms is not None
        ]

    def words(self, trial: Trial) -> list[str]:
        """Say what a configuration is: in the table, the best, or dropped."""
        words = ["chosen now"] if trial is self.now else []
        words += ["best"] if trial is self.best and trial.ms is not None else []
        return [*words, f"dropped: {trial.reason}"] if trial.reason else words


def code(config: Config) -> str:
    """Write a configuration as in the table."""
    words = [str(config.block), str(config.warps)]
    for name, usual in Config._field_defaults.items():
        if (value := getattr(config, name)) != usual:
            words.append(f"{name}={value}")
    return f"Config({', '.join(words)})"


def candidates(job: Job, now: Config) -> list[Config]:
    """Return what the table has, then what else to try: no block larger than what there is, nothing twice."""
    most = ANY
    if not job.kernel.startswith(
        ("norm", "conv", "block", "decode", "sum_", "divergence", "tail", "paged", "thin")
    ):
        most = job.key[0] if job.kernel in ("prepare", "prepare_levels", "keys") else job.key[1]
    others = CANDIDATES[job.kernel]
    if job.kernel in _NO_BLOCK:
        others = tuple(other._replace(block=now.block) for other in others)
    else:
        others = tuple(other for other in others if other.block <= most)
    # the same launch under another name
    seen = now._replace(block=min(now.block, most))
    return [now, *(other for other in dict.fromkeys(others) if other not in (now, seen))]


def table(outcome: Outcome) -> Table:
    """List the trials of one job."""
    found = Table(title=f"{outcome.job.kernel}: {outcome.job.shape}", title_justify="left")
    for name in ("candidate", "ms", "chosen now?", "best?", "dropped"):
        found.add_column(name, justify="right" if name == "ms" else "left")
    for trial in outcome.trials:
        found.add_row(
            code(trial.config),
            "" if trial.ms is None else f"{trial.ms:.4f}",
            "yes" if trial is outcome.now else "",
            "yes" if trial is outcome.best and trial.ms is not None else "",
            escape(trial.reason or ""),
        )
    return found


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Say which result is off; None if none is."""
    for name, part in expected.items():
        off = relative_error(found[name], part.double())
        if not off <= SUMMED.get(name.removeprefix("d "), TOLERANCE):
            return f"{name} is off by {off:.1e}"
    return None


def time_launch(launch: Launch) -> float:
    """Return the milliseconds of a launch, with a cleared cache before each."""
    return measure.time_rounds({"launch": launch.again})["launch"].median


@dataclass(slots=True, kw_only=True)
class Tuner:
    """Trials of the candidates of some jobs.

    Attributes:
        jobs: What to tune, in this order.
        console: Where to print.
        budget_s: No job starts later than this.
        clock: Times a launch.
        save: Called with everything found so far, after every job.
    """

    jobs: Iterable[Job]
    console: Console = field(default_factory=lambda: Console(highlight=False))
    budget_s: float | None = None
    clock: Callable[[Launch], float] = time_launch
    save: Callable[[Sequence[Outcome]], None] = lambda found: None

    def run(self) -> list[Outcome]:
        """Tune, and print a table per job and the rows that would change."""
        found: list[Outcome] = []
        seen, start = set(), time.monotonic()
        for job in self.jobs:
            if (job.kernel, job.key) in seen:
                continue
            seen.add((job.kernel, job.key))
            spent = time.monotonic() - start
            if self.budget_s is not None and spent > self.budget_s:
                self.console.print(
                    f"the budget of {self.budget_s:g} s is spent: {job.kernel} and what follows left out"
                )
                break
            self.console.print(f"[dim]{spent:6.1f} s[/]  {job.kernel}: {job.shape}, {job.case}")
            outcome = self.tune(job)
            if outcome is None:
                self.console.print("          not launched here")
                continue
            found.append(outcome)
            self.console.print(table(outcome))
            self.save(found)
        better = [outcome for outcome in found if outcome.best is not outcome.now]
        if better:
            self.console.print(
                "rows to put above those of the same kernel in its family's rows.py in kernels/gendistill_kernels:"
            )
            # a row covers smaller sizes, too, and the first that covers a call is taken
            for outcome in sorted(better, key=lambda one: (one.job.kernel, one.job.key)):
                self.console.print(f"    {outcome.paste()}", markup=False, soft_wrap=True)
        else:
            self.console.print(f"nothing is faster by {MARGIN:.0%} than what the table has")
        return found

    def tune(self, job: Job) -> Outcome | None:
        """Try a job's candidates; None if its pass does not launch the kernel."""
        now = job.row.config
        with forced(job.kernel, now), watch(job.kernel) as launches:
            expected = {name: part.clone() for name, part in job.step().items()}
        if not launches:
            return None
        return Outcome(job, [self._try(job, config, expected) for config in candidates(job, now)])

    def _try(self, job: Job, config: Config, expected: dict[str, Tensor]) -> Trial:
        def check() -> Launch:
            with forced(job.kernel, config), watch(job.kernel) as launches:
                found = job.step()
            if reason := difference(found, expected):
                raise ValueError(reason)
            return launches[-1]

        launch, reason = attempt(check)
        if reason is not None:
            return Trial(config, None, reason)
        ms, reason = attempt(lambda: self.clock(launch))
        return Trial(config, ms, reason)


def make_jobs(
    cases: Sequence[Case],
    *,
    dtype: torch.dtype,
    device: str = "cuda",
    kernels: Collection[str] = tuple(PLACES),
) -> Iterator[Job]:
    """Make what to tune for some cases, one after the other: the tensors of one part of a layer at a time."""
    for case in cases:
        for part in (_chunked, _convolution, _norm, _block, _decoding, _divergence, _paged, _thin):
            yield from (job for job in part(case, dtype, device) if job.kernel in kernels)


def _chunked(case: Case, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """Go over the kernels of the chunked rule, with each gate; that which starts wildest has chunks out of range."""
    rows = case.batch if case.lengths is None else len(case.lengths)
    wide = power_of_2(case.channels)
    many = is_many(rows * case.heads, wide, packed=case.lengths is not None)
    for gate in GATES:
        drawn = draw_sequence(case, gate, device=device, dtype=dtype)
        step = _chunked_step(drawn, Rule(gate, LOWER_BOUND), case.lengths)  # pyright: ignore[reportArgumentType]
        for kernel, save in _CHUNKED:
            if kernel.endswith("_levels") == (gate == "softplus"):
                key = (wide, wide, dtype.itemsize, many, save)
                yield Job(kernel, case.name, key, step=functools.partial(step, save))


def _chunked_step(
    drawn: SequenceInputs, rule: Rule, lengths: Sequence[int] | None
) -> Callable[[bool], dict[str, Tensor]]:
    x = Inputs(*(None if part is None else part.detach() for part in drawn[:7]))  # pyright: ignore
    grad = torch.randn(*x.decay.shape[:3], x.v.shape[3], device=x.v.device).to(x.v.dtype)
    tables = None if lengths is None else [kind.of(lengths, x.v.device) for kind in (InferenceChunks, Chunks)]

    def step(save: bool) -> dict[str, Tensor]:
        chunks = None if tables is None else tables[save]
        out, state, saved = chunk_forward(x, rule, chunks=chunks, save=save)
        found = {"out": out, "state": state}
        if saved is not None:
            grads = chunk_backward(grad, None, x, rule, out, saved, chunks=chunks)
            found |= {f"d {name}": part for name, part in grads._asdict().items() if part is not None}
        return found

    return step


def _normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _convolution(case: Case, dtype: torch.dtype, device: str) -> Iterator[Job]:
    normal = functools.partial(_normal, device, dtype)
    B, T, C = case.batch, case.tokens, (case.heads + 2 * case.kv_heads) * case.channels
    x, grad, weight, bias = normal(B, T, C), normal(B, T, C), normal(C, 4), normal(C)
    tiles = None if case.lengths is None else Tiles.of(case.lengths, device)

    def step() -> dict[str, Tensor]:
        out, state = conv_forward(x, weight, bias, activation="silu", tiles=tiles)
        grads = conv_backward(grad, None, x, weight, bias, activation="silu", tiles=tiles)
        return {"out": out, "state": state, "d x": grads.x, "d weight": grads.weight}

    for kernel in ("conv_forward", "conv_backward"):
        yield Job(kernel, case.name, (dtype.itemsize,), step=step)


def _norm(case: Case, dtype: torch.dtype, device: str) -> Iterator[Job]:
    normal = functools.partial(_normal, device, dtype)
    B, T, H, V = case.batch, case.tokens, case.heads, case.channels
    o, gain, gate, grad = normal(B, T, H, V), normal(V), normal(B, T, H * V), normal(B, T, H * V)

    def step() -> dict[str, Tensor]:
        grads = gated_norm_backward(grad, o, gain, gate)
        found = {f"d {name}": part for name, part in grads._asdict().items() if part is not None}
        return {"out": gated_norm_forward(o, gain, gate), **found}

    for kernel in ("norm_forward", "norm_backward"):
        yield Job(kernel, case.name, (dtype.itemsize,), step=step)


def _block(case: Case, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """A decoder layer between its matrix products, three times as wide inside; documents of 512 tokens."""
    normal = functools.partial(_normal, device, dtype)
    rows, heads, channels = case.batch * case.tokens, case.heads, case.channels
    width, number = heads * channels, heads + 2 * case.kv_heads
    x, added, grad, more = (normal(rows, width) for _ in range(4))
    both, wide = normal(rows, 6 * width), normal(rows, 3 * width)
    qkv, grads = normal(rows, number * channels), normal(rows, number, channels)
    dq, dk, dv = (part.contiguous() for part in grads.split([heads, case.kv_heads, case.kv_heads], dim=1))
    gain, q_gain, k_gain = normal(width), normal(channels), normal(channels)
    angles = _normal(device, torch.float32, rows, channels // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    lengths = [min(512, rows - start) for start in range(0, rows, 512)]
    tiles = AttentionTiles.of(lengths, device)

    def norm() -> dict[str, Tensor]:
        total, y, rstd = block_norm.rms_norm_forward(x, added, gain, eps=1e-6, dtype=dtype)
        found = block_norm.rms_norm_backward(grad, more, total, gain, rstd, added=dtype, want_weight=True)
        return {
            "total": total,
            "y": y,
            **{f"d {place}": part for place, part in enumerate(found) if part is not None},
        }

    def swiglu() -> dict[str, Tensor]:
        return {"h": glu.swiglu_forward(both), "d": glu.swiglu_backward(wide, both, want_hidden=False)[0]}

    def turn() -> dict[str, Tensor]:
        q, k = rope.rotate_forward(
            qkv, q_gain, k_gain, cos, sin, num_heads=heads, num_kv_heads=case.kv_heads, eps=1e-6
        )
        found = rope.rotate_backward(dq, dk, dv, qkv, q_gain, k_gain, cos, sin, eps=1e-6, want_weights=True)
        return {
            "q": q,
            "k": k,
            **{f"d {place}": part for place, part in enumerate(found) if part is not None},
        }

    def attend() -> dict[str, Tensor]:
        out, lse = attention.attend_forward(dq, dk, dv, tiles, window=None)
        found = attention.attend_backward(dq, dq, dk, dv, out, lse, tiles, window=None)
        return {"out": out, "lse": lse, **{f"d {place}": part for place, part in enumerate(found)}}

    steps = {"norm": norm, "glu": swiglu, "rope": turn}
    for part, step in steps.items():
        for way in ("forward", "backward"):
            yield Job(f"block_{part}_{way}", case.name, (dtype.itemsize,), step=step)
    for part in ("", "_queries", "_keys"):
        yield Job(f"block_attention{part}", case.name, (dtype.itemsize,), step=attend)


def _paged(case: Case, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """Prefill the case's rows, then take one token of each; their pages lie in no order."""
    normal = functools.partial(_normal, device, dtype)
    rows, tokens, channels = case.batch, case.tokens, case.channels
    # room for a few pages more, so that even a short sequence may be shared out
    width = max(4, -(-tokens // PAGE))
    number, heads = rows * tokens, case.heads + 2 * case.kv_heads
    qkv, gain = normal(number, heads * channels), normal(channels)
    q = normal(number, case.heads, channels)
    angles = _normal(device, torch.float32, number, channels // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    memory = rows * width, PAGE, case.kv_heads, channels
    memory = normal(*memory), normal(*memory)
    table = torch.randperm(rows * width, device=device).view(rows, width)
    place = torch.arange(tokens, device=device)
    cells = (table[:, place // PAGE] * PAGE + place % PAGE).flatten()
    pages = table.int()
    lengths = torch.full((rows,), tokens, dtype=torch.int32, device=device)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * tokens

    def store() -> dict[str, Tensor]:
        turned = turn_and_store(qkv, gain, gain, cos, sin, *memory, cells, num_heads=case.heads, eps=1e-6)
        return {"q": turned, "keys": memory[0], "values": memory[1]}

    def prefill() -> dict[str, Tensor]:
        return {"out": paged_prefill(q, *memory, pages, lengths, starts, window=None)}

    def decode() -> dict[str, Tensor]:
        return {"out": paged_decode(q[:rows], *memory, pages, lengths, window=None)}

    steps = {"store": store, "prefill": prefill, "decode": decode, "join": decode}
    for part, step in steps.items():
        yield Job(f"paged_{part}", case.name, (dtype.itemsize,), step=step)


def _thin(case: Case, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """An MLP three times as wide inside, on two rows."""
    normal = functools.partial(_normal, device, dtype)
    width = case.heads * case.channels
    stream, mixed, gain = normal(2, width), normal(2, width), normal(width)
    gate_up, down = normal(6 * width, width), normal(width, 3 * width)

    def step() -> dict[str, Tensor]:
        total, hidden = thin.gated_of_sum(stream, mixed, gain, gate_up, eps=1e-6)
        out = thin.product(hidden, down, added=total, out=torch.empty_like(total))
        return {"total": total, "hidden": hidden, "out": out}

    yield Job("thin_product", case.name, (dtype.itemsize,), step=step)


def _divergence(case: Case, dtype: torch.dtype, device: str) -> Iterator[Job]:
    """Compare a chunk's logits, which are float32 whatever the case."""
    rows = min(1024, case.batch * case.tokens)
    student, teacher = (3 * _normal(device, torch.float32, rows, VOCABULARY) for _ in range(2))
    targets = torch.randint(0, VOCABULARY, (rows,), device=device)
    mix = divergence.Mix((divergence.KL, divergence.CE), (0.9, 0.1), (1.0, 1.0), (0.0, 0.0))
    mixture = divergence.Mix((divergence.JSD,), (1.0,), (1.0,), (0.5,))
    factors = torch.randn(rows, device=device)

    def step(mix: divergence.Mix) -> dict[str, Tensor]:
        logits = student.clone()
        values = compare(logits, teacher, targets, mix, grad_dtype=dtype)
        return {"values": values, "d logits": divergence.gradient_in(logits, dtype)}

    def tail() -> dict[str, Tensor]:
        total = log_sum(student)
        return {"total": total, "d logits": spread(student, total, factors, dtype=dtype)}

    yield Job("divergence", case.name, (4,), step=functools.partial(step, mix))
    yield Job("divergence_mixture", case.name, (4,), step=functools.partial(step, mixture))
    for kernel in ("tail_sum", "tail_gradient"):
        yield Job(kernel, case.name, (4,), step=tail)


def _decoding(case: Case, dtype: torch.dtype, device: str) -> Iterator[Job]:
    wide = power_of_2(case.channels)
    shared = case.kv_heads if case.kv_heads != case.heads else max(1, case.heads // 2)
    for kernel, kv_heads in (("decode", case.heads), ("decode_convolution", shared)):
        sizes = DecodeCase("step", 64, case.heads, case.channels, kv_heads)
        step = _decode_step(draw_decode(sizes, device=device, dtype=dtype))
        yield Job(kernel, case.name, (wide, wide, dtype.itemsize, False, False), step=step)


def _decode_step(x: DecodeInputs) -> Callable[[], dict[str, Tensor]]:
    def step() -> dict[str, Tensor]:
        state, history = x.state.clone(), x.conv_state.clone()
        out = decode_step(
            x.qkv,
            x.decay,
            x.beta,
            state,
            rule=Rule("bounded", LOWER_BOUND),
            heads=Heads(x.heads, x.kv_heads, x.kv_heads),
            A_log=x.a_log,
            dt_bias=x.dt_bias,
            convolution=Convolution(x.conv_weight, history, x.conv_bias),
            finish=Finish(x.norm_weight, gate=x.output_gate),
        )
        return {"out": out, "state": state}

    return step

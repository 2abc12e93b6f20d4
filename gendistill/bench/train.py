"""Train one small hybrid several times, on our kernels and on the reference ops, and compare where they end.

Both start from the same weights and see the same batches in the same order. What separates two seeds of one
implementation is the noise that a difference between implementations is held against.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from gendistill.anatomy.full import FULL
from gendistill.anatomy.groups import ParamGroup
from gendistill.anatomy.kda import KDA
from gendistill.bench.tasks import VOCABULARY, TaskStream, draw_batch
from gendistill.config.engine import EngineConfig
from gendistill.config.objectives import CEConfig
from gendistill.config.schema import ScheduleConfig, StageConfig
from gendistill.data.batch import Batch
from gendistill.models import HybridConfig, HybridForCausalLM
from gendistill.paths import RunDir
from gendistill.results.table import ResultRow
from gendistill.teachers.live import LiveTeacher
from gendistill.training.console import TrainingConsole
from gendistill.training.job import StageJob, StageResult
from gendistill.training.log import read_metrics
from gendistill.training.parallel import connect
from gendistill.training.stage import train_stage

Impl = Literal["auto", "reference", "triton"]
_STAGE = "train"
_UNIT = "nats/token"
# no training batch has this seed
_HELDOUT_SEED = 999_983
# 97.5% quantiles of Student's t, by degrees of freedom
_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is trained.

    Attributes:
        steps: Optimizer steps of every run.
        seeds: Runs per implementation; each seed is another start and another order of the data. With ten, two equal
            implementations miss the bar in one of twenty comparisons; with three, in one of three.
        rows, tokens: Of every batch.
        mixers: Kind of every layer.
        hidden_size, heads, kv_heads, head_dim: Of the model.
        lr: Highest learning rate.
        heldout_batches: Scored at the end, the same for every run.
    """

    steps: int = 2000
    seeds: int = 10
    rows: int = 8
    tokens: int = 200
    mixers: tuple[str, ...] = (KDA.kind, FULL.kind) * 2
    hidden_size: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    lr: float = 1e-3
    heldout_batches: int = 12

    def model(self, seed: int, mixers: Sequence[str], impl: Impl = "reference") -> HybridForCausalLM:
        """Make a model with these mixers; the seed alone decides its weights."""
        config = HybridConfig(
            base_model_type="llama",
            vocab_size=VOCABULARY,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_hidden_layers=len(mixers),
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            mixers=list(mixers),
            impl=impl,
        )
        torch.manual_seed(seed)
        return HybridForCausalLM(config)

    def stage(self) -> StageConfig:
        """Describe the training: all parameters, cross-entropy on the data."""
        return StageConfig(
            objective=CEConfig(),
            data="tasks",
            train=tuple(ParamGroup),
            steps=self.steps,
            seq_len=self.tokens,
            batch_size=self.rows,
            micro_batch_size=self.rows,
            lr=self.lr,
            schedule=ScheduleConfig(kind="cosine", warmup=0.05),
            log_every_steps=max(1, self.steps // 40),
            save_every_minutes=1.0,
        )

    def heldout(self) -> list[Batch]:
        """Draw the batches that every run is scored on."""
        return [
            draw_batch(self.rows, self.tokens, seed=(_HELDOUT_SEED, number))
            for number in range(self.heldout_batches)
        ]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Where every run ended.

    Attributes:
        ours, reference: Held-out cross-entropy by seed, in nats per token.
        seconds: Time in steps of one run, by implementation, the median over seeds.
        steps: Of one run.
        labels: Held-out positions that count.
    """

    ours: tuple[float, ...]
    reference: tuple[float, ...]
    seconds: Mapping[str, float]
    steps: int
    labels: int

    @property
    def differences(self) -> tuple[float, ...]:
        """Ours minus the reference, seed by seed."""
        return tuple(one - other for one, other in zip(self.ours, self.reference, strict=True))

    @property
    def difference(self) -> float:
        """Of the means."""
        return statistics.mean(self.differences)

    @property
    def noise(self) -> float:
        """Standard deviation of the reference over seeds."""
        return statistics.stdev(self.reference)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean difference, from its spread over seeds."""
        number = len(self.differences)
        reach = _T[number - 1] * statistics.stdev(self.differences) / number**0.5
        return self.difference - reach, self.difference + reach

    @property
    def within_noise(self) -> bool:
        """Whether the means differ by no more than seeds do."""
        return abs(self.difference) <= self.noise

    def rows(self, names: tuple[str, str]) -> list[ResultRow]:
        """Return rows of a results file."""
        final = f"held-out loss after {self.steps:,} steps"
        seeds = len(self.ours)
        rows = []
        for name, losses in zip(names, (self.ours, self.reference), strict=True):
            for seed, loss in enumerate(losses):
                rows.append(_row(f"{final}, {name}, seed {seed}", loss, _UNIT, n=self.labels))
            rows.append(_row(f"{final}, {name}, mean", statistics.mean(losses), _UNIT, n=seeds))
            deviation = statistics.stdev(losses)
            rows.append(_row(f"standard deviation over seeds, {name}", deviation, _UNIT, n=seeds))
        low, high = self.interval
        note = "seed by seed, same start and same data; the interval is Student's t"
        rows += [
            _row(
                f"mean difference, {names[0]} - {names[1]}",
                self.difference,
                _UNIT,
                n=seeds,
                ci95=(low, high),
                note=note,
            ),
            _row(
                "|difference of the means|",
                abs(self.difference),
                _UNIT,
                bar=self.noise,
                n=seeds,
                note=f"the bar is the standard deviation of {names[1]} over seeds",
            ),
        ]
        rows += [
            _row(f"time of a step, {name}", 1000 * seconds / self.steps, "ms", n=seeds)
            for name, seconds in self.seconds.items()
        ]
        return rows


def _row(name: str, value: float, unit: str, **more: Any) -> ResultRow:
    return ResultRow(name=name, value=value, unit=unit, better="lower", **more)


def comparison_table(found: Comparison, names: tuple[str, str]) -> Table:
    """Lay out the end of every run, and the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("held-out loss")
    for header in (*names, "difference"):
        table.add_column(header, justify="right")
    for seed, values in enumerate(zip(found.ours, found.reference, found.differences, strict=True)):
        table.add_row(f"seed {seed}", *(f"{value:.5f}" for value in values))
    means = statistics.mean(found.ours), statistics.mean(found.reference), found.difference
    table.add_row("mean", *(f"{value:.5f}" for value in means), style="bold")
    deviations = [statistics.stdev(part) for part in (found.ours, found.reference, found.differences)]
    table.add_row("standard deviation", *(f"{value:.5f}" for value in deviations))
    low, high = found.interval
    table.add_row("95% interval", "", "", f"{low:.5f} to {high:.5f}")
    return table


@dataclass(slots=True, kw_only=True)
class TrainBench:
    """Training runs that are alike but for the implementation, and their comparison.

    Attributes:
        folder: Holds a run folder per implementation and seed; what is there is continued.
        setup: What to train.
        impls: Ours, and what it is compared with.
        commit: Of the code; a folder of another one is refused.
        console: Where to print.
        cpu: Train on the CPU even if there is a GPU.
    """

    folder: Path
    setup: Setup = field(default_factory=Setup)
    impls: tuple[Impl, Impl] = ("triton", "reference")
    commit: str | None = None
    console: Console = field(default_factory=lambda: Console(highlight=False))
    cpu: bool = False

    def run(self) -> Comparison:
        """Train every seed on both implementations, in turn, and print where they end.

        Raises:
            StageStopped: Interrupted; the same call continues.
            CheckpointError: The folder holds another comparison.
        """
        heldout = self.setup.heldout()
        losses: dict[str, list[float]] = {impl: [] for impl in self.impls}
        seconds: dict[str, list[float]] = {impl: [] for impl in self.impls}
        for seed in range(self.setup.seeds):
            for impl in self.impls:
                result = self._train(seed, impl, heldout)
                losses[impl].append(result.heldout["student_ce"])
                seconds[impl].append(result.seconds)
                self.console.print(
                    f"{run_name(impl, seed)}: held-out loss {losses[impl][-1]:.4f} after {result.steps:,} steps, "
                    f"{result.seconds:.0f} s, {1000 * result.seconds / result.steps:.1f} ms a step"
                )
        ours, reference = (tuple(losses[impl]) for impl in self.impls)
        found = Comparison(
            ours,
            reference,
            {impl: statistics.median(times) for impl, times in seconds.items()},
            self.setup.steps,
            sum(batch.num_labels for batch in heldout),
        )
        self.console.print(comparison_table(found, self.impls))
        verdict = "met" if found.within_noise else "[red]missed[/]"
        self.console.print(
            f"|difference of the means| {abs(found.difference):.5f}, bar {found.noise:.5f} (standard deviation of "
            f"{self.impls[1]} over {self.setup.seeds} seeds): {verdict}"
        )
        return found

    def _train(self, seed: int, impl: Impl, heldout: Sequence[Batch]) -> StageResult:
        setup = self.setup
        # more seeds may be added to a folder; as JSON, in which it will be read back
        lock = {name: value for name, value in asdict(setup).items() if name != "seeds"}
        lock |= {"mixers": list(setup.mixers), "impl": impl, "commit": self.commit}
        job = StageJob(
            name=_STAGE,
            config=setup.stage(),
            folder=RunDir(self.folder / run_name(impl, seed)).stage(_STAGE),
            seed=seed,
            heldout=heldout,
            heldout_every=max(1, setup.steps // 10),
            lock={"bench": lock},
        )
        return train_stage(
            job,
            student=setup.model(seed, setup.mixers, impl),
            # cross-entropy asks it nothing; held-out scores put it beside the student
            teacher=LiveTeacher(setup.model(seed, ["full"])),
            stream=TaskStream(setup.rows, setup.tokens, seed=seed),
            parallel=connect(EngineConfig(), cpu=self.cpu),
            console=TrainingConsole(console=self.console),
        )


def run_name(impl: str, seed: int) -> str:
    """Name the folder of one run."""
    return f"{impl}-{seed}"


def save_plot(path: Path, folder: Path, impls: Sequence[str] = ("triton", "reference")) -> None:
    """Draw the losses of all runs in a folder, a PNG; only ``metrics.jsonl`` of every run is read."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    from gendistill.report.plots import COLOURS, INK, MUTED, RULE

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        axes = figure.subplots(1, 2)
        for impl, colour, dashes in zip(
            impls, (COLOURS["student"], COLOURS["accent"]), ("-", "--"), strict=True
        ):
            for seed, metrics in enumerate(sorted(folder.glob(f"{impl}-*/stages/{_STAGE}/metrics.jsonl"))):
                rows = read_metrics(metrics)
                label = impl if seed == 0 else None
                look = {"color": colour, "linestyle": dashes, "linewidth": 1.2, "alpha": 0.8, "label": label}
                axes[0].plot([row["step"] for row in rows], [row["loss"] for row in rows], **look)
                scored = [(row["step"], row["heldout"]["student_ce"]) for row in rows if "heldout" in row]
                axes[1].plot(*zip(*scored, strict=True), **look) if scored else None
        for panel, title in zip(axes, ("training loss", "held-out loss"), strict=True):
            panel.set_title(f"{title}, {_UNIT}", loc="left", fontsize=10.5)
            panel.set_xlabel("step")
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(color=RULE, linewidth=0.6)
            panel.tick_params(colors=MUTED, which="both")
        axes[0].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=160, facecolor="white")

"""Check and time the linear divergence at the size of a distillation step, beside eager torch and liger-kernel.

Every contestant gets hidden states and heads in bfloat16 and gives the mean loss and its gradients. Nothing is timed
unless ours is right.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from gendistill.bench import measure
from gendistill.bench.cases import GRAPH, LOSS_BARS, LOSS_ERROR_BAR, MEMORY, TRAIN, LossCase
from gendistill.bench.measure import Step, attempt
from gendistill.bench.rows import Measurement, measurement_table
from gendistill.ops import Divergence, Impl, Term, linear_divergence
from gendistill.results.table import ResultRow

_CHECKED_TOKENS, _REPEATS = 64, 3


class LossInputs(NamedTuple):
    """What a loss gets; all of it counts."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What is differentiated."""
        return [part for part in self[:2] if part.requires_grad]


def draw_loss(case: LossCase, *, device: str, dtype: torch.dtype) -> LossInputs:
    """Draw hidden states, and heads that make logits of size three."""
    torch.manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    D, E, V = case.channels, case.teacher_channels, case.vocabulary
    return LossInputs(
        normal(case.tokens, D).requires_grad_(),
        normal(V, D, scale=3 * D**-0.5).requires_grad_(case.trained),
        normal(case.tokens, E),
        normal(V, E, scale=3 * E**-0.5),
        torch.randint(0, V, (case.tokens,), device=device),
    )


class LossContestant(Protocol):
    """Who computes the loss."""

    label: str

    def mean(self, case: LossCase, x: LossInputs) -> Tensor:
        """Return the mean loss per token, to be differentiated."""
        ...


class Op:
    """Our op, by one of its implementations."""

    def __init__(self, impl: Impl) -> None:
        self.impl = impl
        self.label = {Impl.TRITON: "gendistill", Impl.REFERENCE: f"torch {torch.__version__}"}[impl]

    def mean(self, case: LossCase, x: LossInputs) -> Tensor:
        """As :class:`LossContestant` says."""
        found = linear_divergence(
            x.hidden[None],
            x.weight,
            x.labels[None],
            terms=[Term(Divergence(case.kind))],
            teacher_hidden=x.teacher_hidden[None],
            teacher_weight=x.teacher_weight,
            num_labels=len(x.labels),
            impl=self.impl,
        )
        return found.total / found.count


class Liger:
    """The fused linear Jensen-Shannon divergence of liger-kernel, whose weights 0 and 1 are both KL divergences.

    Raises:
        PackageNotFoundError: It is not installed.
    """

    def __init__(self) -> None:
        self.label = f"liger-kernel {metadata.version('liger-kernel')}"
        self._loss: Any = importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD

    def mean(self, case: LossCase, x: LossInputs) -> Tensor:
        """As :class:`LossContestant` says."""
        beta = {"kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[case.kind]
        every = (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
        # no labels: every position counts
        return self._loss(jsd_beta=beta)(*every, None)


def exact_mean(case: LossCase, x: LossInputs) -> tuple[Tensor, ...]:
    """Compute the loss and its gradients in float64, from the same inputs."""
    wide = x._replace(**{name: getattr(x, name).detach().double() for name in x._fields[:4]})
    for mine, given in zip(wide[:2], x[:2], strict=True):
        mine.requires_grad_(given.requires_grad)
    log_q = (wide.hidden @ wide.weight.T).log_softmax(-1)
    log_p = (wide.teacher_hidden @ wide.teacher_weight.T).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0, dtype=torch.float64).log()
    loss = (
        {
            "kl": lambda: log_p.exp() * (log_p - log_q),
            "reverse_kl": lambda: log_q.exp() * (log_q - log_p),
            "jsd": lambda: (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2,
        }[case.kind]()
        .sum(-1)
        .mean()
    )
    return loss.detach(), *torch.autograd.grad(loss, wide.leaves)


@dataclass(slots=True, kw_only=True)
class LossBench:
    """A run of the cases, and what was measured.

    Attributes:
        cases: What to run, in this order.
        peers: Who else is measured.
        ours: Our kernels.
        dtype, device: Of the inputs.
        budget_s: No case starts later than this.
        console: Where to print.
        save: Called with the rows of everything measured so far, after every case.
    """

    cases: Sequence[LossCase]
    peers: Sequence[LossContestant] = ()
    ours: LossContestant = field(default_factory=lambda: Op(Impl.TRITON))
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    budget_s: float | None = None
    console: Console = field(default_factory=lambda: Console(highlight=False))
    save: Callable[[Sequence[ResultRow]], None] = lambda rows: None
    rows: list[ResultRow] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    def check(self) -> bool:
        """Print how far everybody is from float64; returns whether ours is under the bar and repeats bit by bit."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("error against float64", "loss", "d hidden", "d head", "3 runs"):
            table.add_column(name, justify="left" if name.startswith("error") else "right")
        right = True
        for kind in dict.fromkeys(case.kind for case in self.cases):
            case = next(replace(case, tokens=_CHECKED_TOKENS) for case in self.cases if case.kind == kind)
            x = draw_loss(replace(case, trained=True), device=self.device, dtype=self.dtype)
            exact = exact_mean(case, x)
            for who in (self.ours, *self.peers):
                found, reason = attempt(lambda who=who, case=case, x=x: self._run(who, case, x))
                if reason is not None:
                    self._say(f"{who.label} is not checked: {reason}")
                    right &= who is not self.ours
                    continue
                errors, same = _compare(found, exact)
                good = same and all(error < LOSS_ERROR_BAR for error in errors)
                right &= good or who is not self.ours
                words = [f"{error:.1e}" for error in errors] + ["same bits" if same else "differ"]
                title = f"{kind}, {who.label}"
                red = who is self.ours and not good
                table.add_row(f"[bold red]{title}: RED[/]" if red else title, *words)
                if who is self.ours:
                    names = ("loss", "d hidden", "d head")
                    self.rows += [
                        ResultRow(
                            name=f"{kind}: relative error of {name}",
                            value=error,
                            unit="",
                            better="lower",
                            bar=LOSS_ERROR_BAR,
                            n=None,
                            note=f"{_CHECKED_TOKENS} tokens, against float64 on the same inputs",
                        )
                        for name, error in zip(names, errors, strict=True)
                    ]
        self.console.print(table)
        return right

    def run(self) -> int:
        """Check, then time; returns the exit code."""
        if not self.check():
            self.console.print("[bold red]RED[/]: our loss is not right here, so nothing is timed")
            return 1
        for number, case in enumerate(self.cases):
            spent = time.monotonic() - self._start
            if self.budget_s is not None and spent > self.budget_s:
                left = ", ".join(one.name for one in self.cases[number:])
                self.console.print(f"the budget of {self.budget_s:g} s is spent; left out: {left}")
                break
            self._say(case.name)
            self._time(case)
            self.save(self.rows)
        return 0

    def _run(self, who: LossContestant, case: LossCase, x: LossInputs) -> list[tuple[Tensor, ...]]:
        return [_step(who, case, x)() for _ in range(_REPEATS)]

    def _time(self, case: LossCase) -> None:
        x = draw_loss(case, device=self.device, dtype=self.dtype)
        steps: dict[str, Step] = {}
        for who in (self.ours, *self.peers):
            step = _step(who, case, x)
            reason = attempt(step)[1]
            if reason is None:
                steps[who.label] = step
            else:
                self._say(f"{who.label} is not measured: {reason}")
        times = measure.time_rounds(steps)
        replays = self._replays(steps)
        launched = measure.time_rounds(replays) if replays else {}
        peaks = {label: measure.peak_extra_mib(step) * 2**20 / 1e9 for label, step in steps.items()}
        medians, graphs = (
            {label: timing.median for label, timing in found.items()} for found in (times, launched)
        )
        others = [label for label in steps if label != self.ours.label] or [None]
        for peer in others:
            found = [
                _measurement(case, TRAIN, "ms", medians, self.ours.label, peer, note=_spread(times)),
                _measurement(
                    case, f"{TRAIN}, {GRAPH}", "ms", graphs, self.ours.label, peer, note=_spread(launched)
                ),
                _measurement(case, f"{TRAIN}, {MEMORY}", "GB", peaks, self.ours.label, peer),
            ]
            self.console.print(measurement_table(found, peer))
            self.rows += [row for each in found if (row := each.row(peer)) is not None]

    def _replays(self, steps: Mapping[str, Step]) -> dict[str, Step]:
        """Capture steps as CUDA graphs, as training launches them; returns what launches each that can be captured."""
        if self.device != "cuda":
            return {}
        found, reasons = measure.capture_all(steps)
        for label, reason in reasons.items():
            self._say(f"{label} is not captured: {reason}")
        return found

    def _say(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self._start:6.1f} s[/]  {escape(text)}", soft_wrap=True)


def _step(who: LossContestant, case: LossCase, x: LossInputs) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        loss = who.mean(case, x)
        return loss.detach(), *torch.autograd.grad(loss, x.leaves)

    return step


def _spread(times: Mapping[str, measure.Timing]) -> str:
    return "; ".join(f"{label}: rounds {time.low:.4g} to {time.high:.4g}" for label, time in times.items())


def _compare(runs: Sequence[Sequence[Tensor]], exact: Sequence[Tensor]) -> tuple[list[float], bool]:
    """Return the relative error of every result, and whether repeated runs agree bit by bit."""
    errors = [measure.relative_error(found, right) for found, right in zip(runs[0], exact, strict=True)]
    same = all(torch.equal(*pair) for run in runs[1:] for pair in zip(runs[0], run, strict=True))
    return errors, same


def _measurement(
    case: LossCase,
    quantity: str,
    unit: str,
    values: Mapping[str, float],
    ours: str,
    peer: str | None,
    note: str | None = None,
) -> Measurement:
    return Measurement(
        case=case.name,
        quantity=quantity,
        unit=unit,
        ours=values.get(ours),
        peer=None if peer is None else values.get(peer),
        bar=LOSS_BARS.get((case.name, unit)),
        note=note,
    )

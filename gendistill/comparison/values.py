"""What a comparison finds, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from gendistill.report.gap import Estimate
from gendistill_evals import ProtocolFamily

SCHEMA = 1
ALL_TASKS = "mean of tasks"
LEVEL = 0.05


class Verdict(StrEnum):
    """What the data allow to say of the second model of a pair."""

    BETTER = "better"
    WORSE = "worse"
    WORSE_WITHIN = "worse, by less than the margin"
    EQUIVALENT = "equivalent within the margin"
    NOT_INFERIOR = "not worse by the margin"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class PairScore:
    """Two models on one task under one protocol or metric.

    Attributes:
        first, second: Names.
        task, measure, family: What was scored; the task ``ALL_TASKS`` is the mean over all, each counting once.
        n, num_groups: Items, and what was sampled: questions that share nothing.
        first_score, second_score: In percent.
        gap: Second minus first, in points.
        bootstrap: The percentile interval of the gap by resampling groups, in points.
        gained, lost: Items on which the second is better and worse.
        p, mid_p: Exact McNemar test; signs of whole groups where items share one.
        p_holm: ``p`` adjusted for all tasks of this pair and measure.
        flips: Share of items that differ, in percent.
        flips_floor: The same between two runs of one model: options in another order, or a repeated run; None if that
            was not measured.
        margin: Loss named beforehand, in points.
        not_inferior_p, equivalent_p: One-sided tests at the margin.
        detectable: Smallest difference found with a chance of 80%, in points.
        power: Chance to show at this margin that a model that is as good is not inferior.
        items_needed: Items that would find a difference as large as the one seen with a chance of 80%.
        verdict: What the data allow to say.
    """

    first: str
    second: str
    task: str
    measure: str
    family: ProtocolFamily
    n: int
    num_groups: int
    first_score: Estimate
    second_score: Estimate
    gap: Estimate
    bootstrap: tuple[float, float] | None
    gained: int
    lost: int
    p: float | None
    mid_p: float | None
    p_holm: float | None
    flips: float
    flips_floor: float | None
    margin: float
    not_inferior_p: float | None
    equivalent_p: float | None
    detectable: float | None
    power: float | None
    items_needed: int | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class HiddenGap:
    """How much of a pair's gap under generation log-likelihood does not show.

    Attributes:
        by_likelihood, by_generation: The gaps in points.
        hidden: Gap by generation minus gap by likelihood.
        inverted: Whether the two protocols prefer different models.
        p_inverted: That they do not: the larger of the two p-values of the gaps, adjusted for all tasks; None if
            not inverted.
    """

    first: str
    second: str
    task: str
    likelihood: str
    generation: str
    by_likelihood: float
    by_generation: float
    hidden: Estimate
    inverted: bool
    p_inverted: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether two measures rank more than two models alike.

    Attributes:
        tau: Kendall's tau-b over the models' scores; None where one measure ties all.
        low, high: Its 95% interval by resampling items.
    """

    task: str
    likelihood: str
    generation: str
    tau: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Flip:
    """An item that one of two models gets right and the other does not."""

    first: str
    second: str
    task: str
    measure: str
    id: str
    gained: bool
    prompt: str
    target: str
    first_answer: str
    second_answer: str


def leading(pairs: Sequence[PairScore]) -> list[str]:
    """Choose the first measure of generation, else the first of all; then the same of tasks that lack it."""
    found, left = [], list(pairs)
    while left:
        written = [pair for pair in left if pair.family is ProtocolFamily.GENERATION]
        found.append((written or left)[0].measure)
        covered = {ALL_TASKS, *(pair.task for pair in pairs if pair.measure == found[-1])}
        left = [pair for pair in left if pair.task not in covered]
    return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """All pairs of models on all common tasks.

    Attributes:
        models, sources: Names and places.
        margin: In points.
        pairs: By pair, measure and task.
        hidden, agreement: Where one task was scored under both families of protocols.
        flips: Some items that differ, both ways.
        notes: What a reader must not miss.
    """

    models: tuple[str, ...]
    sources: tuple[str, ...]
    margin: float
    pairs: tuple[PairScore, ...]
    hidden: tuple[HiddenGap, ...]
    agreement: tuple[Agreement, ...]
    flips: tuple[Flip, ...]
    notes: tuple[str, ...]

    @property
    def leads(self) -> list[str]:
        """The measures that headline and gates speak of, so that no task is passed over."""
        written = {pair.task for pair in self.pairs if pair.family is ProtocolFamily.GENERATION}
        # the same items as ``written`` has: one task under two protocols
        twins = {task for task in self.tasks for other in written if self.are_twins(task, other)}
        return leading([pair for pair in self.pairs if pair.task not in twins])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(dict.fromkeys(pair.task for pair in self.pairs if pair.task != ALL_TASKS))

    def are_twins(self, ranked: str, written: str) -> bool:
        """Whether two tasks have the same items, ranked in one and written in the other."""
        return any(each.task == f"{ranked} / {written}" for each in self.hidden)

    def of(self, first: str, second: str, measure: str) -> list[PairScore]:
        """List the tasks of one pair under one measure, their mean last."""
        return [
            pair for pair in self.pairs if (pair.first, pair.second, pair.measure) == (first, second, measure)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``compare.json``."""
        return {"schema": SCHEMA, **asdict(self)}

"""Compare models pair by pair: gaps, flips, margins, what the items could show, and where protocols disagree."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import combinations
from typing import Any

import numpy as np

from gendistill.comparison.load import Scores, TaskScores
from gendistill.comparison.matching import check_comparable, common_tasks
from gendistill.errors import RecipeError
from gendistill_evals import ProtocolFamily, power, stats

SCHEMA = 1
ALL_TASKS = "mean of tasks"
LEVEL = 0.05
_SHOWN_FLIPS = 6
_MOST_FLIPS = 40


class Verdict(StrEnum):
    """What the data allow to say of the second model of a pair."""

    BETTER = "better"
    WORSE = "worse"
    WORSE_WITHIN = "worse, by less than the margin"
    EQUIVALENT = "equivalent within the margin"
    NOT_INFERIOR = "not worse by the margin"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score in percent, or a difference in percentage points, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


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
        by_likelihood, by_generation: The gaps in points, and p-values of their McNemar tests.
        hidden: Gap by generation minus gap by likelihood.
        inverted: Whether the two protocols prefer different models.
        p_inverted: That they do not: the larger of the two one-sided p-values, adjusted for all tasks; None if
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
    def lead(self) -> str | None:
        """The measure that the headline speaks of: the first of generation, else the first of all."""
        written = [pair.measure for pair in self.pairs if pair.family is ProtocolFamily.GENERATION]
        return next(iter(written or [pair.measure for pair in self.pairs]), None)

    def of(self, first: str, second: str, measure: str) -> list[PairScore]:
        """List the tasks of one pair under one measure, their mean last."""
        return [
            pair for pair in self.pairs if (pair.first, pair.second, pair.measure) == (first, second, measure)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``compare.json``."""
        return {"schema": SCHEMA, **asdict(self)}


def compare(
    models: Sequence[Scores],
    *,
    tasks: Collection[str] | None = None,
    measures: Collection[str] | None = None,
    margin: float = 2.5,
    again: Scores | None = None,
    other_prompts: bool = False,
) -> Comparison:
    """Compare every pair of models on the items that all of them answered.

    Args:
        models: Two or more, the one to compare with first.
        tasks: Names; None for all that the models have in common.
        measures: Protocols or metrics; None for all, which every model must have.
        margin: Loss that would matter, in points, chosen before looking.
        again: A second run of the first model, for the noise floor of flips.
        other_prompts: Whether models may have been asked differently, each through a chat template of its own.
    Raises:
        ReportError: The models were not scored on the same items in the same way; says how they differ.
    """
    names, notes = common_tasks(models, tasks)
    kept = {task: check_comparable(models, task, measures, other_prompts=other_prompts) for task in names}
    notes += [note for _, found in kept.values() for note in found]
    chosen = {task: found for task, (found, _) in kept.items() if found}
    if not chosen:
        has = ", ".join(dict.fromkeys(name for task in names for name in models[0].tasks[task].measures))
        raise RecipeError(
            f"no task was scored under {', '.join(measures or ())}; there are: {has}", where="--protocol"
        )
    names = list(chosen)
    floors = _floors(models, chosen, again)
    pairs: list[PairScore] = []
    hidden: list[HiddenGap] = []
    shown: list[Flip] = []
    for first, second in combinations(models, 2):
        for measure in dict.fromkeys(one for found in chosen.values() for one in found):
            scored = [task for task in names if measure in chosen[task]]
            by_task = [_score(first, second, task, measure, margin, floors) for task in scored]
            pairs += _with_mean(_adjusted(by_task), margin)
            shown += [flip for task in scored for flip in _flips(first, second, task, measure)]
        hidden += _hidden(first, second, chosen)
    agreement = _agreement(models, chosen) if len(models) > 2 else []
    return Comparison(
        models=tuple(scores.name for scores in models),
        sources=tuple(scores.source for scores in models),
        margin=margin,
        pairs=tuple(pairs),
        hidden=tuple(hidden),
        agreement=tuple(agreement),
        flips=tuple(shown[:_MOST_FLIPS]),
        notes=tuple(notes),
    )


def _groups(task: TaskScores) -> tuple[str, ...] | None:
    return task.groups if len(set(task.groups)) < len(task.groups) else None


def _score(
    first: Scores,
    second: Scores,
    task: str,
    measure: str,
    margin: float,
    floors: dict[tuple[str, str], float],
) -> PairScore:
    scores = first.tasks[task]
    before, after = (model.tasks[task].measures[measure].values for model in (first, second))
    groups = _groups(scores)
    difference = after - before
    gap = stats.gap(before, after, groups=groups)
    resampled = stats.paired_bootstrap(difference, groups=groups)
    tested = stats.flips(before, after, groups=groups)
    inferior = stats.non_inferiority(difference, margin / 100, groups=groups)
    equal = stats.equivalence(difference, margin / 100, groups=groups)
    # The share of items that differ; of fractions, the flips that would scatter as much.
    flipped = max(float((difference**2).mean()), 1 / (2 * len(difference)))
    worth = len(difference) if groups is None else _worth(gap, difference)
    return PairScore(
        first=first.name,
        second=second.name,
        task=task,
        measure=measure,
        family=scores.measures[measure].family,
        n=len(difference),
        num_groups=len(set(scores.groups)),
        first_score=_points(stats.accuracy(before, groups=groups)),
        second_score=_points(stats.accuracy(after, groups=groups)),
        gap=_points(gap),
        bootstrap=(100 * resampled.low, 100 * resampled.high),
        gained=tested.gained,
        lost=tested.lost,
        p=tested.p,
        mid_p=tested.mid_p,
        p_holm=tested.p,
        flips=100 * (tested.gained + tested.lost) / len(difference),
        flips_floor=floors.get((task, measure)),
        margin=margin,
        not_inferior_p=inferior.p,
        equivalent_p=equal.p,
        detectable=100 * power.detectable(flipped=flipped, n=worth),
        power=power.non_inferiority_power(margin / 100, flipped=flipped, n=worth),
        items_needed=power.items_needed(gap.value, flipped=flipped),
        verdict=Verdict.UNDECIDED,
    )


def _worth(gap: stats.Interval, difference: np.ndarray) -> float:
    """How many independent items scatter as much as grouped ones, seen from the width of their interval."""
    alone = stats.mean_interval(difference, bounds=(-1, 1))
    return len(difference) * min(1.0, ((alone.high - alone.low) / (gap.high - gap.low)) ** 2)


def _adjusted(pairs: Sequence[PairScore]) -> list[PairScore]:
    adjusted = stats.holm([pair.p for pair in pairs if pair.p is not None])
    with_p = [replace(pair, p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]
    return [replace(pair, verdict=_verdict(pair)) for pair in with_p]


def _verdict(pair: PairScore) -> Verdict:
    """Say what a pair's tests allow; better and worse after Holm's adjustment."""
    within = pair.not_inferior_p is not None and pair.not_inferior_p < LEVEL
    differs = pair.p_holm < LEVEL if pair.p_holm is not None else pair.gap.excludes_zero
    if differs and pair.gap.value:
        if pair.gap.value > 0:
            return Verdict.BETTER
        return Verdict.WORSE_WITHIN if within else Verdict.WORSE
    if pair.equivalent_p is not None and pair.equivalent_p < LEVEL:
        return Verdict.EQUIVALENT
    return Verdict.NOT_INFERIOR if within else Verdict.UNDECIDED


def _with_mean(pairs: Sequence[PairScore], margin: float) -> list[PairScore]:
    """Add the mean over tasks, whose errors add in quadrature; it has no McNemar test."""
    if len(pairs) < 2:
        return list(pairs)
    gap = _mean([pair.gap for pair in pairs])
    # Each half of the interval gives the standard error on its side.
    normal = stats.NORMAL
    below, above = ((gap.value - gap.low) / 1.959964, (gap.high - gap.value) / 1.959964)
    not_inferior = normal.cdf(-(gap.value + margin) / below)
    not_superior = normal.cdf(-(margin - gap.value) / above)
    error = (below + above) / 2
    mean = PairScore(
        first=pairs[0].first,
        second=pairs[0].second,
        task=ALL_TASKS,
        measure=pairs[0].measure,
        family=pairs[0].family,
        n=sum(pair.n for pair in pairs),
        num_groups=sum(pair.num_groups for pair in pairs),
        first_score=_mean([pair.first_score for pair in pairs]),
        second_score=_mean([pair.second_score for pair in pairs]),
        gap=gap,
        bootstrap=None,
        gained=sum(pair.gained for pair in pairs),
        lost=sum(pair.lost for pair in pairs),
        p=None,
        mid_p=None,
        p_holm=None,
        flips=100 * sum(pair.gained + pair.lost for pair in pairs) / sum(pair.n for pair in pairs),
        flips_floor=None,
        margin=margin,
        not_inferior_p=not_inferior,
        equivalent_p=max(not_inferior, not_superior),
        detectable=(normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * error,
        power=normal.cdf(margin / error - normal.inv_cdf(0.95)),
        items_needed=None,
        verdict=Verdict.UNDECIDED,
    )
    return [*pairs, replace(mean, verdict=_verdict(mean))]


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    found = stats.mean_of([stats.Interval(each.value, each.low, each.high, each.n) for each in estimates])
    return Estimate(found.value, found.low, found.high, found.n)


def _hidden(first: Scores, second: Scores, chosen: dict[str, dict[str, ProtocolFamily]]) -> list[HiddenGap]:
    found: list[tuple[HiddenGap, float]] = []
    for task, ranked, written in _both_families(first, chosen):
        scores = first.tasks[ranked[0]]
        groups = _groups(scores)
        values = [
            model.tasks[name].measures[measure].values
            for name, measure in (ranked, written)
            for model in (first, second)
        ]
        hidden = stats.hidden_gap(
            teacher_likelihood=values[0],
            student_likelihood=values[1],
            teacher_generation=values[2],
            student_generation=values[3],
            groups=groups,
        )
        gaps = float((values[1] - values[0]).mean()), float((values[3] - values[2]).mean())
        tests = (
            stats.flips(values[0], values[1], groups=groups),
            stats.flips(values[2], values[3], groups=groups),
        )
        # Both one-sided hypotheses have to fall, so the larger p-value counts.
        p = max(test.p / 2 for test in tests)
        found.append(
            (
                HiddenGap(
                    first=first.name,
                    second=second.name,
                    task=task,
                    likelihood=ranked[1],
                    generation=written[1],
                    by_likelihood=100 * gaps[0],
                    by_generation=100 * gaps[1],
                    hidden=_points(hidden),
                    inverted=math.prod(gaps) < 0,
                    p_inverted=None,
                ),
                p,
            )
        )
    inverted = [p for each, p in found if each.inverted]
    adjusted = iter(stats.holm(inverted))
    return [replace(each, p_inverted=next(adjusted)) if each.inverted else each for each, _ in found]


def _both_families(
    model: Scores, chosen: dict[str, dict[str, ProtocolFamily]]
) -> list[tuple[str, tuple[str, str], tuple[str, str]]]:
    """List the items scored under both families: tasks with two protocols, and pairs of tasks with the same items."""
    ranked, written = (
        {
            task: next(name for name, family in found.items() if family is wanted)
            for task, found in chosen.items()
            if wanted in found.values()
        }
        for wanted in (ProtocolFamily.LIKELIHOOD, ProtocolFamily.GENERATION)
    )
    both = [(task, (task, ranked[task]), (task, written[task])) for task in ranked if task in written]
    # lm-eval scores a task in one way: its twin is another task with the same questions.
    twins = {
        tuple(one[:64] for one in model.tasks[task].items): task for task in written if task not in ranked
    }
    for task in ranked:
        if task not in written and (twin := twins.get(tuple(one[:64] for one in model.tasks[task].items))):
            both.append((f"{task} / {twin}", (task, ranked[task]), (twin, written[twin])))
    return both


def _agreement(models: Sequence[Scores], chosen: dict[str, dict[str, ProtocolFamily]]) -> list[Agreement]:
    found = []
    for task, ranked, written in _both_families(models[0], chosen):
        columns = np.column_stack(
            [
                model.tasks[name].measures[measure].values
                for name, measure in (ranked, written)
                for model in models
            ]
        )
        means = columns.mean(axis=0)
        tau = stats.kendall_tau(means[: len(models)], means[len(models) :])
        drawn = stats.resampled_means(columns, groups=_groups(models[0].tasks[ranked[0]]), resamples=1000)
        taus = [stats.kendall_tau(row[: len(models)], row[len(models) :]) for row in drawn]
        known = [each for each in taus if each is not None]
        low, high = np.percentile(known, [2.5, 97.5]) if tau is not None and known else (None, None)
        found.append(
            Agreement(
                task,
                ranked[1],
                written[1],
                tau,
                None if low is None else float(low),
                None if high is None else float(high),
            )
        )
    return found


def _floors(
    models: Sequence[Scores], chosen: dict[str, dict[str, ProtocolFamily]], again: Scores | None
) -> dict[tuple[str, str], float]:
    """Measure how often one model disagrees with itself, in percent of the items."""
    floors = {}
    for task, found in chosen.items():
        for measure in found:
            known = [
                floor
                for model in models
                if (floor := model.tasks[task].measures[measure].flips_floor) is not None
            ]
            if known:
                floors[task, measure] = 100 * max(known)
    if again is not None:
        shared = [task for task in chosen if task in again.tasks]
        _, _ = common_tasks([models[0], again], shared or None)
        for task in shared:
            found, _ = check_comparable([models[0], again], task, chosen[task], other_prompts=False)
            for measure in found:
                values = [model.tasks[task].measures[measure].values for model in (models[0], again)]
                floors[task, measure] = 100 * float((values[0] != values[1]).mean())
    return floors


def _flips(first: Scores, second: Scores, task: str, measure: str) -> list[Flip]:
    """Read the first items that differ, as many lost ones as gained ones where there are."""
    before, after = (model.tasks[task].measures[measure] for model in (first, second))
    difference = after.values - before.values
    places = [
        place
        for way in (difference < 0, difference > 0)
        for place in np.flatnonzero(way)[: _SHOWN_FLIPS // 2].tolist()
    ]
    found = []
    for place in places:
        one, other = before.example(place), after.example(place)
        found.append(
            Flip(
                first=first.name,
                second=second.name,
                task=task,
                measure=measure,
                id=first.tasks[task].ids[place],
                gained=bool(difference[place] > 0),
                prompt=_cut(one.prompt, keep_end=True),
                target=_cut(one.target),
                first_answer=_cut(one.answer),
                second_answer=_cut(other.answer),
            )
        )
    return found


def _cut(text: str, *, longest: int = 1500, keep_end: bool = False) -> str:
    """Shorten a long text; of prompts with examples, the question is at the end."""
    if len(text) <= longest:
        return text
    return f"… {text[-longest:]}" if keep_end else f"{text[:longest]} …"


def _points(interval: stats.Interval) -> Estimate:
    return Estimate(100 * interval.value, 100 * interval.low, 100 * interval.high, interval.n)

"""Compare models pair by pair: gaps, flips, margins, what the items could show, and where protocols disagree."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import combinations, zip_longest

import numpy as np

from gendistill.comparison.load import Scores, TaskScores
from gendistill.comparison.matching import check_comparable, common_tasks
from gendistill.comparison.values import (
    ALL_TASKS,
    LEVEL,
    Agreement,
    Comparison,
    Estimate,
    Flip,
    HiddenGap,
    PairScore,
    Verdict,
)
from gendistill.errors import RecipeError, ReportError
from gendistill.text import printable
from gendistill_evals import ProtocolFamily, power, stats

_SHOWN_FLIPS = 6
_MOST_FLIPS = 40
_ENDS = ("value", "low", "high")


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
    # what is true of several tasks is said once
    notes += dict.fromkeys(note for _, found in kept.values() for note in found)
    chosen = {task: found for task, (found, _) in kept.items() if found}
    if unknown := set(measures or ()).difference(*chosen.values()):
        has = ", ".join(dict.fromkeys(name for task in names for name in models[0].tasks[task].measures))
        reasons = {name: why for task in names for name, why in models[0].tasks[task].unusable.items()}
        shown = ", ".join(
            printable(f"{name} ({reasons[name]})" if name in reasons else name) for name in sorted(unknown)
        )
        raise RecipeError(
            f"no task was scored under {shown}; there are: {printable(has) or 'none'}", where="--protocol"
        )
    if not chosen:
        raise ReportError(
            "nothing can be compared item by item: " + "; ".join(notes), hint="compare other tasks"
        )
    if measures and (without := [task for task in names if task not in chosen]):
        notes.append(f"left out, because not scored under {', '.join(measures)}: {', '.join(without)}")
    names = list(chosen)
    floors = _floors(models, chosen, again)
    pairs: list[PairScore] = []
    hidden: list[HiddenGap] = []
    flipped: list[list[Flip]] = []
    for first, second in combinations(models, 2):
        for measure in dict.fromkeys(one for found in chosen.values() for one in found):
            scored = [task for task in names if measure in chosen[task]]
            by_task = [_score(first, second, task, measure, margin, floors) for task in scored]
            pairs += _with_mean(_adjusted(by_task), margin, _sharing(first, scored))
            flipped += [_flips(first, second, task, measure) for task in scored]
        hidden += _hidden(first, second, chosen)
    agreement = _agreement(models, chosen) if len(models) > 2 else []
    return Comparison(
        models=tuple(scores.name for scores in models),
        sources=tuple(scores.source for scores in models),
        margin=margin,
        pairs=tuple(pairs),
        hidden=tuple(hidden),
        agreement=tuple(agreement),
        flips=tuple(_some_of_each(flipped)),
        notes=tuple(notes),
    )


def _groups(task: TaskScores) -> tuple[str, ...] | None:
    found = len(set(task.groups))
    if found == 1 < len(task.groups):
        raise ReportError(
            f"all {len(task.groups):,} items share one question, from which nothing can be said about others",
            where=task.where,
            hint="score items of more questions, or group by another field",
        )
    return task.groups if found < len(task.groups) else None


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
    needed = power.items_needed(gap.value, flipped=flipped)
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
        items_needed=needed and math.ceil(needed * len(difference) / worth),
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


def _sharing(model: Scores, tasks: Sequence[str]) -> list[list[int]]:
    """Put tasks together, by place, that have items in common."""
    found: list[tuple[set[str], list[int]]] = []
    for place, task in enumerate(tasks):
        items, places = set(_questions(model.tasks[task])), [place]
        for other in [other for other in found if not items.isdisjoint(other[0])]:
            found.remove(other)
            items, places = items | other[0], other[1] + places
        found.append((items, places))
    return [places for _, places in found]


def _questions(task: TaskScores) -> tuple[str, ...]:
    """Tell items apart by what is asked: in lm-eval, whatever the answer is held against."""
    return tuple(item[:64] for item in task.items)


def _with_mean(
    pairs: Sequence[PairScore], margin: float, sharing: Sequence[Sequence[int]]
) -> list[PairScore]:
    """Add the mean over tasks; it has no McNemar test.

    Args:
        pairs: Of one measure, by task.
        margin: In points.
        sharing: Places of tasks that have items in common.
    """
    if len(pairs) < 2:
        return list(pairs)
    gap = _mean([pair.gap for pair in pairs], sharing)
    # Each half of the interval gives the standard error on its side; at the end of the scale there is none.
    normal = stats.NORMAL
    below, above = (max(half, 1e-9) / 1.959964 for half in (gap.value - gap.low, gap.high - gap.value))
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
        first_score=_mean([pair.first_score for pair in pairs], sharing),
        second_score=_mean([pair.second_score for pair in pairs], sharing),
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


def _mean(estimates: Sequence[Estimate], sharing: Sequence[Sequence[int]]) -> Estimate:
    """Average over tasks: errors add in quadrature, those of tasks with common items as they are."""
    sums = [
        stats.Interval(
            *(math.fsum(getattr(estimates[place], name) for place in places) for name in _ENDS), n=0
        )
        for places in sharing
    ]
    found, share = stats.mean_of(sums), len(sums) / len(estimates)
    return Estimate(
        share * found.value, share * found.low, share * found.high, sum(each.n for each in estimates)
    )


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
        # Both gaps have to be real, so the larger p-value counts.
        p = max(test.p for test in tests)
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
    twins = {_questions(model.tasks[task]): task for task in written if task not in ranked}
    for task in ranked:
        if task not in written and (twin := twins.get(_questions(model.tasks[task]))):
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
        if again.source == models[0].source:
            raise RecipeError(
                f"{again.source} is the first model's own result, which differs from itself nowhere",
                where="--again",
                hint="score the first model once more, as with another seed, into another folder",
            )
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
    lost, gained = (
        np.flatnonzero(way)[: _SHOWN_FLIPS // 2].tolist() for way in (difference < 0, difference > 0)
    )
    places = [place for pair in zip_longest(lost, gained) for place in pair if place is not None]
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


def _some_of_each(found: Sequence[Sequence[Flip]]) -> list[Flip]:
    """Take as many of every pair, measure and task as fit, in their order."""
    kept = [0] * len(found)
    for rank in range(_SHOWN_FLIPS):
        for place, flips in enumerate(found):
            if rank < len(flips) and sum(kept) < _MOST_FLIPS:
                kept[place] += 1
    return [flip for flips, count in zip(found, kept, strict=True) for flip in flips[:count]]


def _cut(text: str, *, longest: int = 1500, keep_end: bool = False) -> str:
    """Shorten a long text; of prompts with examples, the question is at the end."""
    if len(text) <= longest:
        return text
    return f"… {text[-longest:]}" if keep_end else f"{text[:longest]} …"


def _points(interval: stats.Interval) -> Estimate:
    return Estimate(100 * interval.value, 100 * interval.low, 100 * interval.high, interval.n)

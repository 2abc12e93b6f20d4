"""Intervals and tests for paired scores. Imports no torch.

A gap is student minus teacher, so that a loss is negative; the hidden gap is the generation gap
minus the likelihood gap: what log-likelihood does not show.

Every interval of a mean is a score interval: it holds the means that a score test does not reject, with the variance
of the likeliest distribution that has such a mean. Of right and wrong answers it is Wilson's interval, of paired
differences Tango's, of differences of differences the same rule with five values. It never collapses to a point: 24
items that all agree leave room for others that do not. Where items share a group, groups are what was sampled: the
number of items shrinks to the number of independent ones that would scatter as much. How much groups scatter is itself
an estimate. A score interval allows for that where groups are hardly more than single items; where they are large the
quantile is Student's, and between the two its degrees of freedom grow as groups get smaller.
``tests/evals/coverage.py`` prints how often these intervals hold the truth, beside those of other methods.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Values = Sequence[float] | Sequence[bool] | np.ndarray
Groups = Sequence[Hashable] | np.ndarray | None

NORMAL = NormalDist()
RESAMPLES = 2000
_STEPS = 60
# Resamples of items with many different values are drawn in blocks of about this many, which bounds memory.
_BLOCK_ITEMS = 4_000_000
# Distinct rows up to which resamples are drawn as counts of each, which is the same and far faster.
_MOST_DISTINCT = 512
# Up to this total size of all groups, the signs of groups are flipped exactly.
_LONGEST_SUMS = 2_000_000
# Groups whose items have this many others beside them give twice Student's degrees of freedom: chosen by simulation,
# with the groups of 1 to 5 and of 10 to 30 items that ``tests/evals/coverage.py`` draws.
_OTHERS = 6.0
# Degrees of freedom from which Student's distribution is taken for the normal one.
_NORMAL_FROM = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over items with its interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Flips:
    """Items on which two models differ, and whether that many more one way could be chance.

    Attributes:
        gained: Items on which the second is better.
        lost: Items on which it is worse.
        p: Two-sided exact p-value that both are equally good: McNemar's test; of grouped items, all signs of groups
            flipped.
        mid_p: The same, counting half of the probability of what was seen, which is less conservative.
    """

    gained: int
    lost: int
    p: float
    mid_p: float


@dataclass(frozen=True, slots=True)
class Bound:
    """A one-sided test of a mean against a margin.

    Attributes:
        p: That the mean is at or beyond the margin.
        shown: Whether p is below the level.
    """

    p: float
    shown: bool


def accuracy(correct: Values, *, groups: Groups = None, confidence: float = 0.95) -> Interval:
    """Estimate the share of items answered correctly.

    Args:
        correct: One truth value or number in [0, 1] per item.
        groups: What each item was sampled with; None if every item stands for itself.
        confidence: Coverage of the interval.
    Raises:
        ValueError: No items, numbers outside [0, 1], or groups of other items.
    """
    return mean_interval(correct, bounds=(0.0, 1.0), groups=groups, confidence=confidence)


def gap(teacher: Values, student: Values, *, groups: Groups = None, confidence: float = 0.95) -> Interval:
    """Estimate student minus teacher on the same items.

    Args:
        teacher: The teacher's correctness, one per item.
        student: The student's, in the same order.
        groups, confidence: As for ``accuracy``.
    Raises:
        ValueError: The two differ in length.
    """
    return mean_interval(
        _differences(teacher, student), bounds=(-1.0, 1.0), groups=groups, confidence=confidence
    )


def hidden_gap(
    *,
    teacher_likelihood: Values,
    student_likelihood: Values,
    teacher_generation: Values,
    student_generation: Values,
    groups: Groups = None,
    confidence: float = 0.95,
) -> Interval:
    """Estimate the generation gap minus the likelihood gap on the same items.

    Args:
        teacher_likelihood, student_likelihood: Correctness under log-likelihood, one per item.
        teacher_generation, student_generation: Correctness under generation, in the same order.
        groups, confidence: As for ``accuracy``.
    Raises:
        ValueError: The four differ in length.
    """
    by_generation = _differences(teacher_generation, student_generation)
    by_likelihood = _differences(teacher_likelihood, student_likelihood)
    difference = _differences(by_likelihood, by_generation)
    # Items that count twice are rare: the bound grows to two only where there are some.
    reach = max(1.0, float(np.abs(difference).max(initial=0.0)))
    return mean_interval(difference, bounds=(-reach, reach), groups=groups, confidence=confidence)


def mean_interval(
    values: Values, *, bounds: tuple[float, float], groups: Groups = None, confidence: float = 0.95
) -> Interval:
    """Estimate the mean of bounded numbers by the score interval.

    Args:
        values: One number per item.
        bounds: The least and the greatest number that an item can have.
        groups, confidence: As for ``accuracy``.
    Returns: Mean with its interval, which has a width even if all numbers are equal.
    Raises:
        ValueError: No items, numbers that are not finite or out of bounds, or groups of other items.
    Source: Wilson 1927 for two values, Tango 1998 for three; the likeliest distribution with a given mean is that of
        Owen's empirical likelihood, with a point of support at each bound.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"need 0 < confidence < 1, got {confidence}")
    sample = _sample(values, bounds, groups)
    critical = sample.quantile(0.5 + confidence / 2)
    low, high = (sample.limit(critical, side=side) for side in (-1, 1))
    return Interval(sample.mean, low, high, sample.n)


def mean_of(intervals: Sequence[Interval]) -> Interval:
    """Average estimates of tasks that share no items: each counts once, and errors add in quadrature.

    Raises:
        ValueError: No estimates.
    Source: Zou and Donner 2008 (MOVER), which takes every half of an interval by itself.
    """
    if not intervals:
        raise ValueError("need at least one estimate")
    value = math.fsum(each.value for each in intervals) / len(intervals)
    below = math.hypot(*(each.value - each.low for each in intervals)) / len(intervals)
    above = math.hypot(*(each.high - each.value for each in intervals)) / len(intervals)
    return Interval(value, value - below, value + above, sum(each.n for each in intervals))


def non_inferiority(
    differences: Values, margin: float, *, groups: Groups = None, level: float = 0.05
) -> Bound:
    """Test that a mean difference is above ``-margin``: that the second model is not worse by the margin or more.

    Args:
        differences: Second minus first, in [-1, 1], one per item.
        margin: Loss that would matter, in the unit of the differences, above 0; chosen before looking.
        groups: As for ``accuracy``.
        level: Of the one-sided test.
    Raises:
        ValueError: As for ``mean_interval``, or a margin that is not in (0, 1).
    Source: Tango 1998; for grouped items with the effective number of items.
    """
    return _beyond(differences, margin, side=-1, groups=groups, level=level)


def equivalence(differences: Values, margin: float, *, groups: Groups = None, level: float = 0.05) -> Bound:
    """Test that a mean difference lies inside ``(-margin, margin)``: two one-sided tests, both at the level.

    Args:
        differences, margin, groups, level: As for ``non_inferiority``.
    """
    sides = [_beyond(differences, margin, side=side, groups=groups, level=level) for side in (-1, 1)]
    p = max(each.p for each in sides)
    return Bound(p, p < level)


def flips(first: Values, second: Values, *, groups: Groups = None) -> Flips:
    """Count the items on which two models differ, and test exactly whether both ways are equally likely.

    Args:
        first, second: Correctness of each model, one per item in the same order.
        groups: As for ``accuracy``. The signs of whole groups are flipped; without groups this is McNemar's test.
    Returns: Counts and p-values; 1.0 where the two never differ.
    Raises:
        ValueError: The two differ in length.
    """
    difference = _differences(first, second)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    codes = _codes(groups, difference.size)
    sums = difference if codes is None else np.bincount(codes, weights=difference)
    tail, point = _sign_flips(sums)
    balanced = abs(float(sums.sum())) < 1e-9
    mid_p = 1 - point / 2 if balanced else 2 * tail - point
    return Flips(gained, lost, min(1.0, 2 * tail), min(1.0, mid_p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several tests so that each may be held against the level of all together.

    Source: Holm 1979.
    """
    adjusted = [0.0] * len(p_values)
    reached = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = reached
    return adjusted


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Measure how far two scores rank the same models alike, from -1 to 1.

    Returns: Kendall's tau-b, which allows for ties; None where one of them ties all.
    Raises:
        ValueError: The two differ in length.
    """
    signs = [np.sign(np.subtract.outer(values, values)) for values in (np.asarray(first), np.asarray(second))]
    if signs[0].shape != signs[1].shape:
        raise ValueError(f"need the scores of the same models, got {len(first)} and {len(second)}")
    untied = math.sqrt(float((signs[0] ** 2).sum()) * float((signs[1] ** 2).sum()))
    return float((signs[0] * signs[1]).sum()) / untied if untied else None


def paired_bootstrap(
    values: Values,
    *,
    groups: Groups = None,
    bounds: tuple[float, float] = (-1.0, 1.0),
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate a mean by resampling items, or groups of items, with the percentile interval.

    A paired comparison is the same thing on per-item differences: each resample then draws every model's and
    protocol's score of the same items. From few items the percentile interval is too narrow (about 90% for 95% at 24
    items); ``mean_interval`` is not.

    Args:
        values, groups: As for ``mean_interval``.
        bounds: As for ``mean_interval``, which gives the interval where no resample can differ.
        resamples: Bootstrap resamples.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the resampling; equal seeds give equal intervals.
    Raises:
        ValueError: No items, or numbers that are not finite.
    """
    items = _finite(values)
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"need resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence}")
    means = resampled_means(items[:, None], groups=groups, resamples=resamples, seed=seed)[:, 0]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    if means.min() == means.max():
        return mean_interval(items, bounds=bounds, groups=groups, confidence=confidence)
    return Interval(float(items.mean()), float(low), float(high), int(items.size))


def resampled_means(
    columns: np.ndarray, *, groups: Groups = None, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Draw items or groups with replacement and average each column over what was drawn.

    Args:
        columns: ``[items, columns]``, any scores of the same items.
        groups: As for ``accuracy``.
        resamples: How often.
        seed: Of the drawing.
    Returns: ``[resamples, columns]`` float64.
    Raises:
        ValueError: No items, or groups of other items.
    """
    if columns.ndim != 2 or not columns.size:
        raise ValueError(f"need items and columns, got shape {columns.shape}")
    codes = _codes(groups, len(columns))
    rows = np.column_stack([columns, np.ones(len(columns))]).astype(np.float64)
    if codes is not None:
        rows = np.column_stack([np.bincount(codes, weights=column) for column in rows.T])
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    if len(distinct) <= _MOST_DISTINCT:
        sums = generator.multinomial(len(rows), counts / len(rows), size=resamples) @ distinct
    else:
        sums = np.empty((resamples, rows.shape[1]))
        block = max(1, _BLOCK_ITEMS // len(rows))
        for start in range(0, resamples, block):
            chosen = generator.integers(0, len(rows), size=(min(block, resamples - start), len(rows)))
            for column in range(rows.shape[1]):
                sums[start : start + len(chosen), column] = rows[:, column][chosen].sum(axis=1)
    return sums[:, :-1] / sums[:, -1:]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Distinct values with their shares, and how many independent items they are worth."""

    values: np.ndarray
    shares: np.ndarray
    mean: float
    bounds: tuple[float, float]
    n: int
    worth: float
    degrees: int | None

    def quantile(self, p: float) -> float:
        return NORMAL.inv_cdf(p) if self.degrees is None else _student_quantile(p, self.degrees)

    def limit(self, critical: float, *, side: int) -> float:
        """Find the mean on one side that a score test just does not reject."""
        path = self._path(side)
        if path is None:
            return self.bounds[(side + 1) // 2]
        low, high = 0.0, 2.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            away, variance = path(middle)
            if away * away * self.worth <= critical * critical * variance:
                low = middle
            else:
                high = middle
        return self.mean + side * path(low)[0]

    def score(self, mean: float) -> float:
        """Compute the score statistic of a mean: how many standard errors what was seen lies above it."""
        side = 1 if mean > self.mean else -1
        path = self._path(side)
        if path is None or mean == self.mean:
            return 0.0
        low, high = 0.0, 2.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if path(middle)[0] < abs(mean - self.mean):
                low = middle
            else:
                high = middle
        away, variance = path(low)
        return -side * away * math.sqrt(self.worth / variance) if variance > 0 else -side * math.inf

    def _path(self, side: int):
        """Walk the likeliest distributions whose mean is further and further to one side; None at the bound.

        With weights ``share / (1 + tilt * value)`` the mean moves from that of the sample (0) until a bound where
        nothing was seen would gain likelihood (1); from there mass moves onto that bound (1 to 2).
        """
        values = side * (self.values - self.mean)
        end = side * (self.bounds[(side + 1) // 2] - self.mean)
        if end <= 0:
            return None

        def walk(at: float) -> tuple[float, float]:
            denominators = np.maximum(1 - min(at, 1.0) / end * values, 1e-15)
            weights = self.shares / denominators
            weights = weights / weights.sum()
            away, square = float(weights @ values), float(weights @ values**2)
            moved = max(at - 1, 0.0)
            away, square = (1 - moved) * away + moved * end, (1 - moved) * square + moved * end * end
            return away, square - away * away

        return walk


def _sample(values: Values, bounds: tuple[float, float], groups: Groups) -> _Sample:
    items = _finite(values)
    low, high = bounds
    if items.min() < low or items.max() > high:
        raise ValueError(
            f"every item needs a number from {low:g} to {high:g}, got {items.min():g} to {items.max():g}"
        )
    distinct, counts = np.unique(items, return_counts=True)
    # rounding puts the mean of equal fractions beside them
    mean = float(np.clip(items.mean(), distinct[0], distinct[-1]))
    codes = _codes(groups, items.size)
    worth, degrees = float(items.size), None
    if codes is not None:
        num_groups = int(codes.max()) + 1
        if num_groups < 2:
            raise ValueError("all items share one group, from which nothing can be said about others")
        sums = np.bincount(codes, weights=items - mean)
        between = float(sums @ sums) * num_groups / (num_groups - 1)
        alone = float(((items - mean) ** 2).sum())
        # Few groups may by chance scatter less than single items would: they are never worth twice the items.
        worth = min(2 * worth, worth * alone / between) if between > 0 and alone > 0 else float(num_groups)
        sizes = np.bincount(codes)
        others = float((sizes * (sizes - 1)).sum()) / items.size
        degrees = int((num_groups - 1) * (1 + (_OTHERS / others) ** 2))
    return _Sample(distinct, counts / items.size, mean, bounds, int(items.size), worth, degrees)


def _beyond(differences: Values, margin: float, *, side: int, groups: Groups, level: float) -> Bound:
    if not 0 < margin < 1:
        raise ValueError(f"need a margin above 0 and below 1, got {margin}")
    sample = _sample(differences, (-1.0, 1.0), groups)
    score = -side * sample.score(side * margin)
    p = NORMAL.cdf(-score) if sample.degrees is None else 1 - _student_cdf(score, sample.degrees)
    return Bound(p, p < level)


def _sign_flips(sums: np.ndarray) -> tuple[float, float]:
    """Compute the probability that a sum with random signs is at or beyond the one seen, and that it is equal to it."""
    sizes = np.abs(sums[sums != 0])
    if not sizes.size:
        return 0.5, 0.0
    seen = abs(float(sums.sum()))
    whole = np.rint(sizes).astype(np.int64)
    if np.allclose(sizes, whole, atol=1e-9) and whole.sum() <= _LONGEST_SUMS:
        masses = np.ones(1)
        for size, count in zip(*np.unique(whole, return_counts=True), strict=True):
            steps = np.zeros(int(size) * int(count) + 1)
            steps[:: int(size)] = _fair_coins(int(count))
            masses = np.convolve(masses, steps)
        # ``masses[k]``: that the sizes of the groups turned positive add up to k.
        least = (int(whole.sum()) + round(seen)) // 2
        return float(masses[least:].sum()), float(masses[least])
    generator = np.random.default_rng(0)
    drawn = np.concatenate([generator.choice((-1.0, 1.0), size=(500, sizes.size)) @ sizes for _ in range(40)])
    # One more than was drawn, or a p-value could be zero.
    return (float((np.abs(drawn) >= seen - 1e-9).sum()) + 1) / (drawn.size + 1) / 2, 0.0


def _fair_coins(count: int) -> np.ndarray:
    """Compute the probabilities of 0 to ``count`` heads."""
    logs = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    return np.exp(logs[-1] - logs - logs[::-1] - count * math.log(2))


def _student_cdf(t: float, degrees: int) -> float:
    """Compute Student's distribution function for a whole number of degrees of freedom, by its finite sum."""
    if degrees > _NORMAL_FROM:
        return NORMAL.cdf(t)
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, total, term = math.cos(angle), 0.0, 1.0
    if degrees % 2:
        term = math.cos(angle)
        for k in range(1, degrees - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        return 0.5 + (angle + math.sin(angle) * total) / math.pi
    for k in range(0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return 0.5 + math.sin(angle) * total / 2


def _student_quantile(p: float, degrees: int) -> float:
    if degrees > _NORMAL_FROM:
        return NORMAL.inv_cdf(p)
    low, high = 0.0, 1e6
    for _ in range(2 * _STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < p else (low, middle)
    return high


def _codes(groups: Groups, num_items: int) -> np.ndarray | None:
    """Number the groups of the items; None if each item is its own."""
    if groups is None:
        return None
    if len(groups) != num_items:
        raise ValueError(f"need a group for each of {num_items} items, got {len(groups)}")
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return None if len(numbers) == num_items else codes


def _finite(values: Values) -> np.ndarray:
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or items.size == 0:
        raise ValueError(f"need one number per item and at least one item, got shape {items.shape}")
    if not np.isfinite(items).all():
        raise ValueError("every item needs a finite number")
    return items


def _differences(first: Values, second: Values) -> np.ndarray:
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"the scores must cover the same items, got {before.shape} and {after.shape}")
    return after - before

"""Intervals for paired scores. Imports no torch.

A gap is student minus teacher, so that a loss is negative; the hidden gap is the generation gap
minus the likelihood gap: what log-likelihood does not show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[float] | Sequence[bool] | np.ndarray

# Resamples are drawn in blocks of about this many items, which bounds memory for long tasks.
_BLOCK_ITEMS = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over items with its percentile-bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


def paired_bootstrap(
    values: Values, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate the mean of one number per item by resampling items.

    A paired comparison is the same thing on per-item differences: each resample then draws every model's and
    protocol's score of the same items.

    Args:
        values: One number per item: correctness, or a difference of correctness.
        resamples: Bootstrap resamples.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the resampling; equal seeds give equal intervals.
    Returns: Mean with its interval. Equal values give an interval of width zero.
    Raises:
        ValueError: No items, or numbers that are not finite.
    """
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or items.size == 0:
        raise ValueError(f"need one number per item and at least one item, got shape {items.shape}")
    if not np.isfinite(items).all():
        raise ValueError("every item needs a finite number")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"need resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence}")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK_ITEMS // items.size)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        chosen = generator.integers(0, items.size, size=(stop - start, items.size))
        means[start:stop] = items[chosen].mean(axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(items.mean()), float(low), float(high), int(items.size))


def accuracy(correct: Values, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Estimate the share of items answered correctly.

    Args:
        correct: One truth value per item.
        resamples: Bootstrap resamples.
        confidence: Coverage of the interval.
        seed: Seed of the resampling.
    """
    return paired_bootstrap(correct, resamples=resamples, confidence=confidence, seed=seed)


def gap(
    teacher: Values, student: Values, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate student minus teacher on the same items.

    Args:
        teacher: The teacher's correctness, one per item.
        student: The student's, in the same order.
        resamples: Bootstrap resamples.
        confidence: Coverage of the interval.
        seed: Seed of the resampling.
    Raises:
        ValueError: The two differ in length.
    """
    difference = _differences(teacher, student)
    return paired_bootstrap(difference, resamples=resamples, confidence=confidence, seed=seed)


def hidden_gap(
    *,
    teacher_likelihood: Values,
    student_likelihood: Values,
    teacher_generation: Values,
    student_generation: Values,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate the generation gap minus the likelihood gap, resampling the same items for all four scores.

    Args:
        teacher_likelihood, student_likelihood: Correctness under log-likelihood, one per item.
        teacher_generation, student_generation: Correctness under generation, in the same order.
        resamples: Bootstrap resamples.
        confidence: Coverage of the interval.
        seed: Seed of the resampling.
    Raises:
        ValueError: The four differ in length.
    """
    by_generation = _differences(teacher_generation, student_generation)
    by_likelihood = _differences(teacher_likelihood, student_likelihood)
    difference = _differences(by_likelihood, by_generation)
    return paired_bootstrap(difference, resamples=resamples, confidence=confidence, seed=seed)


def sign_test(teacher: Values, student: Values) -> float:
    """Compute the two-sided exact p-value that teacher and student are equally good (exact McNemar test).

    Args:
        teacher: The teacher's correctness, one per item.
        student: The student's, in the same order.
    Returns: Probability, over the items where the two differ, of a split at least this uneven under fair
        coins; 1.0 when they never differ.
    Raises:
        ValueError: The two differ in length.
    """
    difference = _differences(teacher, student)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    flips, tail = better + worse, min(better, worse)
    at_most = sum(math.comb(flips, k) for k in range(tail + 1))
    # Integers until the last step: 2.0**flips overflows beyond a thousand flips.
    return min(1.0, 2 * at_most / 2**flips)


def _differences(first: Values, second: Values) -> np.ndarray:
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"the scores must cover the same items, got {before.shape} and {after.shape}")
    return after - before

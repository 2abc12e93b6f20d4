"""How much of what the teacher gets right the student keeps. Imports no torch.

The ratio's interval is Fieller's: ratios r for which the mean of student - r * teacher is not told from zero. It is
unbounded where the teacher itself is not told from its floor, and then there is no estimate. Before that half an item
of each of the four outcomes is added, as Agresti and Min do for paired proportions, so that equal items do not give an
interval without width.

Sources: E. C. Fieller, "Some problems in interval estimation", JRSS B 16 (1954); A. Agresti and Y. Min, "Simple
improved confidence intervals for comparing matched proportions", Statistics in Medicine 24 (2005).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gendistill_evals import stats

_Z95 = 1.959964
_PSEUDO = 0.5


@dataclass(frozen=True, slots=True)
class PairedMeans:
    """Two paired means above a floor, with what is known of their errors.

    Attributes:
        teacher, student: The means.
        teacher_smoothed, student_smoothed: With the pseudo-items.
        teacher_variance, student_variance, covariance: Of the smoothed means.
        n: Items.
        num_groups: Of items that err together.
        scores: ``[n, 2]``, teacher and student above the floor, item by item.
        groups: What each item errs together with, as numbers.
    """

    teacher: float
    student: float
    teacher_smoothed: float
    student_smoothed: float
    teacher_variance: float
    student_variance: float
    covariance: float
    n: int
    num_groups: int
    scores: np.ndarray = field(repr=False, compare=False)
    groups: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Student over teacher, 1 keeps everything, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def paired_means(
    teacher: Sequence[float],
    student: Sequence[float],
    *,
    floor: Sequence[float] | None = None,
    groups: Sequence[str] | None = None,
) -> PairedMeans:
    """Average two models' scores on the same items above a floor.

    Args:
        teacher, student: Scores from 0 to 1, one per item; at least one item.
        floor: What a guess scores, one per item; zero if None.
        groups: Items of one group err together; every item is its own if None.
    Raises:
        ValueError: The lists differ in length or are empty.
    """
    size = len(teacher)
    floor = [0.0] * size if floor is None else floor
    names = [str(item) for item in range(size)] if groups is None else list(groups)
    if not size or not size == len(student) == len(floor) == len(names):
        raise ValueError(
            f"need scores of the same items, at least one; got {size}, {len(student)}, {len(floor)}, {len(names)}"
        )
    base = float(np.mean(floor))
    scores = (
        np.column_stack([teacher, student]).astype(np.float64) - np.asarray(floor, dtype=np.float64)[:, None]
    )
    outcomes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float64) - base
    weights = np.concatenate([np.ones(size), np.full(4, _PSEUDO)])
    everything = np.concatenate([scores, outcomes])
    means = weights @ everything / weights.sum()
    _, members = np.unique(np.array(names), return_inverse=True)
    num_groups = int(members.max()) + 1
    with_pseudo = np.concatenate([members, num_groups + np.arange(4)])
    sums = np.zeros((num_groups + 4, 2))
    np.add.at(sums, with_pseudo, weights[:, None] * (everything - means))
    # two pseudo-items count as two groups more
    small = (num_groups + 2) / (num_groups + 1)
    covariance = small * (sums.T @ sums) / weights.sum() ** 2
    return PairedMeans(
        teacher=float(scores[:, 0].mean()),
        student=float(scores[:, 1].mean()),
        teacher_smoothed=float(means[0]),
        student_smoothed=float(means[1]),
        teacher_variance=float(covariance[0, 0]),
        student_variance=float(covariance[1, 1]),
        covariance=float(covariance[0, 1]),
        n=size,
        num_groups=num_groups,
        scores=scores,
        groups=members,
    )


def retention(parts: Sequence[PairedMeans]) -> Ratio | None:
    """Divide the student's mean over tasks by the teacher's, each task counting once.

    Args:
        parts: One per task; tasks share no items. At least one.
    Returns: None where the teacher is not told from its floor: the ratio could then be anything.
    """
    count = len(parts)
    teacher, student = (
        math.fsum(getattr(part, name) for part in parts) / count
        for name in ("teacher_smoothed", "student_smoothed")
    )
    of_teacher, of_student, of_both = (
        math.fsum(getattr(part, name) for part in parts) / count**2
        for name in ("teacher_variance", "student_variance", "covariance")
    )
    whole = math.fsum(part.teacher for part in parts)
    deviate = _student_t95(sum(part.num_groups for part in parts) + count)
    blur = deviate**2 * of_teacher / teacher**2 if teacher > 0 else math.inf
    if blur >= 1 or whole <= 0:
        return None
    ratio = student / teacher
    middle = (ratio - blur * of_both / of_teacher) / (1 - blur)
    spread = of_student - 2 * ratio * of_both + ratio**2 * of_teacher
    spread -= blur * (of_student - of_both**2 / of_teacher)
    half = deviate * math.sqrt(max(spread, 0.0)) / (teacher * (1 - blur))
    value = math.fsum(part.student for part in parts) / whole
    low, high = min(value, middle - half), max(value, middle + half)
    return Ratio(value, low, high, sum(part.n for part in parts))


def bootstrapped(parts: Sequence[PairedMeans], *, resamples: int = stats.RESAMPLES) -> Ratio | None:
    """Estimate the same ratio with the percentile interval of the paired bootstrap.

    Groups of items are drawn within each task, teacher and student together; equal parts give equal intervals.

    Args:
        parts: As for ``retention``.
        resamples: How often to draw, at least 1.
    Returns: None where the teacher does not come out above its floor in every resample.
    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    drawn = np.mean(
        [
            stats.resampled_means(part.scores, groups=part.groups, resamples=resamples, seed=place)
            for place, part in enumerate(parts)
        ],
        axis=0,
    )
    whole = math.fsum(part.teacher for part in parts)
    if whole <= 0 or drawn[:, 0].min() <= 0:
        return None
    low, high = np.percentile(drawn[:, 1] / drawn[:, 0], [2.5, 97.5])
    value = math.fsum(part.student for part in parts) / whole
    return Ratio(value, float(low), float(high), sum(part.n for part in parts))


def _student_t95(freedom: int) -> float:
    """The two-sided 95% quantile of Student's t, by its expansion in 1 / freedom; within 0.01 from 4 degrees on."""
    z = _Z95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3

"""What a number of items can show: power, detectable differences and items needed of paired tests. Imports no torch."""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()
_STEPS = 60


def power(difference: float, *, flipped: float, n: float, level: float = 0.05) -> float:
    """Compute the probability that the two-sided McNemar test finds a difference.

    Args:
        difference: True difference of the two shares of right answers.
        flipped: Share of items on which the two models differ; taken as the difference if that is larger.
        n: Items.
        level: Of the test.
    Source: Miettinen 1968, the normal approximation.
    """
    difference = abs(difference)
    flipped = min(1.0, max(flipped, difference))
    spread = math.sqrt(max(flipped - difference**2, 1e-12))
    critical = _NORMAL.inv_cdf(1 - level / 2)
    return _NORMAL.cdf((math.sqrt(n) * difference - critical * math.sqrt(flipped)) / spread)


def detectable(*, flipped: float, n: float, level: float = 0.05, chance: float = 0.8) -> float:
    """Find the smallest difference that the two-sided McNemar test finds with a chance.

    Args:
        flipped, n, level: As for ``power``.
        chance: Probability to find it.
    Returns: The difference, at most 1.
    """
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if power(middle, flipped=flipped, n=n, level=level) < chance:
            low = middle
        else:
            high = middle
    return high


def items_needed(
    difference: float, *, flipped: float, level: float = 0.05, chance: float = 0.8
) -> int | None:
    """Find how many items the two-sided McNemar test needs to find a difference with a chance; None for no difference.

    Args:
        difference, flipped, level: As for ``power``.
        chance: Probability to find it.
    """
    difference = abs(difference)
    if not difference:
        return None
    flipped = min(1.0, max(flipped, difference))
    needed = _NORMAL.inv_cdf(1 - level / 2) * math.sqrt(flipped)
    needed += _NORMAL.inv_cdf(chance) * math.sqrt(max(flipped - difference**2, 0.0))
    return math.ceil((needed / difference) ** 2)


def non_inferiority_power(margin: float, *, flipped: float, n: float, level: float = 0.05) -> float:
    """Compute the probability that non-inferiority is shown of a model that is in truth as good.

    Args:
        margin: Loss that would matter, as a share of the items.
        flipped, n: As for ``power``.
        level: Of the one-sided test.
    """
    scale = math.sqrt(max(flipped, 1e-12))
    return _NORMAL.cdf(margin * math.sqrt(n) / scale - _NORMAL.inv_cdf(1 - level))

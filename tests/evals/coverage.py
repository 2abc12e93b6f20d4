"""Print how often intervals that should hold the truth in 95% of samples do: ``python tests/evals/coverage.py``.

Every sample has a truth of its own, drawn anew: shares of right answers, flips and their balance as one meets them.
(At one fixed truth, few items give a handful of outcomes, and the coverage of any method jumps from one truth to the
next.) Rows: quantity, method, items, coverage in percent, mean width in points.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np

from gendistill_evals.stats import Interval, accuracy, mean_interval, paired_bootstrap

# values, groups or None, truth
Draw = tuple[np.ndarray, np.ndarray | None, float]
SIZES = (24, 50, 100, 200, 500, 1000)


def draw_accuracy(generator: np.random.Generator, n: int) -> Draw:
    """Draw right and wrong answers."""
    truth = generator.uniform(0.15, 0.95)
    return (generator.random(n) < truth).astype(float), None, truth


def draw_gap(generator: np.random.Generator, n: int) -> Draw:
    """Draw paired differences: 8 to 40% of the items flip, 20 to 80% of them one way."""
    flipped, share = generator.uniform(0.08, 0.4), generator.uniform(0.2, 0.8)
    masses = [flipped * (1 - share), 1 - flipped, flipped * share]
    return generator.choice([-1.0, 0.0, 1.0], size=n, p=masses), None, flipped * (2 * share - 1)


def draw_hidden_gap(generator: np.random.Generator, n: int) -> Draw:
    """Draw the difference of two paired differences, that of generation with more flips than that of likelihood."""
    values, truth = np.zeros(n), 0.0
    for sign, most in ((1, 0.4), (-1, 0.2)):
        flipped, share = generator.uniform(0.06, most), generator.uniform(0.2, 0.8)
        masses = [flipped * (1 - share), 1 - flipped, flipped * share]
        values += sign * generator.choice([-1.0, 0.0, 1.0], size=n, p=masses)
        truth += sign * flipped * (2 * share - 1)
    return values, None, truth


def draw_grouped_gap(generator: np.random.Generator, n: int) -> Draw:
    """Draw differences of questions asked in one to five forms, which a third of the questions share."""
    flipped, share = generator.uniform(0.08, 0.4), generator.uniform(0.2, 0.8)
    masses = [flipped * (1 - share), 1 - flipped, flipped * share]
    num_groups = max(2, n // 3)
    sizes = generator.integers(1, 6, size=num_groups)
    groups = np.repeat(np.arange(num_groups), sizes)
    own = generator.choice([-1.0, 0.0, 1.0], size=groups.size, p=masses)
    shared = generator.choice([-1.0, 0.0, 1.0], size=num_groups, p=masses)[groups]
    values = np.where((generator.random(num_groups) < 1 / 3)[groups], shared, own)
    return values, groups, flipped * (2 * share - 1)


def draw_large_groups(generator: np.random.Generator, num_groups: int) -> Draw:
    """Draw differences of groups of 10 to 30 items, of which up to 70% take the value of their group."""
    flipped, share, alike = (
        generator.uniform(0.08, 0.4),
        generator.uniform(0.2, 0.8),
        generator.uniform(0, 0.7),
    )
    masses = [flipped * (1 - share), 1 - flipped, flipped * share]
    groups = np.repeat(np.arange(num_groups), generator.integers(10, 31, size=num_groups))
    own = generator.choice([-1.0, 0.0, 1.0], size=groups.size, p=masses)
    shared = generator.choice([-1.0, 0.0, 1.0], size=num_groups, p=masses)[groups]
    return np.where(generator.random(groups.size) < alike, shared, own), groups, flipped * (2 * share - 1)


def score(values: np.ndarray, groups: np.ndarray | None, reach: float) -> Interval:
    """Estimate as the package does."""
    if reach == 0:
        return accuracy(values, groups=groups)
    reach = max(reach, float(np.abs(values).max()))
    return mean_interval(values, bounds=(-reach, reach), groups=groups)


def percentile(values: np.ndarray, groups: np.ndarray | None, reach: float) -> Interval:
    """Estimate by resampling."""
    return paired_bootstrap(values, groups=groups, bounds=(-max(reach, 2.0), 2.0), resamples=500)


def normal(values: np.ndarray, groups: np.ndarray | None, reach: float) -> Interval:
    """Estimate with the standard error, as lm-eval reports it; knows no groups."""
    error = 1.959964 * values.std(ddof=1) / np.sqrt(values.size)
    return Interval(values.mean(), values.mean() - error, values.mean() + error, values.size)


QUANTITIES: dict[str, tuple[Callable[[np.random.Generator, int], Draw], float]] = {
    "accuracy": (draw_accuracy, 0.0),
    "gap": (draw_gap, 1.0),
    "hidden gap": (draw_hidden_gap, 1.0),
    "gap of grouped items": (draw_grouped_gap, 1.0),
}
METHODS = {"score": score, "percentile bootstrap": percentile, "normal": normal}


def coverage(quantity: str, method: str, n: int, *, samples: int, seed: int = 0) -> tuple[float, float]:
    """Compute how often intervals hold the truth, and how wide they are on average.

    Args:
        quantity: Name in ``QUANTITIES``.
        method: Name in ``METHODS``.
        n: Items, about.
        samples: How many to draw.
        seed: Of the drawing.
    """
    draw, reach = QUANTITIES[quantity]
    generator = np.random.default_rng([seed, n])
    held, width = 0, 0.0
    for _ in range(samples):
        values, groups, truth = draw(generator, n)
        found = METHODS[method](values, groups, reach)
        held += found.low <= truth <= found.high
        width += found.high - found.low
    return held / samples, width / samples


def main() -> None:
    """Print a row for each quantity, method and number of items."""
    parser = argparse.ArgumentParser(description="Measure the coverage of 95%% intervals.")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for quantity in QUANTITIES:
        for method in METHODS:
            for n in SIZES:
                share, width = coverage(quantity, method, n, samples=arguments.samples)
                row = {"quantity": quantity, "method": method, "n": n, "samples": arguments.samples}
                row |= {"coverage_percent": round(100 * share, 2), "width_points": round(100 * width, 2)}
                print(json.dumps(row) if arguments.json else "\t".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()

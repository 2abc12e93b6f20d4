"""Intervals hold the truth as often as they say, from 24 items on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

_SPEC = importlib.util.spec_from_file_location(
    "coverage_by_simulation", Path(__file__).with_name("coverage.py")
)
simulation = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(simulation)


@pytest.mark.parametrize("quantity", simulation.QUANTITIES)
@pytest.mark.parametrize("n", [24, 200])
def test_intervals_cover_roughly(quantity, n):
    """600 samples: a standard error of 0.9 points beside the 93 to 97% that the slow test asks for."""
    share, _ = simulation.coverage(quantity, "score", n, samples=600)
    assert 0.92 <= share <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("quantity", simulation.QUANTITIES)
@pytest.mark.parametrize("n", simulation.SIZES)
def test_intervals_cover(quantity, n):
    share, _ = simulation.coverage(quantity, "score", n, samples=8000)
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize("num_groups", [4, 8])
def test_intervals_of_few_large_groups_allow_for_what_is_not_known_about_groups(num_groups):
    """The normal quantile would hold 91% of the truths."""
    generator, held = np.random.default_rng(num_groups), 0
    for _ in range(600):
        values, groups, truth = simulation.draw_large_groups(generator, num_groups)
        found = simulation.score(values, groups, 1.0)
        held += found.low <= truth <= found.high
    assert held / 600 >= 0.94


def test_the_simulation_can_tell_a_method_that_fails():
    share, _ = simulation.coverage("gap", "percentile bootstrap", 24, samples=1000)
    assert share < 0.93

from __future__ import annotations

import math

import numpy as np
import pytest

from gendistill_evals.stats import accuracy, gap, hidden_gap, paired_bootstrap, sign_test


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(3).random(200) < 0.7


def test_a_model_has_no_gap_to_itself(scores):
    same = gap(scores, scores)
    assert (same.value, same.low, same.high, same.n) == (0.0, 0.0, 0.0, 200)
    other = np.roll(scores, 7)
    hidden = hidden_gap(
        teacher_likelihood=scores,
        student_likelihood=scores,
        teacher_generation=other,
        student_generation=other,
    )
    assert (hidden.value, hidden.low, hidden.high) == (0.0, 0.0, 0.0)


def test_a_loss_is_negative_and_hidden_by_likelihood(scores):
    broken = np.zeros_like(scores)
    loss = gap(scores, broken)
    assert loss.value == -scores.mean()
    assert loss.high < 0
    hidden = hidden_gap(
        teacher_likelihood=scores,
        student_likelihood=scores,
        teacher_generation=scores,
        student_generation=broken,
    )
    assert hidden == loss


def test_equal_seeds_give_equal_intervals(scores):
    assert accuracy(scores, seed=1) == accuracy(scores, seed=1)
    assert accuracy(scores, seed=1) != accuracy(scores, seed=2)


def test_the_interval_has_the_width_of_the_normal_approximation(scores):
    interval = accuracy(scores, resamples=4000)
    assert interval.value == scores.mean()
    expected = 2 * 1.96 * math.sqrt(scores.var() / scores.size)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.1)


def test_a_wider_confidence_contains_the_narrower(scores):
    narrow, wide = accuracy(scores, confidence=0.5), accuracy(scores, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_cancels_what_both_models_share(scores):
    student = scores.copy()
    student[:6] = ~student[:6]
    paired = gap(scores, student)
    alone = accuracy(student)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_blocks_of_resamples_change_nothing(scores, monkeypatch):
    whole = accuracy(scores, resamples=300)
    monkeypatch.setattr("gendistill_evals.stats._BLOCK_ITEMS", 1000)
    assert accuracy(scores, resamples=300) == whole


@pytest.mark.parametrize("values", [[], [[1.0, 0.0]], [1.0, math.nan]])
def test_scores_that_are_no_scores_are_refused(values):
    with pytest.raises(ValueError):
        paired_bootstrap(values)


def test_scores_of_different_items_cannot_be_compared():
    with pytest.raises(ValueError, match="same items"):
        gap([True, False], [True])


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (1, 0, 1.0), (0, 5, 0.0625), (2, 8, 0.109375), (5, 5, 1.0)]
)
def test_sign_test_matches_exact_binomial_tails(better, worse, p):
    teacher = [False] * better + [True] * worse + [True, False]
    student = [True] * better + [False] * worse + [True, False]
    assert sign_test(teacher, student) == pytest.approx(p)


def test_sign_test_survives_thousands_of_flips():
    assert 0 <= sign_test([True] * 5000, [False] * 5000) < 1e-300

"""Laws of the statistics, and agreement with scipy and statsmodels on random tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as reference
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired

from gendistill_evals import power, stats
from gendistill_evals.stats import accuracy, flips, gap, hidden_gap, mean_interval, paired_bootstrap


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(3).random(200) < 0.7


def paired(gained: int, lost: int, same: int) -> np.ndarray:
    return np.array([1.0] * gained + [-1.0] * lost + [0.0] * same)


# intervals


def test_a_model_has_no_gap_to_itself_and_a_finite_sample_still_leaves_room(scores):
    same = gap(scores, scores)
    assert (same.value, same.n) == (0.0, 200)
    # the score bound of no flip among n items: z^2 / (n + z^2)
    room = 1.959964**2 / (200 + 1.959964**2)
    assert (same.low, same.high) == pytest.approx((-room, room), abs=1e-6)
    other = np.roll(scores, 7)
    hidden = hidden_gap(
        teacher_likelihood=scores,
        student_likelihood=scores,
        teacher_generation=other,
        student_generation=other,
    )
    assert hidden == same
    test = flips(scores, scores)
    assert (test.gained, test.lost, test.p, test.mid_p) == (0, 0, 1.0, 1.0)


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


@pytest.mark.parametrize("value", [-1.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("num_items", [1, 2, 24, 1000])
@pytest.mark.parametrize("grouped", [False, True])
def test_no_interval_collapses(value, num_items, grouped):
    groups = [index // 2 for index in range(num_items)] if grouped and num_items > 2 else None
    found = mean_interval([value] * num_items, bounds=(-1, 1), groups=groups)
    assert found.value == value
    assert -1 <= found.low <= value <= found.high <= 1
    assert found.high - found.low > 1 / num_items
    resampled = paired_bootstrap([value] * num_items, groups=groups)
    assert resampled == found


@pytest.mark.parametrize("n", [7, 24, 63, 100, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_shares_have_wilsons_interval(n, confidence):
    generator = np.random.default_rng(n)
    for right in (0, n, *generator.integers(0, n + 1, size=8)):
        found = accuracy([True] * right + [False] * (n - right), confidence=confidence)
        low, high = proportion_confint(right, n, alpha=1 - confidence, method="wilson")
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def tango_statistic(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's statistic, with the likelihood maximised numerically instead of by a formula."""

    def minus_log_likelihood(q: float) -> float:
        p, same = q + difference, 1 - 2 * q - difference
        terms = ((gained, p), (lost, q), (n - gained - lost, same))
        return -sum(count * math.log(max(mass, 1e-300)) for count, mass in terms if count)

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    q = optimize.minimize_scalar(
        minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-13}
    ).x
    variance = (2 * q + difference - difference**2) / n
    return ((gained - lost) / n - difference) / math.sqrt(variance)


@pytest.mark.parametrize(
    ("gained", "lost", "same"), [(3, 1, 20), (5, 12, 33), (1, 9, 90), (40, 25, 435), (0, 6, 18)]
)
def test_paired_differences_have_tangos_interval_and_test(gained, lost, same):
    n = gained + lost + same
    found = mean_interval(paired(gained, lost, same), bounds=(-1, 1))
    for end, sign in ((found.low, 1), (found.high, -1)):
        assert tango_statistic(gained, lost, n, end) == pytest.approx(sign * 1.959964, abs=1e-4)
    for margin in (0.02, 0.1):
        test = stats.non_inferiority(paired(gained, lost, same), margin)
        assert test.p == pytest.approx(reference.norm.sf(tango_statistic(gained, lost, n, -margin)), abs=1e-5)


def test_any_values_have_the_interval_of_constrained_likelihood():
    """The bound of five values, with the distribution found by a general optimiser."""
    support = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    counts = np.array([2, 7, 70, 12, 4])
    values = np.repeat(support, counts)
    found = mean_interval(values, bounds=(-2, 2))
    for end in (found.low, found.high):
        fitted = optimize.minimize(
            lambda mass: -counts @ np.log(mass),
            counts / counts.sum(),
            method="SLSQP",
            bounds=[(1e-9, 1)] * 5,
            constraints=[
                {"type": "eq", "fun": lambda mass: mass.sum() - 1},
                {"type": "eq", "fun": lambda mass, end=end: mass @ support - end},
            ],
            options={"ftol": 1e-13, "maxiter": 500},
        ).x
        variance = fitted @ support**2 - end**2
        score = (found.value - end) / math.sqrt(variance / found.n)
        assert abs(score) == pytest.approx(1.96, abs=0.005)


def test_a_wider_confidence_contains_the_narrower(scores):
    narrow, wide = accuracy(scores, confidence=0.5), accuracy(scores, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_cancels_what_both_models_share(scores):
    student = scores.copy()
    student[:6] = ~student[:6]
    paired_gap = gap(scores, student)
    alone = accuracy(student)
    assert paired_gap.high - paired_gap.low < 0.6 * (alone.high - alone.low)


def test_order_of_items_and_names_of_groups_are_irrelevant(scores):
    student, groups = np.roll(scores, 3), np.arange(200) // 4
    order = np.random.default_rng(0).permutation(200)
    before = gap(scores, student, groups=groups)
    after = gap(scores[order], student[order], groups=[f"q{group}" for group in groups[order]])
    assert (before.low, before.high) == pytest.approx((after.low, after.high), abs=1e-12)
    assert gap(scores, student, groups=range(200)) == gap(scores, student)


def test_copies_of_items_say_no_more_than_the_items(scores):
    """Each question four times: the interval is that of the questions, where items alone would halve it."""
    student = np.roll(scores, 3)
    single = gap(scores, student)
    copies = gap(np.repeat(scores, 4), np.repeat(student, 4), groups=np.repeat(np.arange(200), 4))
    assert copies.value == single.value
    assert copies.high - copies.low == pytest.approx(single.high - single.low, rel=0.02)
    blind = gap(np.repeat(scores, 4), np.repeat(student, 4))
    assert blind.high - blind.low == pytest.approx((single.high - single.low) / 2, rel=0.02)


def test_the_mean_of_tasks_adds_their_errors_in_quadrature():
    one, two = stats.Interval(0.1, 0.0, 0.3, 50), stats.Interval(-0.1, -0.4, 0.0, 70)
    mean = stats.mean_of([one, two])
    assert (mean.value, mean.n) == (0.0, 120)
    assert mean.low == pytest.approx(-math.hypot(0.1, 0.3) / 2)
    assert mean.high == pytest.approx(math.hypot(0.2, 0.1) / 2)
    with pytest.raises(ValueError, match="at least one"):
        stats.mean_of([])


# the bootstrap


def test_the_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).normal(0.1, 0.3, size=120).clip(-1, 1)
    found = paired_bootstrap(values, resamples=20_000)
    theirs = reference.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_counts_of_distinct_items_and_drawn_items_have_one_distribution(monkeypatch):
    rows = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], size=(90, 2), p=[0.1, 0.7, 0.2])
    groups = np.arange(90) // 3
    fast = stats.resampled_means(rows, groups=groups, resamples=20_000)
    monkeypatch.setattr(stats, "_MOST_DISTINCT", 0)
    monkeypatch.setattr(stats, "_BLOCK_ITEMS", 1000)
    slow = stats.resampled_means(rows, groups=groups, resamples=20_000, seed=1)
    assert fast.mean(axis=0) == pytest.approx(rows.mean(axis=0), abs=0.002)
    for tail in (2.5, 50, 97.5):
        assert np.percentile(fast, tail, axis=0) == pytest.approx(
            np.percentile(slow, tail, axis=0), abs=0.012
        )
    assert np.corrcoef(fast.T)[0, 1] == pytest.approx(np.corrcoef(slow.T)[0, 1], abs=0.03)


def test_equal_seeds_give_equal_intervals(scores):
    assert paired_bootstrap(scores, seed=1) == paired_bootstrap(scores, seed=1)
    assert paired_bootstrap(scores, seed=1) != paired_bootstrap(scores, seed=2)


# tests


@pytest.mark.parametrize("seed", range(6))
def test_flips_are_mcnemars_test(seed):
    generator = np.random.default_rng(seed)
    first, second = (generator.random(150) < share for share in (0.6, 0.7))
    table = [
        [int((first & second).sum()), int((first & ~second).sum())],
        [int((~first & second).sum()), int((~first & ~second).sum())],
    ]
    found = flips(first, second)
    assert (found.gained, found.lost) == (table[1][0], table[0][1])
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    point = reference.binom.pmf(found.lost, found.gained + found.lost, 0.5)
    assert found.mid_p == pytest.approx(min(1.0, found.p - point))


def test_flips_survive_thousands_of_items():
    assert 0 <= flips([True] * 50_000, [False] * 50_000).p < 1e-300
    halves = flips([True] * 4000 + [False] * 4000, [False] * 4000 + [True] * 4000)
    assert halves.p == 1.0
    assert halves.mid_p == pytest.approx(1 - reference.binom.pmf(4000, 8000, 0.5) / 2)


def test_groups_flip_together():
    """Against every sign of every group, counted out; and copies of a question are no more evidence."""
    generator = np.random.default_rng(4)
    groups = np.repeat(np.arange(9), 3)
    first, second = generator.random(27) < 0.4, generator.random(27) < 0.8
    sums = np.bincount(groups, weights=second.astype(float) - first)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 9)).reshape(9, -1)
    share = np.mean(np.abs(sums @ signs) >= abs(sums.sum()) - 1e-9)
    assert flips(first, second, groups=groups).p == pytest.approx(share)
    one = flips([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1])
    many = flips([0] * 20 + [1] * 4, [1] * 24, groups=np.repeat(np.arange(6), 4))
    assert (many.p, many.gained) == (pytest.approx(one.p), 20)


def test_fractions_flip_too():
    generator = np.random.default_rng(5)
    first = generator.random(60)
    assert flips(first, (first + 0.1).clip(0, 1)).p < 0.001
    assert flips(first, generator.random(60)).p > 0.001


def test_non_inferiority_and_equivalence_agree_with_statsmodels_on_large_tables():
    generator = np.random.default_rng(6)
    for share in (0.70, 0.72, 0.75):
        first, second = generator.random(4000) < 0.72, generator.random(4000) < share
        difference = second.astype(float) - first
        both, (_, above, _), _ = ttost_paired(second.astype(float), first.astype(float), -0.03, 0.03)
        assert stats.non_inferiority(difference, 0.03).p == pytest.approx(above, abs=0.005)
        assert stats.equivalence(difference, 0.03).p == pytest.approx(both, abs=0.005)


def test_non_inferiority_is_the_one_sided_end_of_an_interval():
    differences = paired(10, 16, 274)
    end = mean_interval(differences, bounds=(-1, 1), confidence=0.9).low
    assert stats.non_inferiority(differences, -end + 1e-6).shown
    assert not stats.non_inferiority(differences, -end - 1e-6).shown
    groups = np.arange(300) // 3
    end = mean_interval(differences, bounds=(-1, 1), groups=groups, confidence=0.9).low
    assert stats.non_inferiority(differences, -end + 1e-6, groups=groups).shown
    assert not stats.non_inferiority(differences, -end - 1e-6, groups=groups).shown


def test_few_items_are_no_verdict_even_if_they_all_agree():
    assert not stats.non_inferiority([0.0] * 24, 0.025).shown
    assert stats.non_inferiority([0.0] * 200, 0.025).shown
    assert not stats.equivalence(paired(0, 5, 45), 0.025).shown


def test_holm_agrees_with_statsmodels():
    for seed in range(5):
        p_values = list(np.random.default_rng(seed).random(7) ** 3)
        assert stats.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert stats.holm([]) == []


def test_kendall_agrees_with_scipy():
    for seed in range(5):
        first, second = np.random.default_rng(seed).integers(0, 5, size=(2, 9))
        assert stats.kendall_tau(first, second) == pytest.approx(
            reference.kendalltau(first, second).statistic
        )
    assert stats.kendall_tau([1, 1, 1], [1, 2, 3]) is None


def test_power_is_how_often_the_test_finds_a_difference():
    generator = np.random.default_rng(7)
    n, gained, lost = 400, 0.12, 0.06
    counts = generator.multinomial(n, [gained, lost, 1 - gained - lost], size=4000)
    better, worse = counts[:, 0], counts[:, 1]
    mid = 2 * reference.binom.cdf(np.minimum(better, worse), better + worse, 0.5)
    mid -= reference.binom.pmf(better, better + worse, 0.5)
    found = np.mean(mid < 0.05)
    assert power.power(gained - lost, flipped=gained + lost, n=n) == pytest.approx(found, abs=0.03)


def test_the_detectable_difference_has_its_power_and_its_number_of_items():
    difference = power.detectable(flipped=0.2, n=500)
    assert power.power(difference, flipped=0.2, n=500) == pytest.approx(0.8, abs=1e-6)
    assert power.items_needed(difference, flipped=0.2) == pytest.approx(500, abs=1)
    assert power.items_needed(0.0, flipped=0.2) is None
    # flips cannot be rarer than the difference that they make
    assert power.detectable(flipped=0.0, n=100) == pytest.approx(
        power.detectable(flipped=0.05, n=100), rel=0.2
    )


def test_non_inferiority_power_is_how_often_it_is_shown_of_equals():
    generator = np.random.default_rng(8)
    counts = generator.multinomial(600, [0.05, 0.05, 0.9], size=300)
    shown = np.mean([stats.non_inferiority(paired(*row), 0.025).shown for row in counts])
    assert power.non_inferiority_power(0.025, flipped=0.1, n=600) == pytest.approx(shown, abs=0.08)


@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 29, 400])
def test_students_distribution_agrees_with_scipy(degrees):
    for t in (-3.0, -0.2, 0.0, 1.5, 12.0):
        assert stats._student_cdf(t, degrees) == pytest.approx(reference.t.cdf(t, degrees), abs=1e-12)
    assert stats._student_quantile(0.975, degrees) == pytest.approx(reference.t.ppf(0.975, degrees))


@pytest.mark.parametrize(("teacher", "student"), [(0.9, 0.1), (0.1, 0.1), (0.1, 0.4), (0.7, 1.0)])
def test_equal_fractions_leave_room_too(teacher, student):
    """A mean of equal fractions differs from each of them in the last bit."""
    found = gap([teacher] * 30, [student] * 30)
    assert found.low < found.value - 0.01
    assert found.high > found.value + 0.01
    scored = accuracy([student] * 30)
    assert scored.high - scored.low > 0.05


# what is refused


@pytest.mark.parametrize("values", [[], [[1.0, 0.0]], [1.0, math.nan]])
def test_scores_that_are_no_scores_are_refused(values):
    for estimate in (paired_bootstrap, accuracy):
        with pytest.raises(ValueError):
            estimate(values)


def test_scores_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match="from 0 to 1, got 0 to 7"):
        accuracy([0.0, 7.0])


def test_scores_of_different_items_cannot_be_compared():
    for compare in (gap, flips):
        with pytest.raises(ValueError, match="same items"):
            compare([True, False], [True])


def test_groups_of_other_items_are_refused():
    with pytest.raises(ValueError, match="group for each of 2 items, got 3"):
        accuracy([True, False], groups=["a", "b", "c"])
    with pytest.raises(ValueError, match="one group"):
        accuracy([True, False], groups=["a", "a"])


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.0])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(ValueError, match="margin above 0"):
        stats.non_inferiority([0.0, 1.0], margin)

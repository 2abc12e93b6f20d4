"""The headline says what the data allow, and no more."""

from __future__ import annotations

import random

import pytest

from gendistill.comparison import compare, load_scores
from gendistill.comparison.wording import headline, power_notes


@pytest.fixture
def said(make_lm_eval):
    """Compare two or more models and return the headline of ``acc``."""

    def say(*models, **settings):
        folders = [
            f"{name}={make_lm_eval(name, tasks)}" for name, tasks in zip("abcdef", models, strict=False)
        ]
        comparison = compare(load_scores(folders), measures=["acc"], **settings)
        return headline(comparison), comparison

    return say


def scores(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def flipped(lost: int, gained: int, n: int) -> tuple[list[float], list[float]]:
    """Two models that differ on some items; of the rest half are right."""
    rest = (n - lost - gained) // 2
    same = scores(rest, n - lost - gained)
    return [*scores(lost, lost + gained), *same], [*scores(0, lost), *scores(gained, gained), *same]


@pytest.mark.parametrize(
    ("lost", "gained", "n", "starts"),
    [
        (
            120,
            40,
            1000,
            "b answers 8.0 points fewer items right than a (quiz, acc, 1,000 items): 95% interval -10.5",
        ),
        (40, 120, 1000, "b answers 8.0 points more items right than a"),
        (
            3,
            2,
            24,
            "The data do not tell b from a (quiz, acc, 24 items), nor show them alike: the gap is -4.2",
        ),
        (60, 60, 1000, "b and a differ by less than 2.5 points (quiz, acc, 1,000 items): the gap is 0.0"),
        (40, 55, 400, "b is not worse than a by 2.5 points or more (quiz, acc, 400 items): the gap is +3.8"),
        (
            0,
            0,
            24,
            "The data do not tell b from a (quiz, acc, 24 items), nor show them alike: the gap is 0.0",
        ),
        (0, 0, 300, "b and a differ by less than 2.5 points"),
    ],
)
def test_one_task(said, lost, gained, n, starts):
    first, second = flipped(lost, gained, n)
    sentence, _ = said({"quiz": first}, {"quiz": second})
    assert sentence.startswith(starts)


def test_few_items_say_what_they_could_find(said):
    first, second = flipped(3, 2, 24)
    sentence, comparison = said({"quiz": first}, {"quiz": second})
    assert "24 items are few: they find a difference of 2" in sentence
    assert "a gap as small as this one takes about" in power_notes(comparison)[0]


def test_a_small_loss_that_is_sure_says_that_it_is_small(said):
    first, second = flipped(140, 60, 10_000)
    sentence, _ = said({"quiz": first}, {"quiz": second})
    assert sentence.startswith("b answers 0.8 points fewer items right than a")
    assert sentence.endswith("the loss is less than 2.5 points.")


def test_opposite_gaps_of_two_tasks_are_not_the_same_score(said):
    down, up = flipped(100, 20, 500), flipped(20, 100, 500)
    sentence, _ = said({"x": down[0], "y": up[0]}, {"x": down[1], "y": up[1]})
    assert sentence.startswith("b is better than a on y (+16.0) and worse on x (-16.0)")
    assert sentence.endswith("the mean of 0.0 points describes neither.")


def test_a_mean_says_which_tasks_show_it(said):
    down, same = flipped(100, 20, 500), flipped(20, 22, 500)
    sentence, _ = said({"x": down[0], "y": same[0]}, {"x": down[1], "y": same[1]})
    assert sentence.startswith(
        "b answers 7.8 points fewer items right than a in the mean (acc, 2 tasks, 1,000 items)"
    )
    assert sentence.endswith("by itself each of x (-16.0) shows it.")


def test_many_models_name_the_pairs_that_differ(said):
    generator = random.Random(0)
    base = [float(generator.random() < 0.7) for _ in range(400)]
    worse = [right if place >= 120 else 0.0 for place, right in enumerate(base)]
    sentence, _ = said({"quiz": base}, {"quiz": base}, {"quiz": worse})
    assert sentence.startswith("By acc, 2 of 3 pairs can be told apart, each by itself at 95%: a over c")
    alike, _ = said({"quiz": base}, {"quiz": base}, {"quiz": base})
    assert alike == "By acc, none of the 3 pairs can be told apart."

from __future__ import annotations

from decimal import Decimal

import pytest

from gendistill_evals.extract import find_letter, find_option, last_number, normalise, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", "7"),
        ("The answer is 7.", "7"),
        ("3 + 4 = 7", "7"),
        ("10-3=7", "7"),
        ("She pays $1,234.50 in all.", "1234.50"),
        ("It is -4 degrees", "-4"),
        ("It is \u22124 degrees", "-4"),
        ("that leaves 12%", "12"),
        ("first 5, then 6\n#### 42\nDone, 3 checks", "42"),
        ("1,2,3", "3"),
        ("it costs $.50", "0.50"),
        ("about .5 of it", "0.5"),
        ("a loss of $-5", "-5"),
        ("#### Step 3: add them\n5 + 6 = 11\nThe answer is 11.", "11"),
        ("#### Step 2: halve\n22 / 2\n#### 11\n#### Check\n2 * 11 = 22", "11"),
        ("#### The answer is 18", "18"),
        ("####\n**$1,234.50** a year for 3 years", "1234.50"),
        ("#### #### 4", "4"),
        ("2024-05", "05"),
        ("seven", None),
        ("", None),
        ("the x2 model", None),
    ],
)
def test_last_number_is_found_or_missing(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", "1234"),
        (" $3.50 ", "3.50"),
        ("40%", "40"),
        (".5", "0.5"),
        ("$-5", "-5"),
        ("7 apples", None),
        ("", None),
    ],
)
def test_a_gold_number_must_be_the_whole_text(text, number):
    assert parse_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("yellow", "yellow"),
        ("Yellow.", "yellow"),
        ("A ripe banana is yellow.", "yellow"),
        ("\u201cYellow\u201d", "yellow"),
        ("It is dark red", "dark red"),
        ("It is red", "red"),
        ("It is dark red and yellow", None),
        ("yellow or red", None),
        ("Not red; the answer is yellow", "yellow"),
        ("Answer: **red**, not yellow", "red"),
        ("yellowish", None),
        ("a red-hot stove", "red"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_only_option_named_is_the_answer(text, option):
    assert find_option(text, ["yellow", "red", "dark red"]) == option


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B.", "B"),
        ("(B) the dog", "B"),
        ("B) the dog", "B"),
        ("**B**", "B"),
        ("B\nbecause it barks", "B"),
        ("The answer is B", "B"),
        ("The correct answer is: (B), the dog", "B"),
        ("I would choose (B).", "B"),
        ("either (A) or (B)", None),
        ("A dog barks", "B"),
        ("the cat and a dog", None),
        ("the dog", "B"),
        ("D.", None),
        ("answer is Dog", "B"),
        ("", None),
    ],
)
def test_a_letter_or_its_option_is_the_answer(text, letter):
    assert find_letter(text, ["A", "B", "C"], ["the cat", "dog", "a bird"]) == letter


def test_normalising_drops_form_and_keeps_words():
    assert normalise('  "River  Stone\n Cloud." ') == normalise("river stone cloud")
    assert normalise("river cloud stone") != normalise("river stone cloud")

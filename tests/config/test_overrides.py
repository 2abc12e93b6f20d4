"""Overrides that cannot be: each is one recipe error that names the command line, the setting and the next step."""

import pytest

from gendistill.config.load import load_recipe
from gendistill.errors import RecipeError

NO_OVERRIDES = [
    "seed",
    "",
    "=",
    "=1",
    ".seed=1",
    "seed.=1",
    "stages..distill.lr=1",
    "stages." + "a." * 3000 + "b=1",
]
NOT_YAML = ["[", "{", "{a: b", '"', "'", "*a", "@", "`x`", "%x", "\x1b[31m", "\udcff", "[" * 5000]
REFUSED = [
    ("seed", "="),
    ("seed", "=1"),
    ("seed", "- 1"),
    ("seed", "a: b"),
    ("seed", "0x10"),
    ("seed", "1.0"),
    ("seed", "1" * 5000),
    ("seed", "yes"),
    ("seed", "null"),
    ("seed", "|"),
    ("name", "1"),
    ("name", "../x"),
    ("schema", "2"),
    ("extends", "tiny"),
    ("<<", "1"),
    ("__class__", "1"),
    ("teacher", "x"),
    ("teacher.__dict__", "1"),
    ("teacher.model", "[x]"),
    ("student.placement.0", "kda"),
    ("data", "[]"),
    ("heldout", "null"),
    ("stages", "[]"),
    ("stages.distill", "1"),
    ("stages.distill.lr", "-1"),
    ("stages.distill.lr", ".inf"),
    ("stages.distill.lr", "{mixer: x}"),
    ("stages.distill.objective", "kl"),
    ("stages.distill.train", "[[mixer]]"),
    ("stages.distill.tokens", "[1]"),
    ("stages.distill.tokens", "{k: 1}"),
    ("stages.distill.tokens", "true"),
    ("eval.tasks", "copy"),
    ("eval.tasks", "[{copy: 1}]"),
]


def said(*words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", words)
    text = str(caught.value)
    assert text.startswith("recipe error  command line")
    assert "next:" in text or "allowed:" in text
    return text


@pytest.mark.parametrize("word", NO_OVERRIDES)
def test_a_word_that_is_no_override_is_refused(word):
    assert "write dotted.path=value" in said(word) or "steps" in said(word)


@pytest.mark.parametrize("value", NOT_YAML)
@pytest.mark.parametrize("setting", ["seed", "stages.distill.objective"])
def test_a_value_that_is_no_yaml_names_its_setting(setting, value):
    text = said(f"{setting}={value}")
    assert f"command line  {setting}\n  this is not YAML" in text
    assert len(text) < 1000


@pytest.mark.parametrize(("setting", "value"), REFUSED)
def test_a_value_that_does_not_fit_names_its_setting(setting, value):
    text = said(f"{setting}={value}")
    parts = setting.split(".")
    assert any(".".join(parts[:length]) in text for length in (len(parts), len(parts) - 1) if length)
    assert len(text) < 1000


@pytest.mark.parametrize(("setting", "value"), REFUSED)
def test_a_good_override_beside_a_bad_one_does_not_hide_it(setting, value):
    assert said("seed=3", f"{setting}={value}").startswith("recipe error")

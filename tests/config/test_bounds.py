"""What a recipe must not hold: names that are paths, numbers without end, files and texts that exhaust the reader."""

from __future__ import annotations

import os
import re
import time

import pytest

from gendistill.anatomy.placement import Placement
from gendistill.config.document import MOST_CHARACTERS
from gendistill.config.load import load_recipe
from gendistill.config.patterns import check_pattern
from gendistill.config.problems import RecipeProblems
from gendistill.errors import RecipeError
from gendistill.types import parse_token_count

NO_NAMES = ["../../../x", "..", "a/b", "/x", "a b", ".x", "", "x" * 101, "é", "[red]x[/red]"]


def refused(*overrides, recipe):
    """Return the problems of a recipe; each must say where it is and what to do."""
    with pytest.raises(RecipeProblems) as caught:
        load_recipe(recipe, overrides)
    assert all(problem.place and problem.hint for problem in caught.value.problems)
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("section", ["stages", "data", ""])
def test_a_name_that_becomes_a_path_is_one_plain_word(edited, recipe, section, name):
    quoted = '"' + name + '"'
    if section == "stages":
        edited("  distill:\n", f"  {quoted}:\n")
    elif section == "data":
        edited("  chat: {path: chat", f"  {quoted}: {{path: chat")
    else:
        edited("name: small", f"name: {quoted}")
    (message,) = refused(recipe=recipe).values()
    assert "cannot name a folder" in message


@pytest.mark.parametrize(
    ("section", "old", "new"), [("stages", "project", "Distill"), ("data", "chat", "WEB")]
)
def test_names_that_differ_only_in_case_are_refused(edited, recipe, section, old, new):
    edited(f"  {old}:", f"  {new}:")
    (message,) = refused(recipe=recipe).values()
    assert "only in upper and lower case" in message
    assert new in message


@pytest.mark.parametrize(
    ("setting", "values", "allowed"),
    [
        ("stages.distill.steps", ["10**30", "0", "-1", "1e400", "10**400"], "1 to 1,000,000,000"),
        ("stages.distill.batch_size", ["10**7", "10**12"], "1 to 1,048,576"),
        ("stages.distill.micro_batch_size", ["10**30"], "1 to 1,048,576"),
        ("stages.distill.seq_len", ["10**9", "7"], "8 to 1,048,576"),
        ("stages.distill.minutes", ["1e308", "1e400", "0", "10**400"], "above 0 to 1,000,000"),
        ("stages.distill.tokens", ["1e400B", "10**30", "0", "0.1"], "1 to 1,000,000,000,000,000"),
        ("stages.distill.lr", ["1e400", "10**400", "-1", "0", ".inf", "1e31"], "above 0 to 1e+30"),
        ("stages.distill.lr.mixer", ["1e400", "0"], "above 0 to 1e+30"),
        ("stages.distill.grad_clip", ["1e308", ".nan"], "above 0 to 1e+30"),
        ("stages.distill.weight_decay", ["1e308"], "0 to 1,000"),
        ("stages.distill.objective.temperature", ["1e-300", "1e300"], "0.001 to 1,000"),
        ("stages.distill.save_every_minutes", ["1e308"], "above 0 to 1,000,000"),
        ("stages.distill.keep_checkpoints", ["10**30"], "1 to 1,000,000"),
        ("seed", ["10**30", "-1", "1e400"], "0 to below 9,223,372,036,854,775,808"),
        ("data.web.limit", ["10**30", "0"], "1 to 1,000,000,000,000"),
        ("data.mix.mix.web", ["1e308", "0"], "1e-09 to 1,000,000,000"),
        ("heldout.rows", ["10**30"], "1 to 1,048,576"),
        ("eval.limit", ["10**30"], "1 to 1,000,000,000"),
        ("student.mixers.swa.window", ["10**30"], "1 to 1,073,741,824"),
    ],
)
def test_a_number_outside_its_range_is_refused_with_the_range(recipe, setting, values, allowed):
    for value in values:
        written = str(10 ** int(value[4:])) if value.startswith("10**") else value
        name = ["data.mix.mix.chat=1"] if "mix.mix" in setting else []
        problems = refused(*name, f"{setting}={written}", recipe=recipe)
        assert list(problems) == [setting]
        assert f"allowed: {allowed}" in problems[setting]
        assert len(problems[setting]) < 300


@pytest.mark.parametrize(
    "value",
    ["", "M", "k", "1__0", "_1", "1_", "inf", "nan", "infB", "1e5000000", "9" * 5000, "1.5.2", "²", "-3"],
)
def test_a_text_that_is_no_token_count_is_a_value_error(value):
    with pytest.raises(ValueError, match="is not a token count"):
        parse_token_count(value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, [], [1], {}, {"k": 1}, None])
def test_another_value_that_is_no_token_count_is_a_value_error(value):
    with pytest.raises(ValueError, match="token count"):
        parse_token_count(value)


@pytest.mark.parametrize(
    ("value", "count"), [("1_0", 10), ("1.5B", 1_500_000_000), ("20k", 20_000), ("1e3", 1000), (1e6, 10**6)]
)
def test_token_counts_are_read_as_written(value, count):
    assert parse_token_count(value) == count


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 100_000,
        "\n".join(" " * depth + "a:" for depth in range(1000)),
        "- " * 5000,
        "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
        + "\n".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)),
        "[" + "1," * 400_000 + "]",
        "a: 1\n" * (MOST_CHARACTERS // 4),
        "a: \0",
        'a: "\\UFFFFFFFF"',
        "%YAML " + "9" * 5000 + ".1\n---\na: 1",
        "a: \ud800",
    ],
    ids=[
        *("lists in lists", "sections in sections", "deep indentation", "deep dashes", "repeated aliases"),
        *("many values", "many characters", "NUL", "escape", "version", "half a surrogate"),
    ],
)
def test_what_would_exhaust_the_reader_is_refused_in_files_and_overrides(recipe, text):
    started = time.process_time()
    refused(f"eval.tasks={text}", recipe=recipe)
    recipe.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError):
        load_recipe(recipe)
    assert time.process_time() - started < 20


def test_a_path_of_many_steps_is_refused(recipe):
    assert "no setting lies so deep" in refused("a" + ".a" * 100_000 + "=1", recipe=recipe)[""]


@pytest.mark.parametrize("escape", ["\\0", "\\e[31m", "\\n", "\\ud800", "\\x9b", "\\u2028"])
@pytest.mark.parametrize(
    "setting", ["output", "teacher.model", "data.web.path", "eval.tasks", "data.web.column"]
)
def test_text_that_cannot_be_printed_is_refused(recipe, setting, escape):
    value = f'["x{escape}y"]' if setting == "eval.tasks" else f'"x{escape}y"'
    (message,) = refused(f"{setting}={value}", recipe=recipe).values()
    assert "cannot be printed" in message
    assert message.isprintable()


def test_a_key_that_cannot_be_printed_is_refused(recipe):
    recipe.write_text(recipe.read_text() + '"\\e[31m": 1\n')
    (message,) = refused(recipe=recipe).values()
    assert message.isprintable()


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*",
        "(a|aa)+$",
        "(.*)*",
        "((a?){30}){30}",
        ".*.*.*.*x",
        "(?:a|b|ab)*c",
        "(?=(a+)+)b",
        "a?" * 30 + "a" * 30,
        "(?P<x>a+)+(?P=x)",
        "(a*?)*?b",
        "x" * 1001,
        "a{99999999999}",
        "(" * 5000 + ")" * 5000,
        "[",
    ],
)
def test_a_pattern_that_could_search_without_end_is_refused(recipe, pattern):
    started = time.process_time()
    message = refused(f"stages.distill.only=['{pattern}']", recipe=recipe)["stages.distill.only.0"]
    assert len(message) < 300
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "pattern",
    [
        r"\.q_proj\.",
        r"layers\.(\d+)\.self_attn\.(q|k|v|o)_proj\.(weight|bias)",
        r".*layers.*proj.*",
        r"^model\.layers\.(1?[0-9]|2[0-7])\.mlp\.(?!down).*$",
        "(a|b)?",
    ],
)
def test_patterns_that_people_write_are_kept(pattern):
    assert check_pattern(pattern) == pattern


def test_accepted_patterns_are_fast_on_the_worst_of_names():
    worst = check_pattern(".*a.*a.*ab")
    started = time.process_time()
    assert re.search(worst, "a" * 60) is None
    assert time.process_time() - started < 1


BROKEN = {
    "empty": b"",
    "a list": b"- a\n",
    "a word": b"text",
    "cut": b"schema: 1\nname: x\nteacher: {model",
    "binary": bytes(range(256)),
    "UTF-16": "schema: 1".encode("utf-16"),
    "NUL": b"schema: 1\nname: \0\n",
    "another version": b"schema: 2\n",
    "tabs": b"schema: 1\n\tname: x\n",
    "too large": b"#" * (5 * MOST_CHARACTERS),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_recipe_of_a_run_folder_is_a_recipe_error_with_place_and_hint(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert "recipe.yaml" in str(caught.value.where)
    assert caught.value.hint


def test_folder_in_place_of_a_recipe_is_a_recipe_error(tmp_path):
    (tmp_path / "recipe.yaml").mkdir()
    with pytest.raises(RecipeError, match="folder") as caught:
        load_recipe(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("inside", ["a run folder", "itself", "extends"])
def test_pipes_and_devices_are_refused_at_once(recipe, tmp_path, inside):
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    if inside == "extends":
        recipe.write_text("extends: recipe.yaml\nname: x\n")
        assert "there is no file" in refused(recipe=recipe)["extends"]
        return
    for path in (tmp_path, "/dev/zero") if inside == "a run folder" else (pipe,):
        with pytest.raises(RecipeError, match="not a regular file"):
            load_recipe(path)


def test_byte_order_mark_and_carriage_returns_are_read(recipe):
    plain = load_recipe(recipe)
    recipe.write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(recipe) == plain


@pytest.mark.parametrize("name", ["~nobody-has-this-name/x.yaml", "x" * 5000, "a\0b", "\udcff.yaml"])
def test_a_recipe_that_cannot_exist_is_a_recipe_error(name):
    with pytest.raises(RecipeError):
        load_recipe(name)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[NaN]", "{}", '{"kinds": "kda"}', "[1, 2]", '{"kinds": [null]}', "\0"]
)
def test_broken_placement_file_is_a_recipe_error(tmp_path, content):
    path = tmp_path / "placement.json"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        Placement.parse(str(path), num_layers=4)
    assert caught.value.hint


def test_placement_from_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "placement.json")
    with pytest.raises(RecipeError, match="not a file"):
        Placement.parse(str(tmp_path / "placement.json"), num_layers=4)


@pytest.mark.parametrize("layer", ["²", "9" * 5000, "-1", ""])
def test_layer_that_is_no_number_is_a_recipe_error(layer):
    with pytest.raises(RecipeError):
        Placement.parse(f"full@{layer} kda", num_layers=4)

"""Loading a recipe: precedence, merging, and every problem shown at once with its line."""

from __future__ import annotations

import contextlib

import pytest

from gendistill.config.base import Affects
from gendistill.config.load import (
    Difference,
    diff_recipes,
    dump_recipe,
    load_recipe,
    read_recipe,
    recipe_names,
)
from gendistill.config.problems import RecipeProblems
from gendistill.errors import RecipeError


def problems_of(path, *overrides):
    with pytest.raises(RecipeProblems) as caught:
        load_recipe(path, overrides)
    return {problem.path: problem for problem in caught.value.problems}


def test_a_misspelt_stage_is_not_only_told_what_a_new_one_lacks():
    found = problems_of("tiny", "stages.distil.steps=8")
    assert 'did you mean "stages.distill"?' in (found["stages.distil.lr"].hint or "")
    found = problems_of("tiny", "stages.another.steps=8")
    assert "did you mean" not in (found["stages.another.lr"].hint or "")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_run_folder_is_a_recipe(recipe, tmp_path):
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe)))
    assert load_recipe(folder) == load_recipe(recipe)


def test_number_without_decimal_point_is_a_number(recipe):
    loaded = load_recipe(recipe)
    assert loaded.stages["project"].lr == 1e-3
    assert loaded.stages["distill"].lr == {"mixer": 3e-4, "mlp": 1e-4}
    assert loaded.stages["project"].tokens == 30_000_000


def test_unknown_key_names_line_path_guess_allowed_keys_and_command(edited):
    path = edited("temperature: 2", "temprature: 2")
    problem = problems_of(path)["stages.distill.objective.temprature"]
    assert problem.place == "small.yaml:18"
    assert 'unknown field "temprature"; did you mean "temperature"?' in problem.message
    assert "KLConfig accepts: direction, kind, temperature, weight" in problem.message
    assert problem.hint == "gendistill recipe schema --at stages.distill.objective"


@pytest.mark.parametrize(
    ("old", "new", "path", "line", "words"),
    [
        ("name: small\n", "", "name", 1, ['"name" is required']),
        ("path: chat.jsonl", "pth: chat.jsonl", "data.chat.pth", 8, ["unknown field", '"path"']),
        ("steps: 10", "steps: 1.5", "stages.distill.steps", 21, ["a whole number", "1.5"]),
        ("steps: 10", "steps: true", "stages.distill.steps", 21, ["a whole number", "true"]),
        ("steps: 10", 'steps: "10"', "stages.distill.steps", 21, ["remove the quotes"]),
        ("steps: 10", "steps: 0", "stages.distill.steps", 21, ["greater than or equal to 1", "0"]),
        (
            "steps: 10",
            "steps: 10\n    tokens: 5k",
            "stages.distill",
            17,
            ["exactly one of", "tokens and steps"],
        ),
        ("tokens: 30M", "tokens: 30X", "stages.project.tokens", 15, ["30X", "write 500, 20k, 30M"]),
        ("lr: 1e-3", "lr: fast", "stages.project.lr", 16, ["a number or a section", '"fast"']),
        (
            "{mixer: 3e-4, mlp",
            "{mixers: 3e-4, mlp",
            "stages.distill.lr.mixers",
            22,
            ['did you mean "mixer"?'],
        ),
        ("train: [mixer]", "train: mixer", "stages.project.train", 14, ["a list", "write [mixer]"]),
        (
            "kind: mixer_output",
            "kind: mixer_out",
            "stages.project.objective.kind",
            12,
            ["mixer_output", "jsd"],
        ),
        ("{kind: mixer_output}", "{}", "stages.project.objective", 12, ['"kind" is required', "add kind"]),
        ("schema: 1", "schema: 2", "schema", 1, ["1", "2"]),
        ("format: messages", "format: message", "data.chat.format", 8, ['did you mean "messages"?']),
        ("heldout: {data: web}", "heldout: {data: wbe}", "heldout.data", 9, ['"wbe"', "chat, web"]),
        ("steps: 10", "steps: 10\n    mask: completion", "stages.distill.mask", 22, ['format "text"']),
        (
            "steps: 10",
            "steps: 10\n    only: ['(']",
            "stages.distill.only.0",
            22,
            ["not a regular expression"],
        ),
        ('placement: "kda full"', "placement: kda ful", "student.placement", 5, ['"ful"', "full, swa, kda"]),
        ('placement: "kda full"', "placement: full@x kda", "student.placement", 5, ['layer "x"']),
        ('placement: "kda full"', "placement: [kda, 3]", "student.placement.1", 5, ["text", 'quote it: "3"']),
    ],
)
def test_wrong_setting_is_placed_and_explained(edited, old, new, path, line, words):
    problems = problems_of(edited(old, new))
    assert list(problems) == [path]
    problem = problems[path]
    assert problem.place == f"small.yaml:{line}"
    text = f"{problem.message}\n{problem.hint}"
    for word in words:
        assert word in text


@pytest.mark.parametrize("word", ["no", "on", "yes"])
def test_boolean_word_in_a_text_setting_is_an_error_that_says_quote_it(edited, word):
    problem = problems_of(edited("{model: some/teacher}", f"{{model: {word}}}"))["teacher.model"]
    assert f'quote it: "{word}"' in str(problem.hint)


@pytest.mark.parametrize("word", ["None", "none"])
def test_python_none_is_rejected_with_write_null(edited, word):
    problem = problems_of(edited("heldout: {data: web}", f"heldout: {{data: web, every_steps: {word}}}"))
    assert problem["heldout.every_steps"].hint == "write null"


def test_none_is_a_word_where_the_schema_lists_it(recipe):
    loaded = load_recipe(recipe, ["student.mixers.kda.output_gate=none"])
    assert loaded.student.mixers.kda.output_gate == "none"


def test_all_problems_are_shown_together(edited):
    path = edited("steps: 10", "stps: 10")
    path = edited("kind: mixer_output", "kind: mixer_out")
    path = edited("data:\n  web: {path: web.jsonl}", "data:\n  web: {path: web.jsonl}\n  web: {path: 3}")
    problems = problems_of(path, "eval.limit=None", "nonsense")
    assert set(problems) == {
        "",
        "data.web",
        "eval.limit",
        "stages.project.objective.kind",
        "stages.distill.stps",
    }
    with pytest.raises(RecipeProblems, match="5 problems; nothing was run"):
        load_recipe(path, ["eval.limit=None", "nonsense"])


def test_all_broken_references_are_shown_together(edited):
    path = edited("heldout: {data: web}", "heldout: {data: x}")
    assert set(problems_of(path, "stages.project.data=y")) == {"heldout.data", "stages.project.data"}


def test_override_wins_and_reaches_lists_and_new_sections(recipe):
    overrides = [
        "stages.distill.train.1=norm",
        "stages.distill.lr=5e-5",
        "stages.distill.schedule.kind=cosine",
        "data.extra={path: more.jsonl}",
        "seed=7",
    ]
    loaded = load_recipe(recipe, overrides)
    assert loaded.stages["distill"].train == ("mixer", "norm")
    assert loaded.stages["distill"].lr == 5e-5
    assert loaded.stages["distill"].schedule.kind == "cosine"
    assert loaded.stages["distill"].schedule.warmup == 0.1
    assert loaded.data["extra"].path == str(recipe.parent / "more.jsonl")
    assert loaded.seed == 7


def test_override_error_names_the_command_line(recipe):
    problems = problems_of(recipe, "stages.distill.lrr=1", "stages.distill.train.5=mlp")
    assert problems["stages.distill.lrr"].place == "command line"
    assert 'did you mean "lr"?' in problems["stages.distill.lrr"].message
    assert "items are 0 to 1" in problems["stages.distill.train.5"].message


def test_new_stage_length_replaces_the_old_one(recipe):
    stage = load_recipe(recipe, ["stages.project.minutes=2"]).stages["project"]
    assert (stage.tokens, stage.steps, stage.minutes) == (None, None, 2)


def test_null_removes_a_stage(recipe):
    assert list(load_recipe(recipe, ["stages.project=null"]).stages) == ["distill"]


def test_new_kind_starts_from_its_own_defaults(recipe):
    objective = load_recipe(recipe, ["stages.distill.objective.kind=jsd"]).stages["distill"].objective
    assert objective.model_dump() == {"kind": "jsd", "beta": 0.5, "temperature": 1.0, "weight": 1.0}


def test_extends_merges_section_by_section(recipe, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: small.yaml\nname: child\nstages:\n  project: null\n  distill: {tokens: 5M, lr: 1e-5}\n"
    )
    loaded = read_recipe(child, ["seed=3"])
    stage = loaded.recipe.stages["distill"]
    assert list(loaded.recipe.stages) == ["distill"]
    assert (stage.tokens, stage.steps, stage.lr) == (5_000_000, None, 1e-5)
    assert stage.objective.temperature == 2  # pyright: ignore[reportAttributeAccessIssue]
    assert loaded.origin(("name",)) == "child.yaml:2"
    assert loaded.origin(("teacher", "model")) == "small.yaml:3"
    assert loaded.origin(("seed",)) == "command line"
    assert loaded.origin(("output",)) == "default"


def test_extends_takes_the_name_of_a_shipped_recipe(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: tiny\nname: child\nstages: {block: null}\n")
    recipe = load_recipe(child)
    assert (recipe.name, list(recipe.stages), recipe.teacher.model) == ("child", ["distill"], "builtin:tiny")


def test_extends_is_one_level_deep_and_its_file_must_exist(recipe, tmp_path):
    (tmp_path / "child.yaml").write_text("extends: small.yaml\nname: child\n")
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("extends: child.yaml\nname: grandchild\n")
    assert "cannot extend another file" in problems_of(grandchild)["extends"].message
    grandchild.write_text("extends: childd.yaml\n")
    assert "there is no file" in problems_of(grandchild)["extends"].message


def test_missing_recipe_lists_the_built_in_ones():
    with pytest.raises(RecipeError, match='did you mean "tiny"') as caught:
        load_recipe("tinny")
    assert caught.value.exit_code == 2
    for name in recipe_names():
        assert name in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a\n", "text", "a: [\n"])
def test_file_that_is_no_recipe_is_a_recipe_error(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_binary_file_is_a_recipe_error(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(path)


def test_diff_lists_exactly_what_differs(recipe):
    first = load_recipe(recipe)
    second = load_recipe(recipe, ["seed=7", "stages.distill.lr=1e-5"])
    assert Difference("seed", 42, 7, Affects.RESULT) in diff_recipes(first, second)
    assert {row.setting for row in diff_recipes(first, second)} == {
        "seed",
        "stages.distill.lr",
        "stages.distill.lr.mixer",
        "stages.distill.lr.mlp",
    }
    assert diff_recipes(first, first) == []


def test_loading_never_raises_anything_but_recipe_errors(recipe):
    """Break every scalar of the recipe in several ways; each must load or raise a RecipeError."""
    lines = recipe.read_text().splitlines()
    for index in range(len(lines)):
        for broken in (
            "",
            "  - x",
            "x: {y: [1, {z: null}]}",
            lines[index] + " 3",
            lines[index].replace(":", ": -1 #"),
        ):
            recipe.write_text("\n".join([*lines[:index], broken, *lines[index + 1 :]]))
            with contextlib.suppress(RecipeError):
                load_recipe(recipe)

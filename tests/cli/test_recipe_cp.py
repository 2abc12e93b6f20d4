"""A copied recipe speaks of itself, means what its source meant, and overwrites nothing that was not named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gendistill.config.load import load_recipe, recipe_names, resolved


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("target", ["mine.yaml", "sub/folder/my-own.v2.yaml"])
def test_a_copy_of_a_shipped_recipe_names_itself_and_means_the_same(cli, workspace, name, target):
    code, out, err = cli("recipe", "cp", name, target)
    assert code == 0, err
    copy, source = load_recipe(target), load_recipe(name)
    assert copy.name == Path(target).stem
    assert {**resolved(copy), "name": name} == resolved(source)
    header = [line for line in (workspace / target).read_text().splitlines() if line.startswith("#")]
    commands = [command for line in header for command in re.findall(r"gendistill \w+ \S+", line)]
    assert commands
    assert all(command.split()[-1] == target for command in commands)
    assert f"recipe check {target}" in out


def test_relative_paths_of_a_copy_still_resolve(cli, workspace):
    (workspace / "a").mkdir()
    for file in ("texts.jsonl", "task.yaml", "placement.json"):
        (workspace / "a" / file).write_text("")
    (workspace / "a" / "checkpoint").mkdir()
    (workspace / "a" / "base.yaml").write_text("schema: 1\nteacher: {model: checkpoint}\noutput: out\n")
    (workspace / "a" / "mine.yaml").write_text(
        "extends: base.yaml\n# gendistill run mine\nname: mine\nstudent: {placement: placement.json}\n"
        "data:\n  text: {path: texts.jsonl}\n  more: {path: ./nowhere.jsonl}\nheldout: {data: text}\n"
        "stages: {}\neval: {tasks: [everyday, ./task.yaml]}\n"
    )
    source = load_recipe("a/mine.yaml")
    for target in ("b/copy.yaml", "a/copy.yaml", "copy.yaml"):
        assert cli("recipe", "cp", "a/mine.yaml", target)[0] == 0
        assert {**resolved(load_recipe(target)), "name": "mine"} == resolved(source)
    assert "extends: ../a/base.yaml" in (workspace / "b" / "copy.yaml").read_text()
    assert "extends: base.yaml" in (workspace / "a" / "copy.yaml").read_text()


def test_a_run_folder_can_be_copied(cli, workspace):
    from gendistill.config.load import dump_recipe

    (workspace / "run").mkdir()
    (workspace / "run" / "recipe.yaml").write_text(dump_recipe(load_recipe("tiny", ["name=run"])))
    assert cli("recipe", "cp", "run", "mine.yaml")[0] == 0
    assert load_recipe("mine.yaml").name == "mine"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("", "empty"),
        ("a\0b.yaml", "NUL"),
        ("\udcff.yaml", "empty"),
        (" ", "empty"),
        ("file/x.yaml", "cannot write"),
        ("taken.yaml", "--force"),
        ("dangling.yaml", "--force"),
        ("folder/small.yaml", "--force"),
        ("inner", "not a file"),
        ("own.yaml", "itself"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused(cli, workspace, target, words):
    assert cli("recipe", "cp", "tiny", "own.yaml")[0] == 0
    for name in ("file", "taken.yaml"):
        (workspace / name).write_text("mine")
    (workspace / "dangling.yaml").symlink_to("nowhere")
    (workspace / "folder").mkdir()
    (workspace / "folder" / "small.yaml").write_text("mine")
    (workspace / "inner" / "own.yaml").mkdir(parents=True)
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    code, _, err = cli("recipe", "cp", "own.yaml", target)
    assert code in (1, 2)
    assert words in err
    assert "next:" in err
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()} == before


def test_a_recipe_is_not_copied_onto_itself(cli, workspace):
    assert cli("recipe", "cp", "tiny", "own.yaml")[0] == 0
    (workspace / "link.yaml").symlink_to("own.yaml")
    for target in ("own.yaml", "link.yaml", "./own.yaml"):
        code, _, err = cli("recipe", "cp", "own.yaml", target, "--force")
        assert code == 2
        assert "the recipe itself" in err


def test_a_broken_recipe_is_not_copied_and_a_link_is_replaced_not_followed(cli, workspace):
    (workspace / "broken.yaml").write_text("schema: 1\n")
    (workspace / "mine.yaml").write_text("kept")
    (workspace / "link.yaml").symlink_to("mine.yaml")
    assert cli("recipe", "cp", "broken.yaml", "mine.yaml", "--force")[0] == 2
    assert (workspace / "mine.yaml").read_text() == "kept"
    assert cli("recipe", "cp", "tiny", "link.yaml", "--force")[0] == 0
    assert (workspace / "mine.yaml").read_text() == "kept"
    assert load_recipe("link.yaml").name == "link"


def test_a_file_name_that_is_no_name_becomes_one(cli, workspace):
    assert cli("recipe", "cp", "tiny", "my recipe (2).yaml")[0] == 0
    assert load_recipe("my recipe (2).yaml").name == "my-recipe-2-"
    assert "gendistill run 'my recipe (2).yaml'" in (workspace / "my recipe (2).yaml").read_text()

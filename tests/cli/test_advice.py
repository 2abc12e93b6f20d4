"""What is said before training starts, by the check and by the plan."""

from __future__ import annotations

import json

import pytest

from gendistill.config.load import load_recipe
from gendistill.errors import RecipeError
from gendistill.runs.advice import advise, check_batches, known_teacher
from gendistill.testing import save_tiny_checkpoint


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A teacher of 16 positions, with a chat template."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("chat"), max_position_embeddings=16)


@pytest.mark.parametrize("command", [("recipe", "check"), ("run", "--dry-run"), ("distill", "--dry-run")])
def test_rows_beyond_the_positions_are_warned_about(cli, workspace, chat_model, command):
    name, *flags = command
    words = (name, *flags, "tiny") if name == "recipe" else (name, "tiny", *flags)
    code, out, err = cli(*words, f"teacher.model={chat_model}", "stages.block.seq_len=16")
    assert code == 0, err
    warned = [line for line in out.splitlines() if line.startswith("warn ") and "position" in line]
    assert [line.split()[1] for line in warned] == ["stages.distill.seq_len", "heldout.seq_len"]
    assert all("32" in line and "16 positions" in line and "seq_len=16" in line for line in warned)


@pytest.mark.parametrize("positions", [32, None, "many"])
def test_rows_within_the_positions_or_without_any_are_not(positions):
    config = {} if positions is None else {"max_position_embeddings": positions}
    assert advise(load_recipe("tiny"), config, chat_template=False) == []


@pytest.mark.parametrize(
    ("overrides", "chat_template", "warned"),
    [
        (["eval.tasks=[copy]"], True, True),
        (["eval.questions=demo"], True, True),
        (["eval.tasks=[copy]"], False, False),
        ([], True, False),
        (["eval.tasks=[copy]", "data.text.format=messages"], True, False),
        (["eval.tasks=[copy]", "data.text.format=prompt_completion"], True, True),
        (["eval.tasks=[copy]", "data.m={mix: {text: 1}}", "stages.distill.data=m"], True, True),
        (
            [
                "eval.tasks=[copy]",
                "data.chat={path: c.jsonl, format: messages}",
                "data.m={mix: {text: 1, chat: 1}}",
                "stages.distill.data=m",
            ],
            True,
            False,
        ),
        (["eval.tasks=[copy]", "stages.block=null", "stages.distill=null"], True, False),
    ],
)
def test_a_chat_model_that_is_trained_outside_its_template_is_warned_about(overrides, chat_template, warned):
    warnings = advise(load_recipe("tiny", overrides), {}, chat_template=chat_template)
    assert len(warnings) == warned
    assert all("stages.distill.data" in warning and "format: messages" in warning for warning in warnings)


def test_template_is_found_in_either_file(chat_model, tmp_path):
    recipe = load_recipe("tiny", [f"teacher.model={chat_model}"])
    config, chat_template = known_teacher(recipe)
    assert chat_template
    assert config is not None
    assert config["max_position_embeddings"] == 16
    (tmp_path / "config.json").write_text("{}")
    recipe = load_recipe("tiny", [f"teacher.model={tmp_path}"])
    assert known_teacher(recipe) == ({}, False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    assert known_teacher(recipe) == ({}, True)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert known_teacher(recipe) == ({}, False)
    (tmp_path / "config.json").write_text("[" * 10**5)
    assert known_teacher(recipe) == (None, False)


@pytest.mark.parametrize("model", ["some/teacher", "pypi:nothing", "builtin:tiny", "a b c", "/nowhere"])
def test_a_teacher_that_is_not_here_is_unknown(model):
    assert known_teacher(load_recipe("tiny", [f"teacher.model={model}"])) == (None, False)


def test_check_as_json_lists_the_warnings(cli_json, workspace, chat_model):
    found = cli_json("recipe", "check", "tiny", f"teacher.model={chat_model}", "eval.tasks=[copy]")
    assert len(found["warnings"]) == 4


def test_batches_that_processes_cannot_share_are_refused():
    recipe = load_recipe("tiny")
    check_batches(recipe, 1)
    check_batches(recipe, 2)
    refused = {
        3: ("batch_size 4 cannot be shared equally", "use 2 processes, or stages.block.batch_size=6"),
        4: ("each of 4 processes has 1 of the 4 rows", "stages.block.micro_batch_size=1"),
        10**6: (
            "1000000 processes are more than the 4 rows",
            "use 4 processes, or stages.block.batch_size=1000000",
        ),
    }
    for number, (why, instead) in refused.items():
        with pytest.raises(RecipeError, match=why) as caught:
            check_batches(recipe, number)
        assert instead in str(caught.value)


def test_a_task_named_twice_is_refused(cli, workspace):
    for command in (("recipe", "check"), ("run",), ("eval",)):
        code, _, err = cli(*command, "tiny", "eval.tasks=[copy, everyday, copy]")
        assert code == 2
        assert "two tasks have the name copy" in err
        assert "next:" in err


def test_a_hub_model_that_was_downloaded_before_is_known(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--teacher" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text('{"max_position_embeddings": 16}')
    (snapshot / "chat_template.jinja").write_text("{{ x }}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe("tiny", ["teacher.model=some/teacher"])
    assert known_teacher(recipe) == ({"max_position_embeddings": 16}, True)

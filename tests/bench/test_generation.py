"""``gendistill bench generate`` on a CPU: what it measures is measured, and what it is given is checked."""

from __future__ import annotations

import json

import pytest

from gendistill.bench import generation
from gendistill.checkpoints.builtin import save_tiny_checkpoint
from gendistill.cli.main import main
from gendistill.errors import GendistillError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(path)
    return path


def rows_of(path):
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def test_answers_and_choices_of_a_model(folder, tmp_path, capsys):
    texts, choices, out = (tmp_path / name for name in ("texts.jsonl", "choices.jsonl", "out.json"))
    texts.write_text("\n".join(json.dumps({"question": f"What is {n} + {n}?"}) for n in range(5)))
    choices.write_text("\n".join(json.dumps({"input": f"{n}?\nA. x\nB. y\nAnswer:"}) for n in range(3)))
    arguments = [
        "bench",
        "generate",
        "--cpu",
        "--model",
        str(folder),
        "--texts",
        str(texts),
        "--json",
        str(out),
    ]
    arguments += ["--choices", str(choices), "--new-tokens", "4", "--batches", "2", "--limit", "4"]
    assert main([*arguments, "--placement", "kda full"]) == 0
    rows = rows_of(out)
    named = {name.removeprefix(str(folder)).lstrip(",: ") for name in rows}
    assert {
        "3 choices by likelihood",
        "3 choices by generation",
        "3 choices: generation, times likelihood",
        "engine: tokens/s",
        "transformers, batches of 2: tokens/s",
        "times transformers",
        "hybrid, as many tokens: tokens/s",
        "hybrid, times the teacher",
    } == named
    # in float32 the answers are the same, and bars are those of another device
    assert "100% of the answers are those of the engine" in capsys.readouterr().out
    assert all(row["value"] > 0 and row["bar"] is None for row in rows.values())


def test_latencies_of_a_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_LONG", 96)
    out = tmp_path / "out.json"
    arguments = [
        "bench",
        "generate",
        "--cpu",
        "--shape",
        "tiny",
        "--contexts",
        "64",
        "96",
        "--json",
        str(out),
    ]
    assert main(arguments) == 0
    rows = rows_of(out)
    assert "tiny, 32 prompts of 96 tokens: hybrid, times the teacher" in rows
    assert "tiny, 64 tokens: first token, teacher over hybrid" in rows
    assert all(row["value"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("line", "words"), [('{"text": "a"}', "line 2 has no question or prompt"), ("{", "line 2 is not JSON")]
)
def test_a_line_that_asks_nothing_is_named(tmp_path, line, words):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(GendistillError, match=words):
        generation.read_lines(path, ("question", "prompt"))


def test_a_question_may_hold_any_line_separator_of_unicode(tmp_path):
    questions = ["a\u2028b", "c\x85d", "e\u2029f"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"question": each}, ensure_ascii=False) + "\n" for each in questions))
    assert generation.read_lines(path, ("question", "prompt")) == questions


def test_a_model_without_a_file_is_refused(capsys):
    assert main(["bench", "generate", "--cpu", "--model", "x"]) == 2
    assert "add --texts FILE or --choices FILE" in capsys.readouterr().err

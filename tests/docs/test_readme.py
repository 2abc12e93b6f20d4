"""What the README tells a new user to do works as written, with a small model in place of the hub's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gendistill.testing import save_tiny_checkpoint

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    found = [
        code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in code
    ]
    assert len(found) == 1, f"{len(found)} {language} blocks contain {containing!r}"
    return found[0]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The files that the README tells to write, in a folder with a small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    save_tiny_checkpoint(tmp_path / "my-checkpoint", "llama", num_hidden_layers=30)
    chat, item = json.loads(block("json", '"messages"')), json.loads(block("json", '"question"'))
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(chat)}\n" * 200)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({**item, "id": str(i)}) + "\n" for i in range(3)))
    (tmp_path / "sums.yaml").write_text(block("yaml", "kind: multiple_choice"))
    (tmp_path / "mine.yaml").write_text(block("yaml", "extends:"))
    return tmp_path


def test_the_lines_of_python_run(place, capsys):
    code = block("python", "gd.convert")
    for theirs, small in (
        ('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"my-checkpoint"'),
        ("seq_len=1024", "seq_len=64, heldout_rows=4, heldout_seq_len=64"),
        ('tokens="2M"', "steps=1, batch_size=2, micro_batch_size=1"),
        ('tokens="20M"', "steps=1, batch_size=2, micro_batch_size=1"),
        ('["everyday", "sums.yaml"]', '["sums.yaml"]'),
    ):
        assert code.count(theirs) == 1, theirs
        code = code.replace(theirs, small)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (place / "smollm2-kda" / "config.json").is_file()
    assert names["scores"].gap.tasks[0].task == "sums"
    assert "initialised" in capsys.readouterr().out


def test_the_layer_runs():
    names: dict = {}
    exec(compile(block("python", "layer = KDA("), "README.md", "exec"), names)
    assert names["out"].shape == (1, 100, 512)


def test_own_model_data_and_task_lead_to_the_page(place, monkeypatch, capsys):
    from gendistill.cli.main import main

    def gendistill(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["gendistill", *words])
        code = main()
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    assert "mine.yaml" in README
    short = ["seq_len=64", "batch_size=2", "micro_batch_size=1", "tokens=128"]
    small = [f"stages.{stage}.{setting}" for stage in ("block", "distill") for setting in short]
    small += ["heldout.rows=4", "heldout.seq_len=64", "eval.questions=null"]
    assert "nothing was run" in gendistill("run", "mine.yaml", "--dry-run")
    assert not (place / "runs").exists()
    gendistill("run", "mine.yaml", *small)
    page = (place / "runs" / "mine" / "report" / "index.html").read_text(encoding="utf-8")
    assert "sums" in page
    assert "mine" in page

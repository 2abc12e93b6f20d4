"""The speed of a recipe's data: which stages are measured, and that the tokenizer's setting is as before."""

from __future__ import annotations

import os

import pytest

from gendistill.bench.data import StreamSpeed
from gendistill.cli.main import main
from gendistill.results.table import load_results


@pytest.mark.parametrize("before", [None, "true"])
def test_the_command_measures_the_stages_of_a_recipe(tmp_path, monkeypatch, capsys, before):
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    path = tmp_path / "out.json"
    arguments = ["bench", "data", "tiny", "--seconds", "0.1", "--json", str(path), "--commit", "0" * 40]
    assert main(arguments) == 0
    rows = load_results(path).rows
    assert [row.name for row in rows] == [
        f"tiny, {stage}, mask all: {what}"
        for stage in ("block", "distill")
        for what in ("tokens/s of one core", "Python")
    ]
    assert all(row.value > 0 and row.n for row in rows)
    assert capsys.readouterr().out.count("tokens/s on one core") == 2
    assert os.environ["TOKENIZERS_PARALLELISM"] == (before or "false")


def test_an_unknown_stage_is_refused(capsys):
    assert main(["bench", "data", "tiny", "--stage", "nope"]) == 2
    assert 'has no stage "nope"; stages: block, distill' in capsys.readouterr().err


def test_rows_are_for_one_core():
    found = StreamSpeed("x, distill, mask all", 4e5, 2.5e-7, 500.0, 1000)
    speed, python = found.rows()
    assert (speed.value, speed.unit, speed.n) == (4e5, "tokens/s", 1000)
    assert (python.value, python.better) == (pytest.approx(0.25), "lower")

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gendistill.cli.main import main


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Qwen3 teacher: QK-norm, tied head, grouped heads."""
    from gendistill.testing import tiny_teacher

    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher("qwen3", tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs a command and gives its exit code, output and error output."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gendistill", *words])
        code = main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def cli_json(cli):
    """Like ``cli``, for commands that must succeed and print JSON."""

    def call(*words: str):
        code, out, err = cli(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call

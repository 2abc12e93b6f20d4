from __future__ import annotations

from pathlib import Path

import pytest

RECIPE = """\
schema: 1
name: small
teacher: {model: some/teacher}
student:
  placement: "kda full"
data:
  web: {path: web.jsonl}
  chat: {path: chat.jsonl, format: messages}
heldout: {data: web}
stages:
  project:
    objective: {kind: mixer_output}
    data: web
    train: [mixer]
    tokens: 30M
    lr: 1e-3
  distill:
    objective: {kind: kl, temperature: 2}
    data: web
    train: [mixer, mlp]
    steps: 10
    lr: {mixer: 3e-4, mlp: 1e-4}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid recipe in an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def edited(recipe: Path):
    """Return a function that replaces one piece of the valid recipe."""

    def edit(old: str, new: str) -> Path:
        text = recipe.read_text()
        assert text.count(old) == 1, f"{old!r} must occur once"
        recipe.write_text(text.replace(old, new))
        return recipe

    return edit

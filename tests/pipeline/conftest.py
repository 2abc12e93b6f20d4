"""A tiny whole run in a second: teacher, rows and a task in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gendistill.config.load import load_recipe
from gendistill.config.schema import Recipe
from gendistill.paths import RunDir, read_json
from gendistill.report import plots
from gendistill.runs import pipeline
from gendistill.testing import save_tiny_checkpoint


@pytest.fixture(autouse=True)
def _quick_figures(monkeypatch):
    """Draw the letters of a PDF as shapes: to embed a part of a font takes half the time of a report."""
    monkeypatch.setitem(plots._STYLE, "pdf.fonttype", 3)


@dataclass(frozen=True)
class Place:
    """A folder with everything that a recipe names."""

    root: Path

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def texts(self) -> Path:
        return self.root / "texts.jsonl"

    @property
    def items(self) -> Path:
        return self.root / "colours.jsonl"

    def write_texts(self, words: str, count: int = 40) -> None:
        rows = [{"text": f"{i} {words} under {i * i} bridges"} for i in range(count)]
        self.texts.write_text("\n".join(map(json.dumps, rows)))

    def write_items(self, count: int, gold: str) -> None:
        rows = [{"question": f"Colour {i}?", "options": ["red", "blue"], "gold": gold} for i in range(count)]
        self.items.write_text("\n".join(map(json.dumps, rows)))

    def recipe(self, *overrides: str, name: str = "tiny") -> Recipe:
        """Two stages of two and three steps, one task, two open answers."""
        return load_recipe(
            "tiny",
            [
                f"name={name}",
                f"output={self.root / 'runs'}",
                f"teacher.model={self.teacher}",
                f"data.text.path={self.texts}",
                "stages.block.steps=2",
                "stages.distill.steps=3",
                "stages.distill.save_every_steps=1",
                f"eval.tasks=[{self.root / 'colours.yaml'}]",
                f"eval.questions={self.root / 'open.jsonl'}",
                "eval.question_tokens=2",
                *overrides,
            ],
        )

    def run(self, *overrides: str, name: str = "tiny") -> RunDir:
        return pipeline.run(self.recipe(*overrides, name=name), command="test")


def fill(root: Path) -> Place:
    """Write teacher, rows, task and questions."""
    place = Place(root)
    save_tiny_checkpoint(place.teacher, num_hidden_layers=2, hidden_size=16, intermediate_size=16)
    place.write_texts("stones")
    place.write_items(3, "red")
    (root / "colours.yaml").write_text(
        json.dumps(
            {
                "items": "colours.jsonl",
                "kind": "multiple_choice",
                "prompt": "{question}",
                "max_new_tokens": 2,
            }
        )
    )
    (root / "open.jsonl").write_text('{"question": "Why?"}\n{"question": "Who?"}\n')
    return place


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    return fill(tmp_path)


@pytest.fixture
def steps_of() -> Callable[[RunDir], dict[str, str]]:
    """Return the keys of the steps that a run folder shows."""
    return lambda run: read_json(run.manifest)["steps"]


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory) -> Place:
    """A place whose runs are kept from test to test, so that nothing is made twice."""
    return fill(tmp_path_factory.mktemp("shared"))

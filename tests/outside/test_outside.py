"""A mixer, an objective, a judge and a monitor from outside, one file each, in one run from recipe to report."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import gendistill as gd
from gendistill.anatomy.mixers import MIXERS
from gendistill.config import objectives
from gendistill.losses import build
from gendistill.training.monitors import MONITORS
from gendistill_evals import JUDGES

TOYS = ("toy_mixer", "toy_objective", "toy_judge", "toy_monitor")


@pytest.fixture
def toys(monkeypatch):
    """Import what lies beside this file, and register it."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    mixer, objective, judge, monitor = (importlib.import_module(name) for name in TOYS)
    monkeypatch.setitem(MIXERS, "leaky", mixer.LEAKY)
    monkeypatch.setitem(objectives.OBJECTIVES, "cosine", objective.CosineConfig)
    monkeypatch.setitem(build.OBJECTIVES, "cosine", objective.Cosine)
    monkeypatch.setitem(JUDGES, "length", judge.judge_length)
    monkeypatch.setitem(MONITORS, "norms", monitor.Norms)
    yield
    for name in TOYS:
        sys.modules.pop(name, None)


def test_one_file_each_goes_all_the_way_to_the_report(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    items = [{"id": str(i), "question": f"row {i}:", "gold": str(n)} for i, n in enumerate((1, 1, 1000))]
    Path("items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    Path("longer.yaml").write_text(
        "kind: exact_match\nitems: items.jsonl\nprompt: '{question}'\njudge: length\nmax_new_tokens: 4\n"
    )
    done = gd.run(
        "tiny",
        "output=runs",
        "student.placement=leaky full",
        "student.mixers.leaky.half_life=3",
        "stages.block=null",
        "stages.distill.objective={kind: cosine, weight: 2}",
        "stages.distill.steps=2",
        "stages.distill.train=[mixer]",
        "eval.tasks=[./longer.yaml]",
        "eval.protocols=[generation]",
    )
    stage = done.folder / "stages" / "distill"
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["parts"]["cosine"] > 0 and row["norms"]["largest"] > 0 for row in rows)
    assert json.loads((stage / "result.json").read_text())["objective"] == "cosine"
    student = done.student()
    assert type(student.model.model.layers[0].self_attn).__name__ == "HybridLeaky"
    assert student.generate("row 1:", max_new_tokens=3)
    (task,) = done.gap().tasks
    assert task.student["generation"].value <= 100 * 2 / 3
    page = done.page.read_text(encoding="utf-8")
    assert "leaky" in page
    assert "longer" in page

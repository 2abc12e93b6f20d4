"""``student.impl`` reaches the probe and the trainer, and the output and the run's files say what it became."""

from __future__ import annotations

import json

import pytest
import torch

from gendistill.config.load import load_recipe
from gendistill.runs import pipeline
from gendistill.runs.planning import plan_run
from gendistill.testing import save_tiny_checkpoint

pytest.importorskip("triton", reason="the Triton kernels need triton")
from gendistill.bench.launches import watch

ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
)


@pytest.fixture
def recipe_of(tmp_path, monkeypatch):
    """Return a function that makes a recipe of one stage of two steps on a student that the kernels can run."""
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    teacher = save_tiny_checkpoint(
        tmp_path / "teacher", hidden_size=128, head_dim=64, intermediate_size=192, initializer_range=0.1
    )
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"{i} stones under {i * i} bridges"}) for i in range(60)))
    places = [f"teacher.model={teacher}", f"data.text.path={texts}", f"output={tmp_path / 'runs'}"]

    def make(impl):
        return load_recipe(
            "tiny", [*places, f"student.impl={impl}", "stages.block=null", "stages.distill.steps=2"]
        )

    return make


@pytest.mark.parametrize(
    ("requested", "impl"), [("reference", "reference"), pytest.param("auto", "triton", marks=ON_GPU)]
)
def test_probe_and_training_run_on_what_the_plan_says(recipe_of, capsys, requested, impl):
    recipe = recipe_of(requested)
    plan = plan_run(recipe)
    assert plan.impl.impl == impl
    with watch("prepare") as probed:
        run = pipeline.convert(recipe, command="test")
    # only a backward pass launches it
    with watch("keys") as trained:
        pipeline.distill(recipe, command="test")
    assert (bool(probed), bool(trained)) == (impl == "triton",) * 2
    said = capsys.readouterr().out
    assert f"impl      {impl} (" in said
    assert f"impl: kda={impl}" in said
    for path in (run.manifest, run.probe):
        assert json.loads(path.read_text())["impl"] == f"kda={impl}"
    assert (run.student / "config.json").is_file()

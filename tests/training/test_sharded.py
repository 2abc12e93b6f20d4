"""A way to share a stage that the package does not know fits behind ``Parallel``: parameters sharded by FSDP2."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("sharded_run.py")
CHECKPOINT = "stages/tiny/checkpoints/step-000006"


def load_script():
    spec = importlib.util.spec_from_file_location("sharded_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder of sharded stages."""
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    assert set(codes.values()) == {0}, (codes, done.stderr[-3000:])
    return folder


@pytest.mark.parametrize("name", script.OBJECTIVES)
def test_sharded_parameters_train_as_whole_ones(tiny, sharded, tmp_path, name):
    tiny.run_stage(tmp_path, **script.SAVING, **script.OBJECTIVES[name])
    whole, shared = tiny.rows(tmp_path), tiny.rows(sharded / name)
    assert [row["step"] for row in shared] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(shared, whole, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for watched in ("heldout", "layers", "score"):
            assert mine.get(watched, {}) == pytest.approx(theirs.get(watched, {}), rel=1e-4)
        norms, expected = (
            {name: value for name, value in row["groups"].items() if name.endswith("grad_norm")}
            for row in (mine, theirs)
        )
        assert norms == pytest.approx(expected, rel=1e-4)
        assert mine["groups"].keys() == theirs["groups"].keys()
    # checkpoints hold whole tensors, whoever wrote them, and as many steps of each
    for file in ("trained.safetensors", "optimizer.safetensors"):
        mine, theirs = (load_file(folder / CHECKPOINT / file) for folder in (sharded / name, tmp_path))
        assert {key: value.shape for key, value in mine.items()} == {
            key: value.shape for key, value in theirs.items()
        }
        assert all(mine[key] == theirs[key] == 6 for key in mine if key.endswith(".step"))


def test_a_sharded_student_writes_what_a_whole_one_does(tiny, sharded, tmp_path):
    tiny.run_stage(tmp_path, **script.SAVING, **script.OBJECTIVES["kl"])
    one, two = ((folder / "stages/tiny/answers.jsonl").read_text() for folder in (tmp_path, sharded / "kl"))
    assert one == two
    assert len(one.splitlines()) == 2


def test_a_sharded_stage_resumes_to_the_same_curve(tiny, sharded):
    assert tiny.rows(sharded / "resumed") == tiny.rows(sharded / "kl")

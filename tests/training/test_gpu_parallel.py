"""Two GPUs through Accelerate's launcher, in both modes, beside one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from gendistill.paths import RunDir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SETTINGS = (
    *("teacher.dtype=auto", "stages.block=null", "stages.distill.steps=10"),
    *("stages.distill.log_every_steps=1", "stages.distill.save_every_steps=5"),
)


def losses(folder, *words):
    """Distil ``tiny`` in a folder and return the loss of every step."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "gendistill", "distill", "tiny", *SETTINGS, *words]
    environment = {**os.environ, "GENDISTILL_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (RunDir(folder / "runs" / "tiny").stage("distill") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], done.stdout


@pytest.mark.parametrize(("mode", "reshard"), [("ddp", "auto"), ("fsdp2", "step"), ("fsdp2", "always")])
@pytest.mark.parametrize("blocks", ["auto", "family"])
def test_two_gpus_train_as_one_does(tmp_path, mode, reshard, blocks):
    engine = f"engine.blocks={blocks}"
    one, _ = losses(tmp_path / "one", engine)
    shared = (f"engine.parallel={mode}", f"engine.reshard={reshard}", "--num-processes", "2")
    two, output = losses(tmp_path / "two", engine, *shared)
    assert f"2 processes, each with {'the whole' if mode == 'ddp' else 'a part of'} student" in output
    assert len(two) == len(one) == 10
    assert two == pytest.approx(one, rel=2e-2)

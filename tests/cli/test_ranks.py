"""Two real ranks on a CPU: whoever dies, the others end, nothing is left, and what can be saved is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gendistill.paths import RunDir

pytestmark = pytest.mark.slow
PATIENCE_S = 60


def ranks_of(launcher: int) -> dict[int, int]:
    """Map the ranks that a launcher started to their process ids."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                entry.split("=", 1)
                for entry in (folder / "environ").read_text().split("\0")
                if entry.count("=") >= 1
            )
        except OSError:
            continue
        if environment.get("GENDISTILL_LAUNCHER_PID") == str(launcher) and "RANK" in environment:
            found[int(environment["RANK"])] = int(folder.name)
    return found


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.fixture
def training(workspace):
    """A launcher whose two ranks train; they end with the test."""
    command = [
        *(sys.executable, "-m", "gendistill", "distill", "tiny", "--num-processes", "2"),
        *("stages.block=null", "stages.distill.steps=100000"),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (workspace / "out").open("w") as out:
        launcher = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    run = RunDir(workspace / "runs" / "tiny")
    metrics = run.stage("distill") / "metrics.jsonl"
    wait_for(lambda: launcher.poll() is not None or (metrics.is_file() and metrics.stat().st_size > 2000))
    ranks = ranks_of(launcher.pid)
    assert sorted(ranks) == [0, 1], (workspace / "out").read_text()
    yield launcher, ranks, run
    for pid in (launcher.pid, *ranks_of(launcher.pid).values()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait()


def test_a_killed_rank_is_named_and_nothing_is_left(training, workspace):
    launcher, ranks, _ = training
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(PATIENCE_S) == 1
    assert f"rank 1 (process {ranks[1]}) was ended by SIGKILL" in (workspace / "out").read_text()
    assert "Traceback" not in (workspace / "out").read_text()
    wait_for(lambda: not ranks_of(launcher.pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_their_launcher_and_save_a_checkpoint(training, workspace, number):
    launcher, _, run = training
    os.kill(launcher.pid, number)
    assert launcher.wait(PATIENCE_S) == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not ranks_of(launcher.pid))
    assert list((run.stage("distill") / "checkpoints").glob("step-*"))
    assert "Traceback" not in (workspace / "out").read_text()

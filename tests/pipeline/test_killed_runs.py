"""Whatever is killed or damaged, the next run ends as one in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("seed", "num_trials"),
    [pytest.param(12, 5, id="slice"), pytest.param(7, 60, id="all", marks=pytest.mark.slow)],
)
def test_runs_that_were_killed_end_as_runs_alone(tmp_path, seed, num_trials):
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(seed), str(num_trials)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(": equal\n") == num_trials

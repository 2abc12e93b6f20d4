"""Disasters while a stage with adapters is saving: what is left is whole, and the stage goes on from it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gendistill.errors import OutputError

# a mount of its own for a process and its children
OWN_DISK = ("unshare", "--user", "--map-root-user", "--mount")


def can_mount():
    """Whether this machine lets a test have a small disk of its own."""
    if shutil.which("unshare") is None:
        return False
    probe = [*OWN_DISK, "sh", "-c", "mkdir -p probe && mount -t tmpfs -o size=40k none probe"]
    return (
        subprocess.run(
            probe, capture_output=True, cwd=os.environ.get("TMPDIR", "/tmp"), check=False
        ).returncode
        == 0
    )


@pytest.fixture(scope="module")
def drills(tmp_path_factory):
    """What every disaster left, by its name; the folder; what was printed."""
    folder = tmp_path_factory.mktemp("drills")
    disk = can_mount()
    script = Path(__file__).with_name("drill_run.py")
    command = [sys.executable, str(script), str(folder), "disk" if disk else "none"]
    done = subprocess.run(
        [*(OWN_DISK if disk else ()), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text()), folder, done.stdout


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_killed_while_it_saves_goes_on_from_the_checkpoint_before(tiny, drills, number):
    found, folder, _ = drills
    drill = found[f"killed_{number}"]
    assert drill["code"] == -signal.SIGKILL
    whole = [name for name in drill["left"] if name.startswith("step-")]
    assert whole == ["step-000002", "step-000004"][: number - 1]
    assert len(drill["left"]) == number, "and what was being written"
    assert drill["resumed"] == found["whole"]["code"] == 0
    assert tiny.rows(folder / f"killed_{number}") == tiny.rows(folder / "whole")
    left = {path.name for path in (folder / f"killed_{number}" / "stages" / "tiny" / "checkpoints").iterdir()}
    assert left == {"step-000002", "step-000004", "step-000006"}


def test_a_disk_that_is_really_full_is_said_and_costs_no_checkpoint(tiny, drills):
    found, folder, output = drills
    if "full" not in found:
        pytest.skip("this machine lets no test mount a disk of its own")
    drill = found["full"]
    assert drill["code"] == OutputError.exit_code
    assert "disk is full" in output
    assert drill["left"] == ["step-000002"]
    assert drill["resumed"] == 0
    assert drill["rows_resumed"] == tiny.rows(folder / "whole")

"""The tiny stage as a fixture; processes of its own are started once for all tests that need them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="session")
def tiny():
    """The module ``tiny_run``."""
    spec = importlib.util.spec_from_file_location("tiny_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scenarios(tmp_path_factory):
    """Run whole, killed, terminated and two-process stages; the folder, with exit codes in ``codes.json``."""
    folder = tmp_path_factory.mktemp("scenarios")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "codes.json").read_text()), done.stdout


@pytest.fixture
def quiet():
    """A console that keeps what it is told."""
    from io import StringIO

    return StringIO()

"""Nothing that a user can give ends in an internal error, a traceback, a hang, or a changed input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the fuzzer limits its processes as Linux does"
)


def fuzz(*words: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("fuzzer.py")), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5000:]


def test_broken_inputs_end_in_words():
    fuzz("--seed", "1", "--count", "160", "--runs", "8")


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["11", "12"])
def test_thousands_of_broken_inputs_end_in_words(seed):
    fuzz("--seed", seed, "--count", "2000")

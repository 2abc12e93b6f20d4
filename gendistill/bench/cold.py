"""Time a first call in a process of its own: ``python -m gendistill.bench.cold ours|peer`` prints the seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Literal

from gendistill.bench.cases import COLD_CASE
from gendistill.errors import GendistillError

Who = Literal["ours", "peer"]
_TIMEOUT_S = 500


def cold_and_warm(who: Who) -> tuple[float, float]:
    """Return the seconds of a first forward and backward pass, with an empty cache on disk and with a filled one.

    Raises:
        GendistillError: The process failed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="gendistill-cold-") as cache:
        return _run(who, cache), _run(who, cache)


def _run(who: Who, cache: str) -> float:
    command = [sys.executable, "-m", "gendistill.bench.cold", who]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise GendistillError(f"the first call of {who} took more than {_TIMEOUT_S} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GendistillError(f"the first call of {who} failed: {last}")
    return float(done.stdout.split()[-1])


def main(who: str) -> float:
    """Import, then time one forward and backward pass, the start of CUDA included."""
    import torch

    from gendistill.bench.inputs import draw_sequence
    from gendistill.bench.measure import train
    from gendistill.bench.peers import FlaCore, Ours
    from gendistill_kernels.delta import chunk

    contestant = FlaCore() if who == "peer" else Ours()
    assert chunk
    start = time.perf_counter()
    x = draw_sequence(COLD_CASE, "bounded", device="cuda", dtype=torch.bfloat16)
    train(contestant, x)()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(main(sys.argv[1]))

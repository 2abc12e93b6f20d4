"""A process that ends while its threads speak to the store ends quietly."""

from __future__ import annotations

import subprocess
import sys

CODE = """
from datetime import timedelta
import time
from torch.distributed import TCPStore
from gendistill.training.parallel import peers
peers._BEAT_S = 0.0
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
all_of_them = [peers.Peers(store, rank=0, world=1, patience_s=5.0) for _ in range(16)]
time.sleep(0.3)
print("ends")
"""


def test_a_process_ends_while_its_threads_speak_to_the_store():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "ends"), done.stderr

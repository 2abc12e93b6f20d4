"""A store that breaks because the process that kept it is ending."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

from gendistill.training.parallel import peers


class Store:
    """Keeps values in this process until it breaks."""

    def __init__(self):
        self.values, self.broken = {}, threading.Event()

    def _reach(self):
        if self.broken.is_set():
            raise RuntimeError("Connection reset by peer")
        return self.values

    def set(self, key, value):
        self._reach()[key] = value.encode()

    def get(self, key):
        return self._reach()[key]

    def multi_get(self, keys):
        return [self._reach()[key] for key in keys]

    def check(self, keys):
        return all(key in self._reach() for key in keys)

    def clone(self):
        return self


def test_a_process_whose_connections_end_before_it_does_is_named():
    store, other = Store(), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        store.set("who/1", json.dumps({**peers._who(), "pid": other.pid}))
        store.set("alive/1", "0")
        watching = peers.Peers(store, rank=0, world=2, patience_s=5.0)
        with watching.watching(lambda: peers.Situation("stages.x", "Nothing was saved", "run again")):
            # what it had open is closed first, and for a moment it is still there
            store.broken.set()
            threading.Timer(1.3, other.kill).start()
            deadline = time.monotonic() + 6
            while watching._lost is None and time.monotonic() < deadline:
                time.sleep(0.02)
            name = f"rank 1 (process {other.pid} on {peers._who()['host']}) is lost: it has ended"
            assert watching._lost == name
    finally:
        other.kill()
        other.wait()

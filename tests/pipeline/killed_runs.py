"""Kill runs at random, run them again, and compare: ``python killed_runs.py FOLDER SEED TRIALS``.

One process imports everything and forks, so that a run costs no start-up. A child is killed before a chosen change of
the file system (Python's audit events tell) or after a chosen time. Prints one line a trial; exits with 1 at the first
difference.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from gendistill.paths import RunDir

_SPEC = importlib.util.spec_from_file_location("place", Path(__file__).with_name("conftest.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
place_module = importlib.util.module_from_spec(_SPEC)
sys.modules["place"] = place_module
_SPEC.loader.exec_module(place_module)

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree"}
RECIPES: dict[str, tuple[str, ...]] = {
    "a": (),
    "b": ("stages.distill.lr=9e-4",),
    "c": ("student.placement=full kda", "stages.block=null"),
    "d": ("eval.limit=2", "stages.distill.micro_batch_size=1"),
}
# what differs between two runs of the same recipe: clocks and speeds
_CLOCKS = {
    "seconds",
    "tokens_per_second",
    "date",
    "peak_memory_bytes",
    "stat",
    "warnings",
    "crc32",
    "memory_gib",
}


def main(folder: str, seed: str, trials: str) -> int:
    logging.disable_progress_bar()
    root, chance = Path(folder), random.Random(int(seed))
    os.environ["GENDISTILL_CACHE"] = str(root / "cache")
    place = place_module.fill(root)
    runs = RunDir(root / "runs" / "tiny")
    wanted, events, seconds = {}, {}, {}
    for name, changes in RECIPES.items():
        started = time.perf_counter()
        assert child(lambda changes=changes: place.run(*changes), root / "events") == 0
        seconds[name] = time.perf_counter() - started
        events[name] = int((root / "events").read_text())
        wanted[name] = shown(runs)
        shutil.rmtree(root / "runs")
    for trial in range(int(trials)):
        shutil.rmtree(root / "runs", ignore_errors=True)
        history = []
        if chance.random() < 0.5:
            name = chance.choice(list(RECIPES))
            assert child(lambda name=name: place.run(*RECIPES[name]), root / "events") == 0
            history.append(f"{name} finished")
        for _ in range(chance.randint(1, 3)):
            name = chance.choice(list(RECIPES))
            by_event = chance.random() < 0.7
            at = chance.randrange(events[name]) if by_event else chance.uniform(0, seconds[name])
            code = child(lambda name=name: place.run(*RECIPES[name]), root / "events", at)
            history.append(
                f"{name} {'ended' if code == 0 else 'killed'} at {at:.4g}{'' if by_event else ' s'}"
            )
        last = chance.choice(list(RECIPES))
        code = child(lambda last=last: place.run(*RECIPES[last]), root / "events")
        found = shown(runs) if code == 0 else {}
        different = sorted(name for name in wanted[last] | found if found.get(name) != wanted[last].get(name))
        print(
            f"{trial}: {', '.join(history)}, then {last}: {'differs' if different or code else 'equal'}",
            flush=True,
        )
        if different or code:
            print(f"exit code {code}; {different}", flush=True)
            for name in different:
                print(
                    f"{name}: {found.get(name)!r:.300}\n  instead of {wanted[last].get(name)!r:.300}",
                    flush=True,
                )
            return 1
    return 0


def child(work: Callable[[], object], events: Path, kill_at: float | None = None) -> int:
    """Run in a forked process, killed at the given event (a whole number) or after the given seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2) if kill_at is not None else None
            count = watch(kill_at if isinstance(kill_at, int) else None)
            work()
            events.write_text(str(count[0]))
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    if isinstance(kill_at, float):
        time.sleep(kill_at)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def watch(kill_at: int | None) -> list[int]:
    """Count the changes of the file system, and die before number ``kill_at``."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in CHANGES:
            if kill_at is not None and count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1

    sys.addaudithook(hook)
    return count


def shown(run: RunDir) -> dict[str, Any]:
    """Read everything that a run folder shows, links followed, without clocks; and what lies about in its store."""
    found: dict[str, Any] = {}
    for folder, _, names in os.walk(run.root, followlinks=True):
        for name in names:
            path = Path(folder) / name
            found[path.relative_to(run.root).as_posix()] = content(path)
    pages = {
        name for name in found if name.startswith("report/") and not name.endswith((".json", ".csv", ".md"))
    }
    remains = [path.name for path in run.root.parent.rglob(".*") if path.name.endswith((".partial", ".old"))]
    return {**{name: value for name, value in found.items() if name not in pages}, "remains": remains}


def content(path: Path) -> Any:
    if path.suffix == ".json":
        return without_clocks(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_clocks(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(each) for key, each in value.items() if key not in _CLOCKS}
    return [without_clocks(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Kill runs at random, run them again, and compare: ``python killed_runs.py FOLDER SEED TRIALS``.

One process imports everything and forks, so that a run costs no start-up. A child gets a signal before a chosen change
of the file system (Python's audit events tell) or after a chosen time; between two runs, files of finished steps are
damaged. Prints one line a trial; exits with 1 at the first difference.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from gendistill.paths import RunDir
from gendistill.report import plots

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
    "d": ("eval.limit=2", "stages.distill.save_every_steps=2"),
    "e": ("student.from={root}/other", "stages.distill=null", "eval.questions=null"),
    "f": ("stages={{}}", "eval.tasks=[]"),
    "g": ("stages.distill.train=[mixer]", "stages.distill.lora={{rank: 2, groups: [mlp], dropout: 0.1}}"),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# what differs between two runs of the same recipe: clocks and speeds, and what damage made it say
_CLOCKS = {
    "seconds",
    "tokens_per_second",
    "date",
    "commit",
    "peak_memory_bytes",
    "stat",
    "warnings",
    "crc32",
    "memory_gib",
    "speed",
    "shares",
}


@dataclass
class Trials:
    """What runs alone give, and how long they take.

    Attributes:
        wanted: By recipe, what its folder shows after a run alone.
        events: By recipe, changes of the file system in a run alone.
        seconds: By recipe, the time of a run alone.
    """

    place: Any
    chance: random.Random
    wanted: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """Folder of everything."""
        return self.place.root

    @property
    def run(self) -> RunDir:
        """The one run folder of all recipes."""
        return RunDir(self.root / "runs" / "tiny")

    def child(self, name: str, **kill: Any) -> int:
        """Run a recipe in a process of its own."""
        changes = [change.format(root=self.root) for change in RECIPES[name]]
        return child(lambda: self.place.run(*changes), self.root / "events", **kill)

    def measure(self, name: str) -> None:
        """Run a recipe alone, once, in the place of the runs at hand, which stand aside meanwhile."""
        if name in self.wanted:
            return
        runs, aside = self.root / "runs", self.root / "aside"
        if runs.exists():
            runs.rename(aside)
        started = time.perf_counter()
        assert self.child(name) == 0
        self.seconds[name] = time.perf_counter() - started
        self.events[name] = int((self.root / "events").read_text())
        self.wanted[name] = shown(self.run)
        shutil.rmtree(runs)
        if aside.exists():
            aside.rename(runs)

    def interrupt(self) -> tuple[str, str]:
        """Start a recipe and stop it somewhere; returns its name and what happened."""
        name, number = self.chance.choice(list(RECIPES)), self.chance.choice(SIGNALS)
        self.measure(name)
        by_event = self.chance.random() < 0.7
        at = (
            self.chance.randrange(self.events[name])
            if by_event
            else self.chance.uniform(0, self.seconds[name])
        )
        code = self.child(name, kill_at=at, number=number)
        how = "ended" if code == 0 else signal.Signals(number).name
        return name, f"{name} {how} at {at:.4g}{'' if by_event else ' s'}"

    def damage(self) -> str:
        """Delete, cut or change a file of some step."""
        files = [path for path in (self.root / "runs").rglob("*") if path.is_file() and path.stat().st_size]
        files = [path for path in files if path.name[0] != "." and "report" not in path.parts]
        if not files:
            return "nothing to damage"
        path = self.chance.choice(sorted(files))
        how = self.chance.choice(("deleted", "cut", "changed"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if how == "deleted":
            path.unlink()
        else:
            path.write_bytes(content if how == "changed" else content[: len(content) // 2])
        return f"{path.relative_to(self.root / 'runs')} {how}"

    def trial(self) -> tuple[list[str], list[str]]:
        """Return what was done, and what is not as it should be in the end."""
        shutil.rmtree(self.root / "runs", ignore_errors=True)
        history = []
        if self.chance.random() < 0.5:
            name = self.chance.choice(list(RECIPES))
            assert self.child(name) == 0
            history.append(f"{name} finished")
        damaged = False
        for _ in range(self.chance.randint(1, 3)):
            before = frozen(self.run)
            name, said = self.interrupt()
            history.append(said)
            after = frozen(self.run)
            # a finished run shows itself until another one has finished
            if before not in (None, after) and (
                after is None or after[0] != self.wanted[name]["recipe.yaml"]
            ):
                return history, ["the finished run has changed"]
            if self.chance.random() < 0.25:
                damaged = True
                history.append(self.damage())
        last = self.chance.choice(list(RECIPES))
        self.measure(last)
        code = self.child(last)
        history.append(f"then {last}")
        if code:
            return history, [f"exit code {code}"]
        found, wanted = shown(self.run), self.wanted[last]
        different = [name for name in sorted(wanted | found) if found.get(name) != wanted.get(name)]
        if damaged:
            # a stage that is intact but for these is not trained again
            story = ("/metrics.jsonl", "/plan.json")
            different = [
                name for name in different if not (name.startswith("stages/") and name.endswith(story))
            ]
        return history, [difference(name, found.get(name), wanted.get(name)) for name in different]


def main(folder: str, seed: str, trials: str) -> int:
    logging.disable_progress_bar()
    # to embed a part of a font in a PDF takes half the time of a report
    plots._STYLE["pdf.fonttype"] = 3
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    os.environ["GENDISTILL_CACHE"] = str(root / "cache")
    place = place_module.fill(root)
    place_module.save_tiny_checkpoint(
        root / "other", num_hidden_layers=2, hidden_size=16, intermediate_size=16, seed=5
    )
    all_trials = Trials(place, random.Random(int(seed)))
    for number in range(int(trials)):
        history, different = all_trials.trial()
        print(f"{number}: {', '.join(history)}: {'differs' if different else 'equal'}", flush=True)
        if different:
            print("\n".join(different), flush=True)
            return 1
    return 0


def child(
    work: Callable[[], object],
    events: Path,
    kill_at: float | None = None,
    number: signal.Signals = signal.SIGKILL,
) -> int:
    """Run in a forked process that gets a signal at an event (a whole number) or after some seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # as in a process of its own
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2) if kill_at is not None else None
            count = watch(kill_at if isinstance(kill_at, int) else None, number)
            work()
            events.write_text(str(count[0]))
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    if isinstance(kill_at, float):
        time.sleep(kill_at)
        os.kill(pid, number)
    return os.waitpid(pid, 0)[1]


def watch(kill_at: int | None, number: signal.Signals) -> list[int]:
    """Count the changes of the file system, and send a signal before number ``kill_at``."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in CHANGES:
            count[0] += 1
            if kill_at is not None and count[0] == kill_at + 1:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return count


def frozen(run: RunDir) -> tuple[bytes, bytes] | None:
    """Recipe and manifest of a finished run, None of an unfinished one."""
    try:
        content = run.manifest.read_bytes()
        return (run.recipe.read_bytes(), content) if json.loads(content)["complete"] else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


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
    """Return what a file says; its bytes where it is broken, which equal nothing that a run alone writes."""
    # what a model is asked beside what is kept decides the last digits of its answers
    kept = rounded if {"eval", "report"} & set(path.parts) else lambda value: value
    try:
        if path.suffix == ".json":
            return kept(without_clocks(json.loads(path.read_text())))
        if path.suffix == ".jsonl":
            return [kept(without_clocks(json.loads(line))) for line in path.read_text().splitlines()]
    except ValueError:
        pass
    return path.read_bytes()


def difference(name: str, found: Any, wanted: Any) -> str:
    """Say where two contents differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in found | wanted if found.get(key) != wanted.get(key)]
        return difference(f"{name} {keys[0]}", found.get(keys[0]), wanted.get(keys[0]))
    return f"{name}: {found!r:.300}\n  instead of {wanted!r:.300}"


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(each) for key, each in value.items() if key not in _CLOCKS}
    return [without_clocks(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

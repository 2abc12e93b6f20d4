"""Commands whose steps take no work, for tests of run folders and their store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from gendistill.config.load import load_recipe
from gendistill.paths import RunDir, read_json
from gendistill.runs.steps import ASKED, BEFORE, Step
from gendistill.runs.workspace import Workspace

NAMES = ("convert", "stage block", "stage distill", "eval teacher", "eval student")


def steps_of(**changes: int) -> list[Step]:
    """Five steps; a change of one changes those after it."""
    steps: list[Step] = []
    for name in NAMES:
        kind = name.split()[-1]
        inputs = {kind: changes.get(kind, 0), ASKED: changes.get("asked", 0)}
        if name.startswith("stage"):
            inputs[BEFORE] = steps[-1].key
        steps.append(Step(name, inputs))
    return steps


def recipe_of(root: Path, *overrides: str):
    return load_recipe("tiny", [f"output={root}", *overrides])


def fill(folder: Path, step: Step) -> dict:
    """Do the work of a step."""
    (folder / "student").mkdir(parents=True, exist_ok=True)
    (folder / "student" / "model.safetensors").write_text(f"weights of {step.slug}")
    (folder / "student" / "config.json").write_text(json.dumps({"of": step.key}))
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "result.json").write_text(json.dumps({"of": step.key}, indent=2) + "\n")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "large").write_text("moments")
    return {"result": {"of": step.key}} if step.kind == "stage" else {}


class Killed(Exception):
    """Stands for the end of a process."""


class Run:
    """A command that works through steps as the pipeline does.

    Attributes:
        made: Names of the steps that had to be made.
        said: Lines for people.
        forgotten: Run folders whose report is of something else.
    """

    def __init__(
        self,
        root: Path,
        *overrides: str,
        stop: str | None = None,
        completes: bool = True,
        opened: Callable[[], object] = lambda: None,
        **changes: int,
    ) -> None:
        self.made: list[str] = []
        self.said: list[str] = []
        self.forgotten: list[Path] = []
        self.workspace = Workspace(
            recipe_of(root, *overrides), say=lambda title, text: self.said.append(f"{title}: {text}")
        )
        with self.workspace.locked():
            self.workspace.plan(steps_of(**changes))
            self.workspace.sync()
            opened()
            for name, step in self.workspace.steps.items():
                if self.workspace.is_done(name):
                    continue
                with self.workspace.making(name) as folder:
                    if folder is None:
                        continue
                    found = fill(folder, step)
                    if name == stop:
                        raise Killed
                    self.workspace.finish(name, found)
                self.made.append(name)
            if completes:
                self.workspace.complete(forget=self.forgotten.append)

    @property
    def run(self) -> RunDir:
        return self.workspace.run


def look(run: RunDir) -> dict[str, str]:
    """What a run folder shows, links followed."""
    found = {}
    for folder, _, names in os.walk(run.root, followlinks=True):
        for name in names:
            if not name.startswith(".") and name not in ("step.json", "manifest.json"):
                path = Path(folder) / name
                found[path.relative_to(run.root).as_posix()] = path.read_text()
    return {**found, "steps": str(read_json(run.manifest)["steps"])}


# a process that holds a step until it is told how to end
HOLD = """
import sys
from pathlib import Path
from gendistill.runs.steps import Step
from gendistill.runs.store import Store
store, step = Store(Path(sys.argv[1])), Step("convert", {"convert": 1, "eval": 0})
with store.holding(step, say=print) as folder:
    store.begin(step)
    print("holding", flush=True)
    if sys.stdin.readline() == "finish\\n":
        (folder / "made").write_text("by another")
        store.finish(step, {"by": "another"})
"""

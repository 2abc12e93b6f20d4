"""The lines of ``metrics.jsonl`` for dashboards, through accelerate's trackers: the same names, the same numbers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from gendistill.config.watch import check_trackers
from gendistill.errors import CheckpointError, TrainingError
from gendistill.paths import read_json, write_json
from gendistill.training.console import TrainingConsole
from gendistill.training.job import StageJob


class Trackers:
    """A stage's trackers: a run of their own for every stage, which a resumed stage continues.

    They are open inside ``with``. One that fails while it is written to is left out from then on, with a warning:
    training does not depend on it. No network is needed: wandb is offline unless WANDB_MODE says otherwise.

    Args:
        job: Names the trackers, and the folder where ``trackers.json`` keeps the name of the run.
        step: Steps finished; a tensorboard shows no later ones of an earlier session.
        console: Where to speak.
        main: Whether this process writes; the others do nothing.
    Raises:
        RecipeError: A tracker is not installed.
    """

    def __init__(self, job: StageJob, *, step: int, console: TrainingConsole, main: bool) -> None:
        self.job, self.step, self.console = job, step, console
        self.names = job.trackers if main else ()
        self.open: dict[str, GeneralTracker] = {}
        check_trackers(self.names)

    def __enter__(self) -> Self:
        """Start them.

        Raises:
            TrainingError: One does not start; it says why.
        """
        for name in self.names:
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](*self._place(name), **self._settings(name))
                tracker.start()
                if name != "tensorboard":  # which would make a run of its own of it
                    settings = self.job.config.model_dump(mode="json", exclude_none=True)
                    tracker.store_init_configuration(
                        dict(flat({"stage": self.job.name, **settings}, words=True))
                    )
            except Exception as error:
                self.__exit__()
                raise TrainingError(
                    f"{name} does not start: {type(error).__name__}: {error}",
                    where="trackers",
                    hint=f"mend it, or leave {name} out: metrics.jsonl has the same numbers",
                ) from error
            self.open[name] = tracker
            self.console.say(f"{self.job.name}: {_LOOK[name].format(folder=self.job.folder)}")
        return self

    def __exit__(self, *_: object) -> None:
        """Finish them."""
        for name in list(self.open):
            self._ask(name, "finish")
        self.open.clear()

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row of metrics, names of inner numbers joined by ``/``."""
        values = dict(flat({name: value for name, value in row.items() if name != "step"}))
        for name in list(self.open):
            self._ask(name, "log", values, step=row["step"])

    def _ask(self, name: str, act: str, *arguments: Any, **keywords: Any) -> None:
        try:
            getattr(self.open[name], act)(*arguments, **keywords)
        except Exception as error:
            del self.open[name]
            self.console.warn(
                f"{self.job.name}: {name} fails and is left out from here on: {type(error).__name__}: {error}"
            )

    def _place(self, name: str) -> tuple[Any, ...]:
        return ("tensorboard", self.job.folder) if name == "tensorboard" else (self.job.project,)

    def _settings(self, name: str) -> dict[str, Any]:
        if name == "tensorboard":
            return {"purge_step": self.step + 1} if self.step else {}
        identity = run_identity(self.job.folder / "trackers.json")
        title = f"{self.job.name}-{identity}"
        if name == "trackio":
            return {"name": title, "resume": "allow"}
        mode = os.environ.get("WANDB_MODE", "offline")
        return {"name": title, "id": identity, "resume": "allow", "dir": str(self.job.folder), "mode": mode}


_LOOK = {
    "tensorboard": "look at it with tensorboard --logdir {folder}/tensorboard",
    "trackio": "look at it with trackio show",
    "wandb": "wandb writes to {folder}/wandb; wandb sync uploads what was offline",
}


def run_identity(path: Path) -> str:
    """Return the stage's name among a tracker's runs: made once, and kept in the file."""
    try:
        return read_json(path, shape=dict[str, str], error=CheckpointError)["run"]
    except (CheckpointError, KeyError):
        identity = uuid.uuid4().hex[:12]
        write_json(path, {"run": identity})
        return identity


def flat(values: Mapping[str, Any], prefix: str = "", *, words: bool = False) -> Iterator[tuple[str, Any]]:
    """List the numbers of nested mappings by their path, and with ``words`` everything else as text."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/", words=words)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
        elif words:
            yield f"{prefix}{name}", str(value)

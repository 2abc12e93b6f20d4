"""Read a run folder. Everything the report says comes from here; what a run lacks stays None or empty."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gendistill.errors import ReportError
from gendistill.paths import RunDir, read_json
from gendistill.types import MixerKind, Placement
from gendistill_evals import results
from gendistill_evals.errors import EvalError

ROLES = ("teacher", "student")
PROTOCOLS = ("likelihood", "generation")


@dataclass(frozen=True, slots=True)
class StageFiles:
    """Hold what one stage wrote: a row per logged step, and the result once the stage has finished."""

    name: str
    metrics: tuple[dict[str, Any], ...]
    result: dict[str, Any] | None

    @property
    def num_steps(self) -> int:
        """Steps of the stage, or those logged so far."""
        return self.result["steps"] if self.result else self.metrics[-1]["step"] if self.metrics else 0


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Hold the files of one run folder, parsed."""

    root: Path
    manifest: dict[str, Any]
    recipe_text: str
    plan: dict[str, Any] | None
    probe: dict[str, Any] | None
    stages: tuple[StageFiles, ...]
    results: dict[str, dict[str, Any]]
    samples: dict[str, tuple[dict[str, Any], ...]]
    transcripts: dict[str, tuple[dict[str, Any], ...]]

    @property
    def name(self) -> str:
        """Name of the run: the manifest's, else the folder's."""
        return self.manifest.get("name") or self.root.resolve().name

    @property
    def placement(self) -> Placement | None:
        """Mixer of every layer of the student."""
        kinds = (self.manifest.get("student") or {}).get("placement")
        return Placement(tuple(MixerKind(kind) for kind in kinds)) if kinds else None

    @property
    def resamples(self) -> int:
        """Bootstrap resamples that the recipe asks for."""
        return int((_recipe(self.recipe_text).get("eval") or {}).get("bootstrap", 2000))

    @property
    def heldout(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Held-out scores after conversion and after each finished stage, in order."""
        after = [(stage.name, stage.result.get("heldout")) for stage in self.stages if stage.result]
        points = [("conversion", self.probe), *after]
        return tuple((name, scores) for name, scores in points if scores)


def read_run(run_dir: Path) -> RunFiles:
    """Read every file of a run folder that the report uses.

    Args:
        run_dir: The run folder; parts that have not run yet may be absent.
    Raises:
        ReportError: No run folder, or a file that cannot be parsed.
    """
    run = RunDir(Path(run_dir))
    if not run.manifest.is_file() and not run.root.joinpath("eval").is_dir():
        raise ReportError(
            "this is no run folder: it holds neither manifest.json nor eval/",
            where=str(run.root),
            hint="give the folder that gendistill run wrote, such as runs/<name>",
        )
    recipe_text = run.recipe.read_text(encoding="utf-8") if run.recipe.is_file() else ""
    folders = {role: run.eval(role) for role in ROLES}
    return RunFiles(
        root=run.root,
        manifest=_json(run.manifest) or {},
        recipe_text=recipe_text,
        plan=_json(run.plan),
        probe=_json(run.probe),
        stages=_stages(run, recipe_text),
        results={
            role: _scores(results.read_results, folder)
            for role, folder in folders.items()
            if (folder / "results.json").is_file()
        },
        samples={role: _score_rows(folder, "samples") for role, folder in folders.items()},
        transcripts={role: _score_rows(folder, "transcripts") for role, folder in folders.items()},
    )


def _recipe(text: str) -> dict[str, Any]:
    return yaml.safe_load(text) or {}


def _stages(run: RunDir, recipe_text: str) -> tuple[StageFiles, ...]:
    on_disk = sorted(path.name for path in run.stage("").glob("*") if path.is_dir() and path.name[0] != ".")
    ordered = [name for name in _recipe(recipe_text).get("stages") or {} if name in on_disk]
    names = ordered + [name for name in on_disk if name not in ordered]
    return tuple(
        StageFiles(
            name=name,
            metrics=_metrics(run.stage(name) / "metrics.jsonl"),
            result=_json(run.stage(name) / "result.json"),
        )
        for name in names
    )


def _json(path: Path) -> Any:
    return read_json(path, error=ReportError) if path.is_file() else None


def _score_rows(folder: Path, name: str) -> tuple[dict[str, Any], ...]:
    read = {"samples": results.read_samples, "transcripts": results.read_transcripts}[name]
    return tuple(_scores(read, folder)) if (folder / f"{name}.jsonl").is_file() else ()


def _scores(read: Callable[[Path], Any], folder: Path) -> Any:
    try:
        return read(folder)
    except EvalError as error:
        raise ReportError(error.message, where=error.where, hint=error.hint) from error


def _metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """Read the rows logged so far; a last line without its end is still being written."""
    if not path.is_file():
        return ()
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise _unreadable(path, f"line {number}: {error}") from error
    return tuple(rows)


def _unreadable(path: Path, why: str) -> ReportError:
    return ReportError(
        f"cannot be read as JSON: {why}", where=str(path), hint="delete it and repeat the step that writes it"
    )

"""Read a run folder. Everything the report says comes from here; what a run lacks stays None or empty."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendistill.anatomy.placement import Placement
from gendistill.config.document import parse_yaml
from gendistill.config.problems import Problem, RecipeProblems
from gendistill.errors import ReportError
from gendistill.paths import RunDir, check_shape, read_json
from gendistill.records import (
    AnswerRow,
    ManifestRecord,
    Metrics,
    PlanRecord,
    ProbeRecord,
    RecipeRecord,
    StageRecord,
    TranscriptRow,
    read_bytes,
    read_metrics_file,
    read_rows,
    results_record,
    sample_row,
)
from gendistill.text import printable
from gendistill_evals import results

ROLES = ("teacher", "student")

_RUN_AGAIN = "delete the file and run the command that made the run again: it writes the file anew"
_NOT_NEEDED = "delete the file: it tells what the student wrote while it learnt, and nothing depends on it"
_SCORE_AGAIN = (
    "score this model again with gendistill eval, or delete the folder eval to report without scores"
)


@dataclass(frozen=True, slots=True)
class StageFiles:
    """What one stage wrote.

    Attributes:
        name: Name of its folder, without what cannot be shown.
        metrics: A row per logged step.
        result: The result once the stage has finished.
        broken_lines: Lines of its metrics that could not be read.
        answers: What the student answered while it learnt.
    """

    name: str
    metrics: tuple[dict[str, Any], ...]
    result: dict[str, Any] | None
    broken_lines: int = 0
    answers: tuple[dict[str, Any], ...] = ()

    @property
    def num_steps(self) -> int:
        """Steps of the stage, or those logged so far."""
        return self.result["steps"] if self.result else self.metrics[-1]["step"] if self.metrics else 0


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run folder, parsed."""

    root: Path
    manifest: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    plan: dict[str, Any] | None
    probe: dict[str, Any] | None
    stages: tuple[StageFiles, ...]
    results: dict[str, dict[str, Any]]
    samples: dict[str, tuple[dict[str, Any], ...]]
    transcripts: dict[str, tuple[dict[str, Any], ...]]

    @property
    def name(self) -> str:
        """Name of the run: the manifest's, else the folder's."""
        return self.manifest.get("name") or printable(Path(os.path.realpath(self.root)).name)

    @property
    def placement(self) -> Placement | None:
        """Mixer of every layer of the student."""
        kinds = (self.manifest.get("student") or {}).get("placement")
        return Placement(tuple(kinds)) if kinds else None

    @property
    def warnings(self) -> list[str]:
        """What the run warned of, and which of its files could be read in part only."""
        unread = [
            f"stage {stage.name}: {stage.broken_lines:,} of {stage.broken_lines + len(stage.metrics):,} lines of "
            "metrics.jsonl could not be read and are left out"
            for stage in self.stages
            if stage.broken_lines
        ]
        return [*(self.manifest.get("warnings") or []), *unread]

    @property
    def heldout(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Held-out scores after conversion and after each finished stage, in order."""
        after = [(stage.name, stage.result.get("heldout")) for stage in self.stages if stage.result]
        points = [("conversion", self.probe), *after]
        return tuple((name, scores) for name, scores in points if scores)

    @property
    def positions(self) -> tuple[tuple[str, list[dict[str, Any]]], ...]:
        """Held-out scores by range of positions, as ``heldout`` lists them on average."""
        after = [
            (stage.name, stage.result.get("heldout_by_position")) for stage in self.stages if stage.result
        ]
        points = [("conversion", (self.probe or {}).get("by_position")), *after]
        return tuple((name, rows) for name, rows in points if rows)


def read_run(run_dir: Path) -> RunFiles:
    """Read every file of a run folder that the report uses.

    Args:
        run_dir: The run folder; parts that have not run yet may be absent.
    Raises:
        ReportError: Not a run folder, a file that cannot be read or holds something else than it should, or a link
            to something that is gone.
    """
    run = RunDir(Path(run_dir))
    if not _is_there(run.manifest) and not _is_there(run.root / "eval"):
        raise ReportError(
            "this is not a run folder: it holds neither manifest.json nor eval/",
            where=str(run.root),
            hint=f"gendistill compare {run.root} OTHER reads what gendistill eval wrote"
            if _is_there(run.root / "results.json")
            else "give the folder that gendistill run wrote, such as runs/<name>",
        )
    recipe_text, recipe = _recipe(run.recipe)
    folders = {role: run.eval(role) for role in ROLES}
    scores = {role: _scores(folder / "results.json") for role, folder in folders.items()}
    return RunFiles(
        root=run.root,
        manifest=_json(run.manifest, ManifestRecord) or {},
        recipe_text=recipe_text,
        recipe=recipe,
        plan=_json(run.plan, PlanRecord),
        probe=_json(run.probe, ProbeRecord),
        stages=_stages(run, recipe),
        results={role: content for role, content in scores.items() if content is not None},
        samples={role: _rows(folder / "samples.jsonl", sample_row()) for role, folder in folders.items()},
        transcripts={
            role: _rows(folder / "transcripts.jsonl", TranscriptRow) for role, folder in folders.items()
        },
    )


def _is_there(path: Path) -> bool:
    """Whether a file or folder exists, behind links too.

    Raises:
        ReportError: It cannot be looked at, or a link on the way to it leads nowhere.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        for place in (path, *path.parents):
            if place.is_symlink() and not os.path.exists(place):  # noqa: PTH110 - raises nothing
                raise ReportError(
                    f"the step's output is gone: the link points to {printable(str(place.readlink()))}, which does "
                    "not exist",
                    where=str(place),
                    hint="run the same command again: it makes the step anew",
                ) from None
        return False
    except OSError as error:
        raise ReportError(
            f"cannot look at the run's files: {error.strerror}",
            where=str(path),
            hint="make the folder readable, or give another one",
        ) from error
    return True


def _is_file(path: Path) -> bool:
    """Whether a file exists; anything else in its place is an error, since reading it may never end."""
    if not _is_there(path):
        return False
    if not stat.S_ISREG(path.stat().st_mode):
        raise ReportError(
            "cannot read the file: it is not a regular file",
            where=str(path),
            hint="move it out of the run folder",
        )
    return True


def _json(path: Path, shape: Any, *, hint: str = _RUN_AGAIN) -> dict[str, Any] | None:
    return read_json(path, shape=shape, error=ReportError, hint=hint) if _is_file(path) else None


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """Read ``recipe.yaml``: as text, and as far as the report needs it."""
    if not _is_file(path):
        return "", {}
    hint = "delete the file: the report then lacks the recipe; the command that made the run writes it again"
    problems: list[Problem] = []
    try:
        text = read_bytes(path, error=ReportError, hint=hint).decode("utf-8")
        content = parse_yaml(text, place=str(path), problems=problems).plain()
        if problems:
            raise RecipeProblems(problems)
    except RecipeProblems as error:
        raise ReportError(f"cannot read the recipe: {error.message}", where=error.where, hint=hint) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ReportError(f"cannot read the recipe: {error}", where=str(path), hint=hint) from error
    check_shape(content, RecipeRecord | None, error=ReportError, where=str(path), hint=hint)
    return text, content or {}


def _stages(run: RunDir, recipe: dict[str, Any]) -> tuple[StageFiles, ...]:
    on_disk = sorted(_subfolders(run.root / "stages"))
    ordered = [name for name in recipe.get("stages") or {} if name in on_disk]
    names = ordered + [name for name in on_disk if name not in ordered]
    return tuple(_stage(run.stage(name)) for name in names)


def _subfolders(folder: Path) -> Iterator[str]:
    if not _is_there(folder):
        return
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise ReportError(
            f"cannot list the stages: {error.strerror}",
            where=str(folder),
            hint="make it a readable folder, or delete it to report without the training",
        ) from error
    for name in names:
        if not name.startswith(".") and _is_there(folder / name) and (folder / name).is_dir():
            yield name


def _stage(folder: Path) -> StageFiles:
    metrics = Metrics([], [])
    if _is_file(folder / "metrics.jsonl"):
        metrics = read_metrics_file(folder / "metrics.jsonl", error=ReportError)
    return StageFiles(
        name=printable(folder.name),
        metrics=tuple(metrics.rows),
        result=_json(folder / "result.json", StageRecord),
        broken_lines=len(metrics.broken),
        answers=_rows(folder / "answers.jsonl", AnswerRow, hint=_NOT_NEEDED),
    )


def _scores(path: Path) -> dict[str, Any] | None:
    content = _json(path, dict[str, Any], hint=_SCORE_AGAIN)
    if content is None:
        return None
    if content.get("schema") != results.SCHEMA:
        raise ReportError(
            f"the file has schema {content.get('schema')!r:.80}, this version reads {results.SCHEMA}",
            where=str(path),
            hint=_SCORE_AGAIN,
        )
    check_shape(content, results_record(), error=ReportError, where=str(path), hint=_SCORE_AGAIN)
    names = [task["task"] for task in content["tasks"]]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ReportError(
            f"the task {printable(repeated[0])} is in the file {names.count(repeated[0])} times",
            where=str(path),
            hint=_SCORE_AGAIN,
        )
    return content


def _rows(path: Path, shape: Any, *, hint: str = _SCORE_AGAIN) -> tuple[dict[str, Any], ...]:
    return tuple(read_rows(path, shape, error=ReportError, hint=hint)) if _is_file(path) else ()

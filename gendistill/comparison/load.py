"""Read scores item by item: our eval and run folders, and samples that lm-eval wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gendistill.errors import ReportError
from gendistill.paths import RunDir, check_shape
from gendistill.records import read_rows, results_record, sample_row
from gendistill.report.gap import FREE_SETTINGS
from gendistill.text import printable
from gendistill_evals import PROTOCOLS, ProtocolFamily, results
from gendistill_evals.formats import lm_eval
from gendistill_evals.formats.lm_eval import Example, SampleFile, SampleRow

_SHOWN = 3
_SCORE_AGAIN = "score this model again"
_KINDS = "an eval folder, a run folder, or what lm_eval --log_samples wrote"


@dataclass(frozen=True, slots=True)
class Measure:
    """One number per item of a task.

    Attributes:
        family: Whether the model wrote its answers or ranked given ones.
        values: In [0, 1], in the order of the task's ids.
        example: Reads what an item asked and what was answered.
        flips_floor: Share of items whose score changes when the same options stand in another order; None if that was
            not measured.
    """

    family: ProtocolFamily
    values: np.ndarray
    example: Callable[[int], Example]
    flips_floor: float | None = None


@dataclass(frozen=True, slots=True)
class TaskScores:
    """The items of a task and their scores.

    Attributes:
        ids: Sorted.
        items: What each item is, hashed.
        prompts: How each was asked, hashed.
        groups: What each belongs to.
        measures: By name.
        unusable: Metrics that cannot be compared item by item, and why.
        settings: How the task was asked, as far as the files say.
        where: The file.
    """

    ids: tuple[str, ...]
    items: tuple[str, ...]
    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    measures: dict[str, Measure]
    unusable: dict[str, str]
    settings: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model scored.

    Attributes:
        name: Of the model, for tables.
        source: The file or folder.
        tasks: By name.
    """

    name: str
    source: str
    tasks: dict[str, TaskScores]


def load_scores(places: Sequence[str], *, group_by: str | None = None) -> list[Scores]:
    """Read the scores of several models.

    Args:
        places: Folders or files, each may begin with a name, as in ``base=evals/base``. A run folder stands for its
            student; one that is given alone stands for its teacher and its student.
        group_by: Field of lm-eval's items that tells which of them belong together.
    Raises:
        ReportError: A place has no scores, or too few places are given.
        EvalError: A file is missing or broken.
    """
    given = [_named(place) for place in places]
    if len(given) == 1 and given[0][0] is None and _is_run(given[0][1]):
        run = given[0][1]
        given = [(role, _scored(run, role)) for role in ("teacher", "student")]
    if len(given) < 2:
        raise ReportError(
            f"a comparison needs two models or more, got {len(given)}",
            hint="gendistill compare FIRST SECOND; or one run folder, for its teacher and its student",
        )
    loaded = [_load(path, name, group_by=group_by) for name, path in given]
    if len({scores.name for scores in loaded}) < len(loaded):
        loaded = [
            Scores(str(path), scores.source, scores.tasks)
            for (_, path), scores in zip(given, loaded, strict=True)
        ]
    if len({scores.name for scores in loaded}) < len(loaded):
        raise ReportError(
            f"two of these have one name and place: {', '.join(printable(scores.name) for scores in loaded)}",
            hint="give each a name: first=FOLDER second=FOLDER",
        )
    return loaded


def load_model(place: str, *, group_by: str | None = None) -> Scores:
    """Read the scores of one model.

    Args:
        place, group_by: As for ``load_scores``.
    """
    name, path = _named(place)
    return _load(path, name, group_by=group_by)


def _named(place: str) -> tuple[str | None, Path]:
    name, equals, path = place.partition("=")
    if equals and name and "/" not in name and not Path(place).exists():
        return name, Path(path)
    return None, Path(place)


def _is_run(path: Path) -> bool:
    run = RunDir(path)
    scored = any((run.eval(role) / "results.json").is_file() for role in ("teacher", "student"))
    return scored or run.manifest.is_file()


def _scored(run: Path, role: str) -> Path:
    """Find the scores of a run's teacher or student."""
    folder = RunDir(run).eval(role)
    if not (folder / "results.json").is_file():
        raise ReportError(
            f"the {role} of this run has no scores",
            where=str(run),
            hint=f"gendistill eval {run}, with eval.tasks=[NAME] where its recipe asks nothing",
        )
    return folder


def _load(path: Path, name: str | None, *, group_by: str | None) -> Scores:
    if not path.exists():
        raise ReportError("there is no such file or folder", where=str(path), hint=f"give {_KINDS}")
    if path.is_file() and (path.suffix == ".json" or path.name == "samples.jsonl"):
        raise ReportError(
            "this is one file of an evaluation", where=str(path), hint=f"give its folder, {path.parent}"
        )
    if path.is_file():
        return _lm_eval_scores(path, [lm_eval.read_sample_file(path, group_by=group_by)], name)
    ours = (path / "results.json").is_file()
    if ours or _is_run(path):
        if group_by is not None:
            raise ReportError(
                "only items of lm-eval are grouped by a field: ours name their group themselves",
                where=str(path),
                hint="leave out --group-by",
            )
        return (
            _our_scores(path, name)
            if ours
            else _our_scores(_scored(path, "student"), name or path.resolve().name)
        )
    files = lm_eval.find_sample_files(path)
    if not files:
        raise ReportError(
            "the folder has no scores: neither results.json nor samples_<task>_<date>.jsonl",
            where=str(path),
            hint=f"give {_KINDS}",
        )
    return _lm_eval_scores(path, [lm_eval.read_sample_file(file, group_by=group_by) for file in files], name)


def _our_scores(folder: Path, name: str | None) -> Scores:
    content = results.read_results(folder)
    place = str(folder / "results.json")
    check_shape(content, results_record(), error=ReportError, where=place, hint=_SCORE_AGAIN)
    rows = read_rows(folder / "samples.jsonl", sample_row(), error=ReportError, hint=_SCORE_AGAIN)
    settings = {
        key: value for key, value in (content.get("settings") or {}).items() if key not in FREE_SETTINGS
    }
    diagnosed = _object(content, "diagnostics", "tasks")
    tasks = {}
    for entry in content["tasks"]:
        task = entry["task"]
        found = [row for row in rows if row["task"] == task]
        where = str(folder / "samples.jsonl")
        by_id = _unique(
            {str(row["id"]): row for row in found}, [str(row["id"]) for row in found], task, where
        )
        measures = {}
        for protocol in PROTOCOLS:
            if not entry.get(protocol):
                continue
            if any(not row.get(protocol) for row in by_id.values()) or len(by_id) != entry[protocol]["n"]:
                raise ReportError(
                    f"{protocol}: results.json counts {entry[protocol]['n']:,} items, samples.jsonl scores "
                    f"{sum(bool(row.get(protocol)) for row in by_id.values()):,}",
                    where=f"{where}, task {printable(task)}",
                    hint=f"{_SCORE_AGAIN}: the two files are from different evaluations",
                )
            measures[protocol] = Measure(
                PROTOCOLS[protocol].family,
                np.array([float(row[protocol]["correct"]) for row in by_id.values()]),
                _our_example(list(by_id.values()), protocol),
                _floor(_object(diagnosed, task, protocol, "order").get("flips")),
            )
        asked = {key: entry.get(key) for key in ("kind", "judge", "metric", "items_sha256", "prompt_sha256")}
        tasks[task] = TaskScores(
            ids=tuple(by_id),
            items=tuple(
                _hash(row.get("prompt"), row.get("options"), row.get("gold")) for row in by_id.values()
            ),
            prompts=("",) * len(by_id),
            groups=tuple(str(row.get("group", row["id"])) for row in by_id.values()),
            measures=measures,
            unusable={},
            settings=settings | asked,
            where=where,
        )
    return Scores(name or str(content.get("model") or folder.name), str(folder), tasks)


def _object(found: Any, *keys: str) -> Mapping[str, Any]:
    """Follow keys through objects; empty where there is something else."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _floor(flips: Any) -> float | None:
    """Read how many items change their score when their options stand in other orders."""
    known = isinstance(flips, int | float) and not isinstance(flips, bool) and 0 <= flips <= 1
    return float(flips) if known else None


def _our_example(rows: Sequence[Mapping[str, Any]], protocol: str) -> Callable[[int], Example]:
    def example(place: int) -> Example:
        row, entry = rows[place], rows[place][protocol]
        prompt, options = row.get("prompt"), row.get("options") or []
        if isinstance(prompt, list):
            prompt = "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
        gold, choice = row.get("gold"), entry.get("choice")
        if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(options):
            gold = options[gold]
        answer = entry.get("text")
        if answer is None and isinstance(choice, int) and 0 <= choice < len(options):
            answer = f"option {choice}: {options[choice]}"
        return Example(str(prompt), str(gold), str(answer))

    return example


def _lm_eval_scores(place: Path, files: Sequence[SampleFile], name: str | None) -> Scores:
    model = next((file.model for file in files if file.model), None)
    fallback = place.parent.name if place.is_file() else place.resolve().name
    return Scores(name or model or fallback, str(place), {file.task: _lm_eval_task(file) for file in files})


def _lm_eval_task(file: SampleFile) -> TaskScores:
    by_filter: dict[str, list[SampleRow]] = {}
    for row in file.rows:
        by_filter.setdefault(row.filter, []).append(row)
    measures: dict[str, Measure] = {}
    unusable: dict[str, str] = {}
    kept: dict[str, SampleRow] = {}
    for name, rows in by_filter.items():
        ids = [row.doc_id for row in rows]
        by_id = _unique({row.doc_id: row for row in rows}, ids, file.task, str(file.path))
        if kept and by_id.keys() != kept.keys():
            raise ReportError(
                f"filter {printable(name)} covers {len(by_id):,} items, another {len(kept):,}",
                where=f"{file.path}, task {printable(file.task)}",
                hint="write the samples again: the file is not complete",
            )
        kept = kept or by_id
        of = "" if name == lm_eval.NO_FILTER else f",{name}"
        for metric in dict.fromkeys(metric for row in rows for metric in (*row.values, *row.unusable)):
            reason = next(
                (
                    row.unusable.get(metric, "some items lack it")
                    for row in by_id.values()
                    if metric not in row.values
                ),
                None,
            )
            if metric in file.lower_is_better:
                reason = "less of it is better"
            if reason is not None:
                unusable[f"{metric}{of}"] = reason
                continue
            generated = any(row.generated is not None for row in rows)
            measures[f"{metric}{of}"] = Measure(
                ProtocolFamily.GENERATION if generated else ProtocolFamily.LIKELIHOOD,
                np.array([row.values[metric] for row in by_id.values()]),
                _lm_eval_example(file.path, [row.offset for row in by_id.values()]),
            )
    return TaskScores(
        ids=tuple(kept),
        items=tuple(f"{row.doc_hash}{row.target_hash}" for row in kept.values()),
        prompts=tuple(row.prompt_hash for row in kept.values()),
        groups=tuple(row.doc_id if row.group is None else row.group for row in kept.values()),
        measures=measures,
        unusable=unusable,
        settings=file.settings,
        where=str(file.path),
    )


def _lm_eval_example(path: Path, offsets: Sequence[int]) -> Callable[[int], Example]:
    return lambda place: lm_eval.read_example(path, offsets[place])


def _unique(by_id: dict[str, Any], ids: Sequence[str], task: str, where: str) -> dict[str, Any]:
    """Sort rows by id, each of which may be there once."""
    if len(by_id) < len(ids):
        seen: set[str] = set()
        double = list(dict.fromkeys(one for one in ids if one in seen or seen.add(one)))
        shown = ", ".join(printable(one) for one in double[:_SHOWN])
        raise ReportError(
            f"{len(double):,} items stand there more than once: {shown}",
            where=f"{where}, task {printable(task)}",
            hint="two evaluations were written into one file: keep the lines of one, or score again into a new folder",
        )
    return {one: by_id[one] for one in sorted(by_id)}


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()

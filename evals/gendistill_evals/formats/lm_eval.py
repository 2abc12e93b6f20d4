"""Read what lm-eval writes with ``--log_samples``: scores of every item, without lm-eval itself.

A run writes ``results_<date>.json`` and, for each task, ``samples_<task>_<date>.jsonl``: a line per item and filter,
with each metric under its own name and SHA-256 hashes of the item, of its prompt and of its target.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendistill_evals.errors import EvalError
from gendistill_evals.reading import read_text, shorten

NO_FILTER = "none"
# Keys of a line that are not metrics; files of before 0.4.3 do not list their metrics.
_OWN_KEYS = frozenset({
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics",
    "doc_hash", "prompt_hash", "target_hash",
})  # fmt: skip
# Of which less is better; a results file says it of every metric.
_LESS_IS_BETTER = frozenset({
    "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter", "wer", "cer",
})  # fmt: skip
_AGAIN = "write the samples again: lm_eval ... --log_samples --output_path FOLDER"


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One line of a samples file.

    Attributes:
        doc_id: Of the item, unique within a task and filter.
        filter: What was done with the answers before they were scored; ``none`` for nothing.
        doc_hash, prompt_hash, target_hash: SHA-256 of the item, of what was asked and of the reference answer.
        generated: How the model was asked to write an answer; None if it ranked given ones.
        values: Metrics that are one number in [0, 1].
        unusable: Other metrics, and why they cannot be compared item by item.
        group: The field of the item that was asked for, as text.
        offset: Where the line begins, in bytes.
    """

    doc_id: str
    filter: str
    doc_hash: str
    prompt_hash: str
    target_hash: str
    generated: dict[str, Any] | None
    values: dict[str, float]
    unusable: dict[str, str]
    group: str | None
    offset: int


@dataclass(frozen=True, slots=True)
class SampleFile:
    """The samples of one task, and what the run's results say about them.

    Attributes:
        path: Of the samples.
        task, date: From its name.
        rows: In the order of the file.
        results: Content of the results file of the same run; None if there is none.
    """

    path: Path
    task: str
    date: str
    rows: tuple[SampleRow, ...]
    results: dict[str, Any] | None

    @property
    def model(self) -> str | None:
        """Name of the model that the results file gives."""
        name = (self.results or {}).get("model_name")
        return name if isinstance(name, str) and name else None

    @property
    def settings(self) -> dict[str, Any]:
        """How the task was asked, as far as the first sample and the results file say."""
        found = self.results or {}
        keys = ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn")
        settings = {key: found[key] for key in keys if key in found}
        for name, section in (("few_shot", "n-shot"), ("version", "versions")):
            by_task = found.get(section)
            if isinstance(by_task, dict) and self.task in by_task:
                settings[name] = by_task[self.task]
        if self.rows[0].generated is not None:
            settings["generation"] = self.rows[0].generated
        return settings

    @property
    def lower_is_better(self) -> frozenset[str]:
        """Metrics of which less is better."""
        by_task = (self.results or {}).get("higher_is_better")
        higher = by_task.get(self.task) if isinstance(by_task, dict) else None
        said = higher if isinstance(higher, dict) else {}
        return frozenset(name for name, up in said.items() if up is False) | (_LESS_IS_BETTER - said.keys())


@dataclass(frozen=True, slots=True)
class Example:
    """What one item asked and what the model answered, as text."""

    prompt: str
    target: str
    answer: str


def is_sample_file(path: Path) -> bool:
    """Tell whether a file is called as lm-eval calls samples."""
    return path.suffix == ".jsonl" and path.name.startswith("samples_") and path.stem.count("_") > 1


def find_sample_files(folder: Path) -> list[Path]:
    """Find the newest samples of each task in a folder, or in the only folder of a model below it.

    Raises:
        EvalError: The folder cannot be listed, or holds folders of several models.
    """
    try:
        found = sorted(path for path in folder.iterdir() if is_sample_file(path))
        below = [] if found else sorted(path for path in folder.iterdir() if path.is_dir())
        models = [path for path in below if any(is_sample_file(one) for one in path.iterdir())]
    except OSError as error:
        raise EvalError(f"cannot read the folder: {error.strerror}", where=str(folder)) from error
    if len(models) > 1:
        shown = ", ".join(path.name for path in models[:8])
        raise EvalError(
            f"the folder holds samples of {len(models)} models: {shown}",
            where=str(folder),
            hint=f"name one of them: {models[0]}",
        )
    if models:
        return find_sample_files(models[0])
    results = [_read_results(folder, date) for date in sorted({_task_and_date(path)[1] for path in found})]
    if len(named := {str(each["model_name"]) for each in results if each and each.get("model_name")}) > 1:
        raise EvalError(
            f"the folder holds samples of {len(named)} models: {', '.join(map(shorten, sorted(named)[:8]))}",
            where=str(folder),
            hint="move the files of each model into a folder of its own, or name the samples of one task: "
            f"{found[-1]}",
        )
    newest: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: _task_and_date(path)[1]):
        newest[_task_and_date(path)[0]] = path
    return [newest[task] for task in sorted(newest)]


def read_sample_file(path: Path, *, group_by: str | None = None) -> SampleFile:
    """Read the samples of one task, and the results file of the same run beside them if there is one.

    Args:
        path: ``samples_<task>_<date>.jsonl``; any other JSON-lines file of that layout is taken as one task of its
            name.
        group_by: Field of the items that tells which of them belong together; None for none.
    Raises:
        EvalError: The file cannot be read or has another layout, or an item lacks the field.
    """
    rows = tuple(_rows(path, group_by))
    if not rows:
        raise EvalError("there are no samples in the file", where=str(path), hint=_AGAIN)
    task, date = _task_and_date(path) if is_sample_file(path) else (path.stem, "")
    return SampleFile(path, task, date, rows, _read_results(path.parent, date) if date else None)


def read_example(path: Path, offset: int) -> Example:
    """Read one line again, for showing.

    Args:
        path: The samples file.
        offset: Of the row, in bytes.
    """
    with path.open("rb") as lines:
        lines.seek(offset)
        row = json.loads(lines.readline())
    arguments = _arguments(row.get("arguments"))
    prompt = str(arguments[0][0]) if arguments and arguments[0] else ""
    answers = row.get("filtered_resps", row.get("resps"))
    if len(arguments) > 1 and isinstance(answers, list) and len(answers) == len(arguments):
        # Ranked options: the likeliest continuation is the answer.
        scores = [_log_likelihood(one) for one in answers]
        if all(score is not None for score in scores):
            best = max(range(len(scores)), key=lambda place: scores[place] or 0.0)
            return Example(
                prompt, str(row.get("target", "")), f"option {best}: {str(arguments[best][-1]).strip()}"
            )
    while isinstance(answers, list) and len(answers) == 1:
        answers = answers[0]
    return Example(
        prompt, str(row.get("target", "")), answers if isinstance(answers, str) else json.dumps(answers)
    )


def _log_likelihood(answer: Any) -> float | None:
    try:
        return float(answer[0])
    except (TypeError, ValueError, IndexError, KeyError):
        return None


def _task_and_date(path: Path) -> tuple[str, str]:
    task, _, date = path.stem.removeprefix("samples_").rpartition("_")
    return task, date


def _read_results(folder: Path, date: str) -> dict[str, Any] | None:
    """Read the results of one run; they are called ``results`` unless ``--output_path`` named a file."""
    found = sorted(path for path in folder.glob("*.json") if path.name.endswith(f"_{date}.json"))
    if not found:
        return None
    text = read_text(found[0], what="the results file", hint=_AGAIN)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"this is not JSON: {error}", where=str(found[0]), hint=_AGAIN) from error
    if not isinstance(content, dict):
        raise EvalError(
            f"the results must be an object, got {shorten(content)}", where=str(found[0]), hint=_AGAIN
        )
    return content


def _rows(path: Path, group_by: str | None) -> Iterator[SampleRow]:
    try:
        if not path.is_file():
            reason = "is not a regular file" if path.exists() else "is missing: there is no such file"
            raise EvalError(f"the samples file {reason}", where=str(path), hint=_AGAIN)
        with path.open("rb") as lines:
            offset = 0
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(line, where=f"{path}:{number}", offset=offset, group_by=group_by)
                offset += len(line)
    except OSError as error:
        raise EvalError(f"cannot read the samples: {error.strerror}", where=str(path), hint=_AGAIN) from error


def _row(line: bytes, *, where: str, offset: int, group_by: str | None) -> SampleRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"this is not JSON: {error}", where=where, hint=_AGAIN) from error
    if not isinstance(row, dict) or not isinstance(row.get("doc_id"), int | str) or "doc" not in row:
        raise EvalError(
            f"this is not a sample of lm-eval: it needs doc_id and doc, got {shorten(row)}",
            where=where,
            hint=_AGAIN,
        )
    arguments = _arguments(row.get("arguments"))
    first = arguments[0] if arguments else []
    listed = row.get("metrics")
    names = listed if isinstance(listed, list) else [key for key in row if key not in _OWN_KEYS]
    values, unusable = {}, {}
    for name in map(str, names):
        reason = _why_not(row.get(name))
        if reason is None:
            values[name] = float(row[name])
        else:
            unusable[name] = reason
    return SampleRow(
        doc_id=str(row["doc_id"]),
        filter=str(row.get("filter", NO_FILTER)),
        doc_hash=_hash(row, "doc_hash", json.dumps(row["doc"], indent=2, ensure_ascii=False)),
        prompt_hash=_hash(row, "prompt_hash", str(first[0]) if first else ""),
        target_hash=_hash(row, "target_hash", str(row.get("target"))),
        generated=first[1] if len(first) > 1 and isinstance(first[1], dict) else None,
        values=values,
        unusable=unusable,
        group=_group(row["doc"], group_by, where),
        offset=offset,
    )


def _hash(row: dict[str, Any], key: str, text: str) -> str:
    """Return the hash in a line; lines of old files lack it and get the one that lm-eval would have written."""
    found = row.get(key)
    return (
        found
        if isinstance(found, str)
        else hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    )


def _group(doc: Any, group_by: str | None, where: str) -> str | None:
    if group_by is None:
        return None
    if not isinstance(doc, dict) or group_by not in doc:
        has = ", ".join(map(str, doc)) if isinstance(doc, dict) else shorten(doc)
        raise EvalError(f"the item has no field {shorten(group_by)} to group by; it has: {has}", where=where)
    return json.dumps(doc[group_by], sort_keys=True)


def _why_not(value: Any) -> str | None:
    """Say why a metric of one item cannot be averaged over items; None if it can."""
    if not isinstance(value, bool | int | float):
        return f"it is {shorten(value)}, not one number"
    if isinstance(value, float) and not math.isfinite(value):
        return "it is not a finite number"
    return None if 0 <= value <= 1 else f"it is {shorten(value)}, outside 0 to 1"


def _arguments(found: Any) -> list[list[Any]]:
    """List the arguments of each request; old files hold lists, newer ones numbered objects."""
    requests = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else []
    return [
        list(one.values()) if isinstance(one, dict) else list(one)
        for one in requests
        if isinstance(one, dict | list)
    ]

"""Read a task's rows from a dataset of the Hugging Face hub, or from its offline twin. Imports no torch.

A twin is a file named after the task that holds the same columns: ``mmlu.jsonl``, ``mmlu.jsonl.gz`` or
``mmlu.parquet``. It takes precedence over the hub, so that a machine without a network asks the same questions.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gendistill_evals.errors import EvalError
from gendistill_evals.items import parse_rows, read_rows
from gendistill_evals.preparing import PREPARE
from gendistill_evals.reading import parse_json, read_text, shorten

# The folder of twins, and the word in its place that asks for the rows that come with the package.
DATA_VARIABLE = "GENDISTILL_EVAL_DATA"
SAMPLE = "sample"
_CACHE_VARIABLE = "GENDISTILL_CACHE"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_KEYS = ("path", "name", "name_column", "split", "revision", "columns", "prepare", "spread", "file")

Rows = list[tuple[int, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The dataset that a task file names.

    Attributes:
        path: Hub id, or folder of data files.
        names: Configurations, read one after another; empty for the only one.
        name_column: Column that says which configuration a row is of; None for none.
        split: As in ``test``.
        revision: Commit or tag of the hub; None is the newest.
        columns: Columns that are read; a twin has them too.
        prepare: Name in ``PREPARE`` of what makes rows of them; None leaves them as they are.
        spread: Column whose values take turns, so that the first rows hold some of each; None leaves the order.
        file: Name of the twin, without its suffix.
    """

    path: str
    names: tuple[str, ...]
    name_column: str | None
    split: str
    revision: str | None
    columns: tuple[str, ...]
    prepare: str | None
    spread: str | None
    file: str

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """The columns of a twin."""
        return (*((self.name_column,) if self.name_column else ()), *self.columns)


class Found(NamedTuple):
    """The rows of a task.

    Attributes:
        rows: Objects with their line numbers.
        path: The file that they were read from, for errors.
        source: Where they are from, for the record.
    """

    rows: Rows
    path: Path
    source: dict[str, Any]


def read_dataset(value: Any, task: str, where: str) -> Dataset:
    """Read the key ``dataset`` of a task file.

    Args:
        value: What stands there.
        task: Name of the task.
        where: Task file, for errors.
    Raises:
        EvalError: An unknown key, or a value of another type.
    """
    hint = "write dataset: {path: org/name, split: test, columns: [question, answer]}"
    if not isinstance(value, dict):
        raise EvalError(
            f'"dataset" must hold path, split and columns, got {shorten(value)}', where=where, hint=hint
        )
    for key in value:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key)[:100], _KEYS, n=1)
            raise EvalError(
                f"unknown key {shorten(f'dataset.{key}')}",
                where=where,
                hint=f'did you mean "{close[0]}"?' if close else f"allowed: {', '.join(_KEYS)}",
            )

    def text(key: str, default: str | None = None) -> str | None:
        found = value.get(key, default)
        if found is not None and not (isinstance(found, str) and found.strip()):
            raise EvalError(f'"dataset.{key}" must be a text, got {shorten(found)}', where=where, hint=hint)
        return found

    def texts(key: str) -> tuple[str, ...]:
        found = value.get(key, [])
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
            raise EvalError(
                f'"dataset.{key}" must be a list of texts, got {shorten(found)}', where=where, hint=hint
            )
        return tuple(found)

    path, split, prepare = text("path"), text("split"), text("prepare")
    columns = texts("columns")
    if path is None or split is None or not columns:
        lacking = next(key for key in ("path", "split", "columns") if not value.get(key))
        raise EvalError(f'"dataset" lacks {lacking}', where=where, hint=hint)
    if prepare is not None and prepare not in PREPARE:
        raise EvalError(
            f'"dataset.prepare" must be one of {", ".join(PREPARE)}, got {shorten(prepare)}',
            where=where,
            hint="leave it out where the columns are those that the task file names",
        )
    spread, named = text("spread"), text("name_column")
    if spread is not None and spread not in (*columns, named):
        raise EvalError(
            f'"dataset.spread" must be one of the columns {", ".join((*columns, *([named] if named else [])))}, got '
            f"{shorten(spread)}",
            where=where,
            hint="name the column of subjects, or leave it out",
        )
    file = text("file", task) or task
    if "/" in file or "\\" in file or file.startswith("."):
        raise EvalError(
            f'"dataset.file" must be the name of a file without a folder, got {shorten(file)}',
            where=where,
            hint=f"write file: {task}; the folder is given with --data or {DATA_VARIABLE}",
        )
    return Dataset(
        path, texts("name"), named, split, text("revision"), columns, prepare, spread, file
    )  # fmt: skip


def find_rows(dataset: Dataset, beside: Path, *, data: str | Path | None = None) -> Found:
    """Read the rows of a dataset: of its twin, else of the copy that an earlier call made, else of the hub.

    Args:
        dataset: From ``read_dataset``.
        beside: Folder of the task file, where the sample lies.
        data: Folder of twins, or ``"sample"`` for the rows that come with the task; None is
            ``$GENDISTILL_EVAL_DATA``, else the hub.
    Raises:
        EvalError: A folder that is not there (exit code 2), rows that cannot be had, or rows without the columns.
    """
    asked = data if data is not None else os.environ.get(DATA_VARIABLE) or None
    if asked is not None and str(asked) == SAMPLE:
        path = beside / f"{dataset.file}.sample.jsonl"
        rows, source = read_rows(path, what="the sample"), {"from": SAMPLE, "file": path.name}
    elif asked is not None and (twin := _twin(dataset, Path(asked).expanduser(), given=data is not None)):
        path, rows, source = twin, _read_twin(twin, dataset), {"from": "file", "file": twin.name}
    else:
        path, rows = _cached(dataset, beside, folder=asked)
        source = {
            "from": "hub",
            "dataset": dataset.path,
            "names": list(dataset.names),
            "split": dataset.split,
            "revision": dataset.revision,
        }
    _check_columns(rows, dataset, path)
    if dataset.spread is not None:
        rows = _take_turns(rows, dataset.spread)
    # What is not named decides nothing: a twin may have more columns than the copy of the hub.
    rows = [(line, {name: row[name] for name in dataset.kept_columns if name in row}) for line, row in rows]
    left_out = 0
    if dataset.prepare is not None:
        prepared = [(line, PREPARE[dataset.prepare](row, f"{path}:{line}")) for line, row in rows]
        rows = [(line, row) for line, row in prepared if row is not None]
        left_out = len(prepared) - len(rows)
    if not rows:
        raise EvalError("none of the rows can be asked", where=str(path), hint="look at the rows of the file")
    return Found(rows, path, {**source, "rows": len(rows), "left_out": left_out})


def _take_turns(rows: Rows, column: str) -> Rows:
    """Order rows so that the values of a column take turns, each in the order of its rows."""
    turns: dict[str, int] = {}
    places = []
    for line, row in rows:
        value = str(row[column])
        turns[value] = turns.get(value, -1) + 1
        places.append((turns[value], (line, row)))
    # Sorting keeps the order of rows of one turn.
    return [row for _, row in sorted(places, key=lambda each: each[0])]


def _twin(dataset: Dataset, folder: Path, *, given: bool) -> Path | None:
    if not folder.is_dir():
        raise EvalError(
            f"there is no folder {folder}",
            where="--data" if given else DATA_VARIABLE,
            hint=f"give a folder of files such as {dataset.file}.jsonl, or {SAMPLE} for the rows that come along",
            exit_code=2,
        )
    paths = [folder / f"{dataset.file}{suffix}" for suffix in _SUFFIXES]
    return next((path for path in paths if path.exists()), None)


def _read_twin(path: Path, dataset: Dataset) -> Rows:
    if path.suffix == ".jsonl":
        return read_rows(path)
    hint = f"write {dataset.file}.jsonl with one JSON object per line instead"
    if path.suffix == ".gz":
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                text = file.read()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise EvalError(
                f"cannot unpack the file of items: {error}", where=str(path), hint=hint
            ) from error
        return parse_rows(text, path)
    # Imported here: tasks in plain files do without it.
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise EvalError(f"cannot read the file of items: {error}", where=str(path), hint=hint) from error
    return _plain(table, str(path))


def _cached(dataset: Dataset, beside: Path, *, folder: str | Path | None) -> tuple[Path, Rows]:
    """Return the rows of the copy in the cache, made from the hub where there is none or it is damaged."""
    wanted = [
        dataset.path,
        dataset.names,
        dataset.name_column,
        dataset.split,
        dataset.revision,
        dataset.columns,
    ]
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    path = _cache_dir() / f"{dataset.file}-{key}.jsonl"
    seal = path.with_suffix(".sha256")
    if path.is_file() and seal.is_file():
        text = read_text(path, what="the copy of the dataset", hint="delete it; it is made again")
        if seal.read_text(encoding="utf-8").strip() == _sha256(text):
            return path, parse_rows(text, path)
    rows = _load(dataset, beside, folder=folder)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in ((path, text), (seal, f"{_sha256(text)}\n")):
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            partial.write_text(content, encoding="utf-8", newline="")
            partial.replace(target)
    except OSError as error:
        raise EvalError(
            f"cannot keep a copy of {dataset.path}: {error.strerror or error}",
            where=str(path),
            hint=f"free space, or name another folder: export {_CACHE_VARIABLE}=FOLDER",
        ) from error
    return path, rows


def _cache_dir() -> Path:
    chosen = os.environ.get(_CACHE_VARIABLE)
    try:
        return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "gendistill") / "eval-data"
    except RuntimeError as error:
        raise EvalError(
            f"there is no cache folder: {error}", hint=f"export {_CACHE_VARIABLE}=FOLDER"
        ) from error


def _load(dataset: Dataset, beside: Path, *, folder: str | Path | None) -> Rows:
    """Load rows through the library ``datasets``."""
    # Imported here: it takes seconds, and twins do without it.
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # Of the library, of the hub's client, and of the file system; a dataset that is not there is a missing file.
    failures = (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError, LookupError)
    # A folder is named relative to the task file, a hub id has neither a file nor a folder of its name there.
    path = str(beside / dataset.path) if (beside / dataset.path).is_dir() else dataset.path
    found: list[dict[str, Any]] = []
    for name in dataset.names or (None,):
        try:
            loaded = datasets.load_dataset(path, name, split=dataset.split, revision=dataset.revision)
        except failures as error:
            raise _not_had(dataset, name, beside, error, folder=folder) from error
        columns = loaded.column_names or []
        if lacking := [column for column in dataset.columns if column not in columns]:
            raise EvalError(
                f"the dataset {dataset.path} lacks the columns {', '.join(lacking)}; it has {', '.join(columns)}",
                where=dataset.file,
                hint="name its columns under dataset.columns, and which is what under fields, in the task file",
            )
        label = {dataset.name_column: name} if dataset.name_column else {}
        found += [{**label, **dict(row)} for row in loaded.select_columns(list(dataset.columns))]
    return _plain(found, dataset.path)


def _not_had(
    dataset: Dataset, name: str | None, beside: Path, error: Exception, *, folder: str | Path | None
) -> EvalError:
    what = f"{dataset.path}{f' ({name})' if name else ''}, split {dataset.split}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    missed = (
        f"; {folder} holds no {' and no '.join(dataset.file + suffix for suffix in _SUFFIXES)}"
        if folder
        else ""
    )
    has_sample = (beside / f"{dataset.file}.sample.jsonl").is_file()
    return EvalError(
        f"cannot load {what}: {reason}{missed}",
        where=dataset.file,
        hint=f"without a network: save its rows, with the columns {', '.join(dataset.kept_columns)}, as "
        f"FOLDER/{dataset.file}.jsonl and add --data FOLDER (or export {DATA_VARIABLE}=FOLDER)"
        + (f"; --data {SAMPLE} asks the few rows that come with the package" if has_sample else ""),
    )


def _plain(rows: Sequence[Mapping[str, Any]], where: str) -> Rows:
    """Turn rows into what a line of JSON holds, numbered from 1."""
    plain = []
    for number, row in enumerate(rows, start=1):
        hint = "name only columns of texts, numbers and lists under dataset.columns in the task file"
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EvalError(f"a row is not JSON: {error}", where=f"{where}:{number}", hint=hint) from error
        plain.append((number, parse_json(text, where=f"{where}:{number}", hint=hint)))
    return plain


def _check_columns(rows: Rows, dataset: Dataset, path: Path) -> None:
    for line, row in rows:
        if lacking := [name for name in dataset.kept_columns if name not in row]:
            raise EvalError(
                f"the row lacks the columns {', '.join(lacking)}; it has {shorten(list(row))}",
                where=f"{path}:{line}",
                hint=f"give every row the columns of {dataset.path}: {', '.join(dataset.kept_columns)}",
            )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

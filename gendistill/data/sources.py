"""Open what a recipe names under `data:`: hub datasets, local files and folders, files in packages, lists."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import datasets

from gendistill.config.schema import SourceConfig
from gendistill.data.cursor import (
    MapSource,
    Rows,
    Source,
    StreamSource,
    all_held_out,
    empty,
    read_columns,
    translated,
)
from gendistill.data.files import ROW_SUFFIXES, JoinedRows, Row, open_line_file, row_suffix
from gendistill.data.packages import package_file
from gendistill.errors import DataError
from gendistill.packages import PREFIX

_KNOWN_SUFFIXES = (*ROW_SUFFIXES, ".parquet")


def open_source(config: SourceConfig, *, name: str, seed: int, skip_rows: int = 0) -> Source:
    """Open the dataset that one entry under ``data:`` names.

    Args:
        config: Path and reading options. ``limit`` counts the rows after the skipped ones.
        name: Name under ``data:``, for errors and for the shuffle.
        seed: Seed of the shuffle; every epoch has its own order.
        skip_rows: First rows, in file order, that are held out: this source never yields them.
    Raises:
        DataError: Nothing there, not readable, empty, or without the columns that the format reads.
    """
    rows = _open_rows(config, where=f"data.{name}")
    if isinstance(rows, datasets.IterableDataset):
        return StreamSource(rows, config, name=name, seed=seed, skip_rows=skip_rows)
    return MapSource(rows, config, name=name, seed=seed, skip_rows=skip_rows)


def open_list(
    rows: Sequence[Row], config: SourceConfig, *, name: str, seed: int, skip_rows: int = 0
) -> MapSource:
    """Make a source of rows in memory; ``config`` says everything but the path.

    Args:
        rows: One dictionary per row.
        config: Reading options; its path is only shown in errors.
        name: Name for errors and for the shuffle.
        seed: Seed of the shuffle.
        skip_rows: First rows that this source never yields.
    Raises:
        DataError: Empty, or without the columns that the format reads.
    """
    return MapSource(rows, config, name=name, seed=seed, skip_rows=skip_rows)


def heldout_rows(config: SourceConfig, *, name: str, rows: int) -> tuple[list[Row], tuple[str, ...]]:
    """Read the first rows of a dataset in file order: those that ``skip_rows`` reserves.

    Args:
        config: The dataset.
        name: Name under ``data:``, for errors.
        rows: How many.
    Returns:
        The rows, and the columns that the format reads.
    Raises:
        DataError: As ``open_source``; also when no row is left to train on.
    """
    where = f"data.{name}"
    found = _open_rows(config, where=where)
    if isinstance(found, datasets.IterableDataset):
        first = translated(lambda: list(itertools.islice(iter(found), rows + 1)), config, where=where)
    else:
        first = [found[index] for index in range(min(rows + 1, len(found)))]
    if not first:
        raise empty(config, where=where)
    if len(first) <= rows:
        raise all_held_out(len(first), rows, config, where=where)
    return first[:rows], read_columns(config, first[0], where=where)


def _open_rows(config: SourceConfig, *, where: str) -> Rows | datasets.IterableDataset:
    if config.path.startswith(PREFIX):
        _refuse_hub_settings(config, where=where, revision_too=False)
        path = package_file(config.path, version=config.revision, where=where)
        return _open_files([path], config, where=where)
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _open_folder(path, config, where=where)
    if path.is_file():
        _refuse_hub_settings(config, where=where)
        return _open_files([path], config, where=where)
    if glob.has_magic(config.path):
        _refuse_hub_settings(config, where=where)
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())  # noqa: PTH207
        if not files:
            raise DataError(f"no file matches {config.path}", where=where, hint=f"correct {where}.path")
        return _open_files(files, config, where=where)
    if (
        config.path.startswith((".", "/", "~"))
        or config.path.count("/") > 1
        or row_suffix(path) in _KNOWN_SUFFIXES
    ):
        raise _no_such_file(path, where=where)
    return _open_hub(config, where=where)


def _refuse_hub_settings(config: SourceConfig, *, where: str, revision_too: bool = True) -> None:
    given = {"subset": config.subset, "split": None if config.split == "train" else config.split}
    if revision_too:
        given["revision"] = config.revision
    for key, value in given.items():
        if value is not None:
            raise DataError(
                f'{key} "{value}" means nothing for files on disk',
                where=f"{where}.{key}",
                hint=f"remove {key}, and name the files that you want in {where}.path",
            )


def _no_such_file(path: Path, *, where: str) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        return DataError(
            f"there is no file {path}: the folder {parent} does not exist", where=f"{where}.path"
        )
    close = get_close_matches(path.name, [sibling.name for sibling in parent.iterdir()], n=1)
    return DataError(
        f"there is no file {path}",
        where=f"{where}.path",
        hint=f"did you mean {parent / close[0]}?" if close else f"look into {parent.resolve()}",
    )


def _open_folder(path: Path, config: SourceConfig, *, where: str) -> Rows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = translated(lambda: datasets.load_from_disk(str(path)), config, where=where)
        if isinstance(found, datasets.DatasetDict):
            if config.split not in found:
                raise DataError(
                    f'{path} has no split "{config.split}"; it has: {", ".join(map(str, found))}', where=where
                )
            return found[config.split]
        return found
    _refuse_hub_settings(config, where=where)
    files = sorted(
        file
        for file in path.rglob("*")
        if row_suffix(file) in _KNOWN_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(
            f"the folder {path} holds no {', '.join(_KNOWN_SUFFIXES)} file",
            where=where,
            hint=f"correct {where}.path",
        )
    return _open_files(files, config, where=where)


def _open_files(files: list[Path], config: SourceConfig, *, where: str) -> Rows:
    suffixes = {row_suffix(file) for file in files}
    unknown = suffixes.difference(_KNOWN_SUFFIXES)
    if unknown:
        raise DataError(
            f"cannot read {files[0].name}: known kinds are {', '.join(_KNOWN_SUFFIXES)}, json and text also as .gz",
            where=f"{where}.path",
        )
    if ".parquet" not in suffixes:
        return JoinedRows.of([open_line_file(file, where=where) for file in files])
    if len(suffixes) > 1:
        raise DataError(
            f"{config.path} mixes parquet with other files",
            where=where,
            hint="name one kind, as in data/*.parquet",
        )
    names = [str(file) for file in files]
    return translated(lambda: datasets.Dataset.from_parquet(names), config, where=where)  # type: ignore[return-value]


def _open_hub(config: SourceConfig, *, where: str) -> Rows | datasets.IterableDataset:
    return translated(
        lambda: datasets.load_dataset(
            config.path,
            config.subset,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
        ),
        config,
        where=where,
    )

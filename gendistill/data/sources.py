"""Open what a recipe names under `data:`: hub datasets, local files and folders, files in packages, lists."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from gendistill.config.schema import SourceConfig
from gendistill.data.cursor import (
    MapSource,
    Rows,
    RowSource,
    StreamSource,
    all_held_out,
    empty,
    read_columns,
    translated,
)
from gendistill.data.files import BadRow, JoinedRows, Row, open_line_file
from gendistill.data.locate import locate, reading, row_suffix
from gendistill.digests import file_stamp
from gendistill.errors import DataError
from gendistill.paths import cache_dir


def open_source(config: SourceConfig, *, name: str, seed: int, skip_rows: int = 0) -> RowSource:
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


def heldout_rows(config: SourceConfig, *, name: str, rows: int) -> tuple[list[Row | BadRow], tuple[str, ...]]:
    """Read the first rows of a dataset in file order: those that ``skip_rows`` reserves.

    Args:
        config: The dataset.
        name: Name under ``data:``, for errors.
        rows: How many.
    Returns:
        The rows, with its error for one that cannot be read, and the columns that the format reads.
    Raises:
        DataError: As ``open_source``; also when no row is left to train on.
    """
    where = f"data.{name}"
    found = _open_rows(config, where=where)
    first: list[Row | BadRow]
    if isinstance(found, datasets.IterableDataset):
        first = translated(lambda: list(itertools.islice(iter(found), rows + 1)), config, where=where)
    else:
        first = [_row_or_error(found, index) for index in range(min(rows + 1, len(found)))]
    if not first:
        raise empty(config, where=where)
    if isinstance(first[0], BadRow):
        raise first[0]
    if len(first) <= rows:
        raise all_held_out(len(first), rows, config, where=where)
    return first[:rows], read_columns(config, first[0], where=where)


def _row_or_error(rows: Rows, index: int) -> Row | BadRow:
    try:
        return rows[index]
    except BadRow as bad:
        return bad


class _Table:
    """Rows of an arrow table, as far as a format reads them."""

    def __init__(self, table: datasets.Dataset, config: SourceConfig, *, where: str) -> None:
        if not len(table):
            raise empty(config, where=where)
        columns = read_columns(config, dict.fromkeys(table.column_names), where=where)
        # columns that nobody reads may hold what cannot be decoded here
        self._table = table.with_format(None).select_columns(list(dict.fromkeys(columns)))
        self._config = config
        self._where = where

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Row:
        try:
            return translated(lambda: self._table[index], self._config, where=self._where)
        except DataError as error:
            if isinstance(error.__cause__, UnicodeDecodeError):
                raise BadRow(
                    f"row {index + 1:,} of {self._config.path} is not UTF-8",
                    reason="a row is not UTF-8",
                    where=self._where,
                ) from error
            raise


def _open_rows(config: SourceConfig, *, where: str) -> Rows | datasets.IterableDataset:
    found = locate(config, where=where)
    if found is None:
        return _open_hub(config, where=where)
    if found.saved:
        table = translated(lambda: datasets.load_from_disk(str(found.saved)), config, where=where)
    elif row_suffix(found.files[0]) == ".parquet":
        table = _open_parquet(found.files, config, where=where)
    else:
        return JoinedRows.of([open_line_file(file, where=where) for file in found.files])
    assert isinstance(table, datasets.Dataset)
    return _Table(table, config, where=where)


def _open_parquet(files: Sequence[Path], config: SourceConfig, *, where: str) -> Any:
    """Open parquet files, prepared anew whenever one of them has changed: the library looks at their dates alone."""
    stamps = []
    for file in files:
        with reading(file, where=where), file.open("rb") as content:
            stamps.append(f"{file.resolve()}\0{file_stamp(os.fstat(content.fileno()))}")
    key = hashlib.sha256(os.fsencode("\n".join(stamps))).hexdigest()[:16]
    folder = cache_dir() / "rows" / f"parquet-{key}"
    names: list[Any] = [str(file) for file in files]
    return translated(
        lambda: datasets.Dataset.from_parquet(names, cache_dir=str(folder)), config, where=where
    )


def _open_hub(config: SourceConfig, *, where: str) -> Rows | datasets.IterableDataset:
    found = translated(
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
    if isinstance(found, datasets.IterableDataset):
        return found
    assert isinstance(found, datasets.Dataset)
    return _Table(found, config, where=where)

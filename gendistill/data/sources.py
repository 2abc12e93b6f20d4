"""Open what a recipe names under `data:`: hub datasets, local files and folders, files in packages, lists."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
from gendistill.data.files import JoinedRows, Row, open_line_file
from gendistill.data.locate import locate, row_suffix


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
    found = locate(config, where=where)
    if found is None:
        return _open_hub(config, where=where)
    if found.saved:
        return translated(lambda: datasets.load_from_disk(str(found.saved)), config, where=where)  # type: ignore[return-value]
    if row_suffix(found.files[0]) != ".parquet":
        return JoinedRows.of([open_line_file(file, where=where) for file in found.files])
    names = [str(file) for file in found.files]
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

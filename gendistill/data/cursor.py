"""Endless, shuffled, resumable streams of rows."""

from __future__ import annotations

import copy
import errno
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
import httpx
import numpy as np
import pyarrow as pa
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError

from gendistill.config.schema import SourceConfig
from gendistill.data.files import BadRow, Row, warn_once
from gendistill.data.locate import TABLE_DELIMITERS, row_suffix
from gendistill.errors import DataError
from gendistill.paths import writing

BLOCK_ROWS = 1000
_DEFAULT_COLUMNS = {"text": ("text",), "messages": ("messages", "conversations")}
_SHOWN_COLUMNS = 20
_SHOWN_CHARS = 80
_OTHER_DATA = "restore the dataset, or start a new run with another name="
_RESUME = "check the network, then run the same command again: it resumes from its last checkpoint"
T = TypeVar("T")


class Rows(Protocol):
    """Rows that can be read by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class RowSource(Protocol):
    """An endless stream of rows with an exact cursor; a row that cannot be read comes as its error.

    Attributes:
        name: Name under ``data:`` in the recipe.
        columns: Columns that the format reads: one for text and messages, two for prompt and completion.
        num_rows: Rows of one epoch; None where only reading to the end would tell.
        epoch: Epochs finished.
    """

    name: str
    columns: tuple[str, ...]
    num_rows: int | None
    epoch: int

    def __next__(self) -> Row | BadRow: ...

    def first_rows(self, most: int) -> list[Row]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def read_columns(config: SourceConfig, row: Row, *, where: str) -> tuple[str, ...]:
    """Resolve the names of the columns that a format reads.

    Args:
        config: Format and, where given, column names.
        row: Any row of the dataset.
        where: Recipe path, for errors.
    Raises:
        DataError: A column does not exist; names those that do.
    """
    if config.format == "prompt_completion":
        wanted = {"prompt": config.prompt, "completion": config.completion}
    else:
        known = _DEFAULT_COLUMNS[config.format]
        default = next((column for column in known if column in row), known[0])
        wanted = {"column": config.column or default}
    for key, column in wanted.items():
        if column in row:
            continue
        close = get_close_matches(column, row, n=1)
        guess = f'did you mean "{close[0]}"? ' if close else ""
        if row_suffix(Path(config.path)) in TABLE_DELIMITERS:
            guess += "the first line of a table must name its columns; "
        has = ", ".join(name[:_SHOWN_CHARS] for name in itertools.islice(row, _SHOWN_COLUMNS))
        raise DataError(
            f'{config.path} has no column "{column}"; it has: {has or "none"}'
            + (f" and {len(row) - _SHOWN_COLUMNS:,} more" if len(row) > _SHOWN_COLUMNS else ""),
            where=where,
            hint=f"{guess}set {where}.{key}, or {where}.format if the rows are of another kind",
        )
    return tuple(wanted.values())


class MapSource:
    """Rows read by number, in a new permutation every epoch."""

    def __init__(
        self, rows: Rows | Sequence[Row], config: SourceConfig, *, name: str, seed: int, skip_rows: int = 0
    ) -> None:
        where = f"data.{name}"
        if not len(rows):
            raise empty(config, where=where)
        if skip_rows >= len(rows):
            raise all_held_out(len(rows), skip_rows, config, where=where)
        left = len(rows) - skip_rows
        self.name = name
        self.columns = read_columns(config, rows[0], where=where)
        self.num_rows: int | None = left if config.limit is None else min(left, config.limit)
        self.epoch = 0
        self._rows = rows
        self._where = where
        self._said_bad = False
        self._skip = skip_rows
        self._seed = seed if config.shuffle else None
        self._position = 0
        self._order = self._permutation()

    def __iter__(self) -> MapSource:
        return self

    def __next__(self) -> Row | BadRow:
        if self._position == self.num_rows:
            self.epoch, self._position = self.epoch + 1, 0
            self._order = self._permutation()
        row = self._read(self._position)
        self._position += 1
        return row

    def first_rows(self, most: int) -> list[Row]:
        """Read the first rows of the current epoch that can be read, without moving on."""
        assert self.num_rows is not None
        rows = (self._read(position) for position in range(min(most, self.num_rows)))
        return [row for row in rows if not isinstance(row, BadRow)]

    def _read(self, position: int) -> Row | BadRow:
        try:
            return self._rows[self._skip + int(self._order[position])]
        except BadRow as bad:
            if not self._said_bad:
                self._said_bad = True
                warn_once(f"{self._where}: {bad.message}; such rows are left out and counted")
            return bad

    def _permutation(self) -> np.ndarray | range:
        assert self.num_rows is not None
        if self._seed is None:
            return range(self.num_rows)
        return _generator(self._seed, self.name, self.epoch).permutation(self.num_rows)

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands, as JSON."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "rows": self.num_rows,
            "columns": list(self.columns),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the row that was last yielded when the state was taken.

        Raises:
            DataError: The state belongs to other data.
        """
        check_state(state, ("epoch", "position", "rows"), self.columns, where=self._where)
        if state["rows"] != self.num_rows:
            raise DataError(
                f"the dataset had {state['rows']:,} rows when the run was saved and has {self.num_rows:,} now",
                where=self._where,
                hint=_OTHER_DATA,
            )
        if state["position"] > state["rows"]:
            raise _beyond(state["position"], state["rows"], where=self._where)
        self.epoch, self._position = state["epoch"], state["position"]
        self._order = self._permutation()


class StreamSource:
    """Rows read in the order of the dataset and shuffled within blocks.

    A block is short enough to be read again on resume, which makes the cursor exact.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        config: SourceConfig,
        *,
        name: str,
        seed: int,
        skip_rows: int = 0,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        self.name = name
        self.num_rows: int | None = config.limit
        self._config = config
        self._where = f"data.{name}"
        dataset = dataset.skip(skip_rows) if skip_rows else dataset
        self._dataset = dataset if config.limit is None else dataset.take(config.limit)
        self._seed = seed if config.shuffle else None
        self._block_rows = block_rows
        self._iterator: Iterator[Row] = iter(())
        self._start(epoch=0, block=0, cursor=None)
        if not self._rows:
            if skip_rows:
                raise all_held_out(skip_rows, skip_rows, config, where=self._where)
            raise empty(config, where=self._where)
        self.columns = read_columns(config, self._rows[0], where=self._where)

    def __iter__(self) -> StreamSource:
        return self

    def __next__(self) -> Row:
        if self._position == len(self._rows):
            self._cursor = self._dataset.state_dict()
            self._block += 1
            self._read_block()
            if not self._rows:
                self._start(epoch=self.epoch + 1, block=0, cursor=None)
        row = self._rows[self._position]
        self._position += 1
        return row

    def _start(self, *, epoch: int, block: int, cursor: dict[str, Any] | None) -> None:
        self.epoch = epoch
        self._block = block
        self._cursor = cursor
        # no state at all starts at the first row: a dataset that was resumed once would start every epoch in its middle
        self._dataset.load_state_dict(copy.deepcopy(cursor) if cursor else {})
        self._iterator = iter(self._dataset)
        self._read_block()

    def _read_block(self) -> None:
        rows = translated(
            lambda: list(itertools.islice(self._iterator, self._block_rows)),
            self._config,
            where=self._where,
            hint=_RESUME,
        )
        if self._seed is not None:
            order = _generator(self._seed, self.name, self.epoch, self._block).permutation(len(rows))
            rows = [rows[index] for index in order]
        self._rows: list[Row] = rows
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands, as JSON."""
        return {
            "epoch": self.epoch,
            "block": self._block,
            "position": self._position,
            "cursor": copy.deepcopy(self._cursor),
            "columns": list(self.columns),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the row that was last yielded when the state was taken.

        Raises:
            DataError: The state belongs to other data.
        """
        check_state(state, ("epoch", "block", "position"), self.columns, where=self._where)
        cursor = state.get("cursor")
        try:
            self._start(epoch=state["epoch"], block=state["block"], cursor=cursor)
        except (KeyError, IndexError, TypeError, AttributeError, AssertionError) as error:
            # the datasets library takes its own states on trust
            raise DataError(
                f"the saved place in {self._config.path} does not fit the dataset as it is now",
                where=self._where,
                hint=_OTHER_DATA,
            ) from error
        if state["position"] > len(self._rows):
            raise _beyond(state["position"], len(self._rows), where=self._where)
        self._position = state["position"]

    def first_rows(self, most: int) -> list[Row]:
        """Return the first rows of the block that is in memory."""
        return self._rows[:most]


def check_state(state: Any, counts: Sequence[str], columns: Sequence[str], *, where: str) -> None:
    """Refuse a saved state that cannot be one of this source's.

    Args:
        state: As saved.
        counts: Entries that must be whole numbers from 0 on.
        columns: What the source reads now; a state from before columns were saved has none.
        where: Recipe path, for errors.
    """
    fine = isinstance(state, dict) and all(
        isinstance(state.get(name), int) and state[name] >= 0 for name in counts
    )
    if not fine:
        raise DataError(
            "the saved state of this source is damaged or belongs to another kind of source",
            where=where,
            hint=_OTHER_DATA,
        )
    saved = state.get("columns", list(columns))
    if saved != list(columns):
        raise DataError(
            f"the run was saved with the columns {saved} and would go on with {list(columns)}",
            where=where,
            hint=_OTHER_DATA,
        )


def _beyond(position: int, rows: int, *, where: str) -> DataError:
    return DataError(
        f"the run was saved after row {position:,} and there are only {rows:,}", where=where, hint=_OTHER_DATA
    )


def _generator(seed: int, name: str, *more: int) -> np.random.Generator:
    # the name keeps two sources of one recipe from sharing an order
    return np.random.default_rng([seed & 0xFFFFFFFF, zlib.crc32(name.encode()), *more])


def empty(config: SourceConfig, *, where: str) -> DataError:
    return DataError(
        f"{config.path} has no rows",
        where=where,
        hint="point path at another dataset, or choose another split",
    )


def all_held_out(rows: int, reserved: int, config: SourceConfig, *, where: str) -> DataError:
    return DataError(
        f"{config.path} has {rows:,} rows and heldout.rows reserves {reserved:,}: none is left to train on",
        where=where,
        hint="lower heldout.rows, or hold out rows of another dataset",
    )


def translated(read: Callable[[], T], config: SourceConfig, *, where: str, hint: str | None = None) -> T:
    """Run a read of the datasets library and turn what a user can cause into a data error.

    Args:
        read: Reads something.
        config: What is read, for errors.
        where: Recipe path, for errors.
        hint: What to do next; None: what helps when a dataset is opened.
    Raises:
        DataError: It cannot be read.
    """
    hint = hint or (
        f"check {where}.path, subset, split and revision, and the network for a hub dataset; "
        "then run the same command again"
    )
    try:
        return read()
    except (
        OSError,
        ValueError,
        EOFError,
        zlib.error,
        httpx.HTTPError,
        DatasetsError,
        pa.ArrowException,
    ) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            with writing(Path(HF_DATASETS_CACHE)):
                raise
        raise _cannot_read(error, config, where=where, hint=hint) from error
    except (RuntimeError, ImportError, AttributeError, KeyError, TypeError) as error:
        # a dataset of code, one whose decoder is missing, or one that is of another shape than it says
        if "scripts are no longer supported" in str(error):
            hint = "code of a dataset is never run: use its parquet branch (revision: refs/convert/parquet), or files"
        raise _cannot_read(error, config, where=where, hint=hint) from error


def _cannot_read(error: Exception, config: SourceConfig, *, where: str, hint: str) -> DataError:
    # the library wraps what went wrong
    reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return DataError(f"cannot read {config.path}: {lines[0][:500]}", where=where, hint=hint)

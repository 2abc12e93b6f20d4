"""Say which rows a stage did not train on, and what is odd about those that it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

_MANY = 0.1  # share of the rows of a source that may be left out before it is a warning


class HasRows(Protocol):
    """Something that knows which rows were read."""

    @property
    def dropped(self) -> Mapping[str, Mapping[str, int]]:
        """Rows left out so far, by source and reason, with the rows read under ``rows``."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What is odd about the rows, a sentence each."""
        ...


def data_record(stream: HasRows) -> dict[str, Any]:
    """Build the ``data`` entry of a stage's result.

    Returns: ``{"sources": {name: {"rows": read, "left_out": {reason: rows}}}, "notes": [sentence]}``.
    """
    return {
        "sources": {
            name: {"rows": counts["rows"], "left_out": _reasons(counts)}
            for name, counts in stream.dropped.items()
        },
        "notes": list(stream.notes),
    }


def left_out_lines(stream: HasRows, *, at_least: float = 0.0) -> list[str]:
    """Write a line for each source of which rows were left out.

    Args:
        stream: Knows them.
        at_least: Share of the rows from which on a source is named.
    """
    lines = []
    for name, counts in stream.dropped.items():
        reasons = _reasons(counts)
        num_rows = sum(reasons.values())
        if num_rows and num_rows > at_least * counts["rows"]:
            listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
            lines.append(f"data.{name}: {num_rows:,} of {counts['rows']:,} rows read are left out: {listed}")
    return lines


def heavy_losses(stream: HasRows) -> list[str]:
    """Write a line for each source of which more than a tenth of the rows was left out."""
    return left_out_lines(stream, at_least=_MANY)


def _reasons(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if reason != "rows"}

"""Scores of parts of a task: of each subject, or of each length and depth. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PART = ("subject", "length", "depth")


def break_down(
    items: Sequence[Mapping[str, Any]], correct: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]] | None:
    """Score the parts of a task.

    Args:
        items: What each item is of, in item order: subject, or length and depth.
        correct: For each protocol, how right each item was answered, in item order.
    Returns: A row per part, in the order of subject, length and depth: what it is of, n, and the mean of each protocol;
        None where the items are of no parts.
    """
    parts: dict[tuple[Any, ...], list[int]] = {}
    for place, item in enumerate(items):
        parts.setdefault(tuple(item.get(name) for name in _PART), []).append(place)
    if parts.keys() <= {(None,) * len(_PART)}:
        return None
    rows = []
    for part in sorted(parts, key=lambda part: [(value is not None, value) for value in part]):
        places = parts[part]
        means = {
            protocol: sum(flags[place] for place in places) / len(places)
            for protocol, flags in correct.items()
        }
        known = {name: value for name, value in zip(_PART, part, strict=True) if value is not None}
        rows.append({**known, "n": len(places), **means})
    return rows


def heat_table(rows: Iterable[Mapping[str, Any]], protocol: str) -> dict[str, Any] | None:
    """Arrange the parts of a task as a table of lengths and depths.

    Args:
        rows: From ``break_down``.
        protocol: Whose scores are wanted.
    Returns: ``lengths``, ``depths`` (``[null]`` where depth is not chosen), and ``values``: a row per length with a
        score per depth, null where there is none; None where the items are of no length.
    """
    cells = {(row["length"], row.get("depth")): row.get(protocol) for row in rows if "length" in row}
    if not cells:
        return None
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells}, key=lambda depth: (depth is not None, depth))
    values = [[cells.get((length, depth)) for depth in depths] for length in lengths]
    return {"lengths": lengths, "depths": depths, "values": values}

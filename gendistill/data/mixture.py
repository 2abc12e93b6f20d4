"""Draw rows from several sources by weight, without chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gendistill.data.cursor import RowSource
from gendistill.data.files import BadRow, Row
from gendistill.errors import DataError


class Mixture:
    """Sources in turns: after any number of draws each has its share of rows to within one or so.

    The next row comes from the source that lags most behind its weight. Chance would only add variance: every
    source is shuffled already.
    """

    def __init__(
        self, sources: Mapping[str, RowSource], weights: Mapping[str, float], *, where: str = "data"
    ) -> None:
        bad = {name: weight for name, weight in weights.items() if not 0 < weight < float("inf")}
        if bad:
            raise DataError(
                f"weights must be positive numbers, got {bad}", where=where, hint="remove the source"
            )
        assert list(sources) == list(weights)
        self.sources = dict(sources)
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in weights.items()}
        self._drawn = dict.fromkeys(sources, 0)

    def __iter__(self) -> Mixture:
        return self

    def __next__(self) -> tuple[str, Row | BadRow]:
        total = sum(self._drawn.values()) + 1
        name = max(self._shares, key=lambda each: self._shares[each] * total - self._drawn[each])
        self._drawn[name] += 1
        return name, next(self.sources[name])

    def state_dict(self) -> dict[str, Any]:
        """Say where every source stands, as JSON."""
        return {
            "drawn": dict(self._drawn),
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the row that was last drawn when the state was taken.

        Raises:
            DataError: The state belongs to other data.
        """
        if set(state["drawn"]) != set(self.sources) or set(state["sources"]) != set(self.sources):
            raise DataError(
                f"the run was saved with the sources {', '.join(sorted(state['drawn']))} and would go on with "
                f"{', '.join(sorted(self.sources))}",
                where="data",
                hint="restore the recipe, or start a new run with another name=",
            )
        self._drawn = {name: state["drawn"][name] for name in self.sources}
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])

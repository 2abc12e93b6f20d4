"""Conditions on measured values, as in ``--gate "gap<=3"``: a name, a comparison and a number.

Gaps are losses here: ``gap<=3`` asks that at most 3 points are lost, whatever sign tables give a loss.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gendistill.errors import GendistillError, RecipeError
from gendistill.text import printable

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(
    r"\s*(?:(?P<task>.+)\.)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*(?P<op><=|>=|<|>)\s*(?P<limit>[-+]?[0-9]*\.?[0-9]+)\s*",
    re.DOTALL,
)


class GateError(GendistillError):
    """A gate that is not met: everything ran, and the result is not good enough."""

    kind = "gate not met"
    exit_code = 3


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition.

    Attributes:
        name: What is measured.
        op: A key of ``OPERATORS``.
        limit: What it is compared with.
        task: The task it is measured on; None for all of them together.
    """

    name: str
    op: str
    limit: float
    task: str | None = None

    def __str__(self) -> str:
        place = f"{printable(self.task)}." if self.task is not None else ""
        return f"{place}{self.name}{self.op}{self.limit:g}"

    def holds(self, value: float) -> bool:
        """Tell whether a measured value meets the condition."""
        return OPERATORS[self.op](value, self.limit)


def parse_gate(text: str, names: Collection[str] | None = None) -> Gate:
    """Read a gate.

    Args:
        text: ``gap<=3``, or ``mmlu.gap <= 3`` for one task.
        names: What can be measured; None allows any name.
    Raises:
        RecipeError: The text has another form, or nobody measures such a thing.
    """
    match = _FORM.fullmatch(text)
    known = f"; names: {', '.join(sorted(names))}" if names is not None else ""
    if match is None:
        raise RecipeError(
            f'a gate is a name, one of {" ".join(OPERATORS)} and a number, got "{printable(text)}"{known}',
            where="--gate",
            hint='--gate "gap<=3", or --gate "TASK.gap<=3" for one task',
        )
    if names is not None and match["name"] not in names:
        near = difflib.get_close_matches(match["name"], names, n=1)
        guess = f'; did you mean "{near[0]}"?' if near else ""
        raise RecipeError(
            f'nothing called "{printable(match["name"])}" is measured{guess}{known}', where="--gate"
        )
    return Gate(match["name"], match["op"], float(match["limit"]), match["task"])


def check_gate(gate: Gate, value: float | None, *, of: str) -> str:
    """Hold a measured value against a gate.

    Args:
        gate: The condition.
        value: What was measured; None for nothing, which meets no gate.
        of: What it was measured of, for the message.
    Returns: A line that says the gate is met, with the value.
    Raises:
        GateError: It is not met; says the value.
    """
    if value is None or math.isnan(value):
        raise GateError(f"{gate}: {gate.name} is not measured", where=printable(of, longest=2000))
    if not gate.holds(value):
        raise GateError(f"{gate}: {gate.name} is {value:.4g}", where=printable(of, longest=2000))
    # + 0.0: a gap of -0 is written 0
    return f"gate {gate} is met: {gate.name} is {value + 0.0:.4g} ({printable(of, longest=2000)})"

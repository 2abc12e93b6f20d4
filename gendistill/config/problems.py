"""What is wrong with a recipe: every problem at once, each with its line. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gendistill.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        place: ``file:line``, or ``command line``.
        path: Dotted path of the setting, empty for the whole file.
        message: What is wrong, what was given, what is allowed; may have several lines.
        hint: The next command or edit.
    """

    place: str
    path: str
    message: str
    hint: str | None = None

    @property
    def where(self) -> str:
        """Place and dotted path, as printed."""
        return f"{self.place}  {self.path}".rstrip()


class RecipeProblems(RecipeError):
    """A recipe with something wrong in it; lists everything, not only the first thing."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.message, where=first.where, hint=first.hint)

    def __str__(self) -> str:
        blocks = []
        for problem in self.problems:
            lines = [f"{self.kind}  {problem.where}"]
            lines += [f"  {line}" for line in problem.message.splitlines()]
            lines += [f"  next: {problem.hint}"] if problem.hint else []
            blocks.append("\n".join(lines))
        if len(blocks) > 1:
            blocks.append(f"{len(blocks)} problems; nothing was run")
        return "\n".join(blocks)

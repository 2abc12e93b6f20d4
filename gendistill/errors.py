"""Every error a user can cause. Each says what is wrong, where, what was given and what to run next."""

from __future__ import annotations

from gendistill.text import encodable


class GendistillError(Exception):
    """An error with a message for people, an optional place and an optional next step.

    Args:
        message: What is wrong, what was given and what is allowed.
        where: File and line, recipe path or module name.
        hint: The next command or edit that fixes it.
    """

    kind = "error"
    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        # paths and data may hold half characters, which no terminal and no file takes
        self.message = encodable(message)
        self.where = where and encodable(where)
        self.hint = hint and encodable(hint)

    def __str__(self) -> str:
        lines = [f"{self.kind}  {self.where}" if self.where else self.kind, f"  {self.message}"]
        if self.hint:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)


class RecipeError(GendistillError):
    """A recipe, an override or a command line that is wrong; nothing has run yet."""

    kind = "recipe error"
    exit_code = 2


class CheckpointError(GendistillError):
    """A checkpoint that is missing, corrupt, unsupported or does not fit."""

    kind = "checkpoint error"


class DataError(GendistillError):
    """A dataset that is missing, empty or lacks what the recipe asks for."""

    kind = "data error"


class TrainingError(GendistillError):
    """A run that cannot go on, with the stage, step and module."""

    kind = "training error"


class OutputError(GendistillError):
    """A folder that cannot be written or a disk that is full."""

    kind = "output error"


class ReportError(GendistillError):
    """Files of a run that do not support a report: scores are missing, or cannot be compared."""

    kind = "report error"

"""The one error of this package. It says what is wrong, where, and what to do next."""

from __future__ import annotations


class EvalError(Exception):
    """A task, a file or a model that cannot be evaluated as asked.

    Args:
        message: What is wrong, what was given and what is allowed.
        where: File and line, task or item.
        hint: The next command or edit that fixes it.
        exit_code: 2 for a wrong name on the command line, else 1.
    """

    kind = "evaluation error"

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, exit_code: int = 1
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        lines = [f"{self.kind}  {self.where}" if self.where else self.kind, f"  {self.message}"]
        if self.hint:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)

"""Instructions whose following can be told from a text: IFEval, strictly and loosely. Imports no torch."""

from __future__ import annotations

from gendistill_evals.instructions.checkers import CHECKERS, Checker
from gendistill_evals.instructions.judge import (
    Followed,
    Instruction,
    cannot_check,
    followed,
    instructions_of,
    judge_instructions,
    lacks,
    summarise,
    task_row,
)

__all__ = [
    "CHECKERS",
    "Checker",
    "Followed",
    "Instruction",
    "cannot_check",
    "followed",
    "instructions_of",
    "judge_instructions",
    "lacks",
    "summarise",
    "task_row",
]

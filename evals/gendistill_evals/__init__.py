"""Score any Hugging Face causal language model by log-likelihood and by generation on the same items.

Importing this package imports no torch; ``evaluate_model`` does when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gendistill_evals.errors import EvalError
from gendistill_evals.task import (
    Item,
    Question,
    Questions,
    Task,
    list_questions,
    list_tasks,
    load_questions,
    load_task,
    load_tasks,
    questions_identity,
    task_identity,
)

if TYPE_CHECKING:
    from gendistill_evals.evaluate import evaluate_model

__all__ = [
    "EvalError",
    "Item",
    "Question",
    "Questions",
    "Task",
    "evaluate_model",
    "list_questions",
    "list_tasks",
    "load_questions",
    "load_task",
    "load_tasks",
    "questions_identity",
    "task_identity",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate_model":
        from gendistill_evals.evaluate import evaluate_model

        return evaluate_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Score any causal language model by log-likelihood and by generation on the same items.

Importing this package imports no torch; ``HFModel`` does when it is first used, by itself or by ``evaluate_model``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gendistill_evals import code, instructions
from gendistill_evals.code import judge_code
from gendistill_evals.errors import EvalError
from gendistill_evals.evaluate import evaluate_model
from gendistill_evals.instructions import judge_instructions
from gendistill_evals.items import Item, Message
from gendistill_evals.judges import JUDGES, LACKS, WHY_NOT, Judgement
from gendistill_evals.keeping import KeepingModel
from gendistill_evals.lm_eval_tasks import load_if_lm_eval
from gendistill_evals.model import LanguageModel
from gendistill_evals.prompts import Style
from gendistill_evals.protocols import (
    PROTOCOLS,
    EvalProtocol,
    Generation,
    Likelihood,
    ProtocolFamily,
    ProtocolRun,
)
from gendistill_evals.task import (
    LOADERS,
    Question,
    Questions,
    Task,
    list_questions,
    list_tasks,
    load_questions,
    load_task,
    load_tasks,
    outline_tasks,
    questions_identity,
    task_identity,
)

if TYPE_CHECKING:
    from gendistill_evals.hf import HFModel

# They need ``judges`` and items, so they join it from here.
JUDGES.update({"code": judge_code, "instructions": judge_instructions})
LACKS.update({"code": code.lacks, "instructions": instructions.lacks})
WHY_NOT.update({"code": code.why_not})
LOADERS.append(load_if_lm_eval)

__all__ = [
    "JUDGES",
    "PROTOCOLS",
    "EvalError",
    "EvalProtocol",
    "Generation",
    "HFModel",
    "Item",
    "Judgement",
    "KeepingModel",
    "LanguageModel",
    "Likelihood",
    "Message",
    "ProtocolFamily",
    "ProtocolRun",
    "Question",
    "Questions",
    "Style",
    "Task",
    "evaluate_model",
    "list_questions",
    "list_tasks",
    "load_questions",
    "load_task",
    "load_tasks",
    "outline_tasks",
    "questions_identity",
    "task_identity",
]


def __getattr__(name: str) -> Any:
    if name == "HFModel":
        from gendistill_evals.hf import HFModel

        return HFModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

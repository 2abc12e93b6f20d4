"""Let a student write while it trains: open questions beside the teacher, and tasks by generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gendistill_evals.hf import HFModel
from gendistill_evals.protocols import PROTOCOLS, ProtocolFamily, lead_protocols
from gendistill_evals.task import load_questions, load_tasks
from gendistill_evals.transcripts import write_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TaskExaminer:
    """An examiner for a recipe's stages, by the same rules as its evaluation.

    Args:
        teacher: Answers each question once.
        tokenizer: Of both models.
        questions: Built-in name or file of open questions.
        answer_tokens: New tokens per open answer.
        batch_size: Sequences at once.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        questions: str = "demo",
        answer_tokens: int = 48,
        batch_size: int = 8,
    ) -> None:
        self.teacher, self.tokenizer = teacher, tokenizer
        self.questions, self.answer_tokens, self.batch_size = questions, answer_tokens, batch_size
        self._teacher_answers: dict[Any, str] | None = None

    def answers(self, student: PreTrainedModel) -> list[dict[str, Any]]:
        """Ask the open questions; the teacher is asked when this is called first."""
        if self._teacher_answers is None:
            self._teacher_answers = {row["id"]: row["answer"] for row in self._ask(self.teacher)}
        return [
            {
                "id": row["id"],
                "question": row["question"],
                "student": row["answer"],
                "teacher": self._teacher_answers[row["id"]],
                "num_tokens": row["num_tokens"],
                "truncated": row["truncated"],
                "repeated_4gram_share": row["repeated_4gram_share"],
            }
            for row in self._ask(student)
        ]

    def score(self, student: PreTrainedModel, task: str, limit: int | None) -> dict[str, float]:
        """Score the student on the first items of a task, by the leading protocol of generation."""
        protocol = PROTOCOLS[lead_protocols()[ProtocolFamily.GENERATION]]
        (loaded,) = load_tasks([task])
        score = protocol.run(self._model(student), loaded, limit=limit).score
        return {
            name: score[name]
            for name in ("value", "n", "truncated", "extraction_failures", "mean_new_tokens")
        }

    def _ask(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        return write_answers(
            self._model(model), load_questions(self.questions), max_new_tokens=self.answer_tokens
        )

    def _model(self, model: PreTrainedModel) -> HFModel:
        return HFModel(model, self.tokenizer, batch_size=self.batch_size)

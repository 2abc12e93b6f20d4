"""Let a student write while it trains: open questions beside the teacher, and tasks by generation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from gendistill.runs.asking import asked
from gendistill_evals.evaluate import check_evaluation
from gendistill_evals.hf import HFModel
from gendistill_evals.model import Limits
from gendistill_evals.prompts import Prompter
from gendistill_evals.protocols import PROTOCOLS, ProtocolFamily, lead_protocols
from gendistill_evals.task import built, load_questions, load_task
from gendistill_evals.transcripts import write_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gendistill.config.schema import Recipe


class TaskExaminer:
    """An examiner for a recipe's stages, by the same rules as its evaluation.

    Args:
        teacher: Answers each question once.
        tokenizer: Of both models.
        questions: Built-in name or file of open questions.
        answer_tokens: New tokens per open answer.
        batch_size: Sequences at a time; None for as many as memory allows.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        questions: str = "demo",
        answer_tokens: int = 48,
        batch_size: int | None = None,
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
        loaded = load_task(task)
        with self._model(student) as model:
            # a task whose texts are generated gets them here
            whole = built(loaded, Prompter(model.tokenizer), model.max_tokens)
            score = protocol.run(model, whole, limit=limit).score
        return {
            name: score[name]
            for name in ("value", "n", "truncated", "extraction_failures", "mean_new_tokens")
        }

    def _ask(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        with self._model(model) as opened:
            return write_answers(opened, load_questions(self.questions), max_new_tokens=self.answer_tokens)

    def _model(self, model: PreTrainedModel) -> AbstractContextManager[HFModel]:
        # neither is to be touched while a stage trains
        return asked(model, self.tokenizer, batch_size=self.batch_size, learns=True)


def check_examiner(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any]) -> None:
    """Refuse what a recipe's stages could not ask while they train.

    Args:
        recipe: Its ``watch:`` section and its stages' ``stop_early`` count.
        tokenizer: Of both models.
        config: The teacher's.
    Raises:
        EvalError: A task or questions that cannot be read or asked.
    """
    limits = model_limits(config)
    written = [lead_protocols()[ProtocolFamily.GENERATION]]
    stops = [stage.stop_early for stage in recipe.stages.values() if stage.stop_early is not None]
    scored = [(stop.task, stop.limit) for stop in stops]
    watch = recipe.watch
    if watch.score_every_steps is not None:
        scored.append((watch.task, watch.task_limit))
    for task, limit in scored:
        check_evaluation(limits, tokenizer, tasks=[load_task(task)], protocols=written, limit=limit)
    if watch.answers_every_steps is not None:
        check_evaluation(
            limits, tokenizer, tasks=[], questions=watch.questions, question_tokens=watch.answer_tokens
        )


def model_limits(config: Mapping[str, Any]) -> Limits:
    """Return what a model of a configuration can be asked."""
    return Limits(max_tokens=config.get("max_position_embeddings"), vocab_size=config.get("vocab_size"))

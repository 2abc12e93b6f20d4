"""Greedy answers to open questions, and two numbers that catch degenerate ones. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.errors import EvalError
from gendistill_evals.model import Generated, LanguageModel, Limits, Pair, Request, check_fits
from gendistill_evals.prompts import PLAIN_STYLE, Prompter, Style, opened
from gendistill_evals.protocols import OnProgress
from gendistill_evals.task import Questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_answers(
    model: LanguageModel,
    questions: Questions,
    *,
    max_new_tokens: int = 64,
    teacher: LanguageModel | None = None,
    style: Style = PLAIN_STYLE,
    progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Answer open questions greedily.

    Args:
        model: The model that answers.
        questions: What to ask.
        max_new_tokens: Longest answer, in tokens.
        teacher: Model of the same tokenizer that scores the answers; None leaves ``teacher_nll`` null.
        style: How prompts are made; open questions have no examples to show.
        progress: Called with questions answered and questions in all.
    Returns: One row per question, as in ``transcripts.jsonl``.
    """
    prompter = Prompter(model.tokenizer, style)
    requests = [
        Request(
            prompter.prompt_ids(opened(question.question, system=style.system)),
            max_new_tokens=max_new_tokens,
            stop=prompter.stop,
            name=f"{questions.name}, question {question.id}",
        )
        for question in questions.items
    ]
    found: dict[int, Generated] = {}
    for index, answer in model.generate(requests, greedy_decoding(model, prompter)):
        found[index] = answer
        if progress:
            progress(len(found), len(requests))
    answers = [found[index] for index in range(len(requests))]
    nlls: list[float | None] = [None] * len(requests)
    # An empty answer has no tokens to score.
    scored = [place for place, answer in enumerate(answers) if answer.token_ids]
    if teacher is not None and scored:
        _check_vocabulary(teacher, [answers[place].token_ids for place in scored])
        pairs = [
            Pair(
                requests[place].prompt,
                answers[place].token_ids,
                f"{requests[place].name}, scored by the teacher",
            )
            for place in scored
        ]
        for index, values in teacher.log_probs(pairs):
            nlls[scored[index]] = -math.fsum(values) / len(values)
    return [
        {
            "id": question.id,
            "question": question.question,
            "answer": answer.text,
            "num_tokens": len(answer.token_ids),
            "truncated": answer.truncated,
            "repeated_4gram_share": repeated_ngram_share(answer.token_ids),
            "teacher_nll": nll,
        }
        for question, answer, nll in zip(questions.items, answers, nlls, strict=True)
    ]


def check_questions(
    model: LanguageModel | Limits,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    *,
    max_new_tokens: int,
    teacher: LanguageModel | None = None,
    style: Style = PLAIN_STYLE,
) -> None:
    """Check that a model can answer open questions and its teacher can score answers; arguments as above.

    Raises:
        EvalError: A question that is too long for one of them, or has tokens that it does not know.
    """
    prompter = Prompter(tokenizer, style)
    prompts = [
        prompter.prompt_ids(opened(question.question, system=style.system)) for question in questions.items
    ]
    for reader, role in ((model, "transcripts"), (teacher, "transcripts, the teacher that scores answers")):
        if reader is not None:
            check_fits(reader, prompts, where=f"{questions.name}, {role}", num_new_tokens=max_new_tokens)


def answer_nll(model: LanguageModel, question: str, answer_ids: Sequence[int]) -> float:
    """Compute how surprised a model is by an answer.

    Args:
        model: The model that judges, often the teacher of the one that answered.
        question: The user's message.
        answer_ids: Tokens of the answer.
    Returns: Negative log-likelihood in nats, averaged over the answer's tokens.
    Raises:
        EvalError: The answer is empty, or has tokens that the model does not know.
    """
    if not answer_ids:
        raise EvalError("an empty answer has no negative log-likelihood per token")
    _check_vocabulary(model, [answer_ids])
    prompt = Prompter(model.tokenizer).prompt_ids(question)
    ((_, values),) = model.log_probs([Pair(prompt, answer_ids)])
    return -math.fsum(values) / len(values)


def repeated_ngram_share(tokens: Sequence[int], n: int = 4) -> float:
    """Compute the share of n-grams that occurred before: 0 is none, towards 1 is a loop.

    Args:
        tokens: Token ids.
        n: Length of the n-grams in tokens.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _check_vocabulary(model: LanguageModel, answers: Sequence[Sequence[int]]) -> None:
    size = model.vocab_size
    largest = max(max(ids) for ids in answers)
    if size is not None and largest >= size:
        raise EvalError(
            f"the answer has token {largest}, the model that scores it knows {size:,} tokens",
            hint="score answers with a model of the same tokenizer",
        )

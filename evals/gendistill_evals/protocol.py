"""The two protocols: rank the options by log-likelihood, or generate an answer and find it in the text.

Both ask the same items with the same prompt, token for token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gendistill_evals.decoding import Generated, generate_greedily, greedy_decoding
from gendistill_evals.errors import EvalError
from gendistill_evals.extract import find_letter, find_option, last_number, normalise, parse_number
from gendistill_evals.items import AnswerForm, Item, Kind
from gendistill_evals.prompts import Prompter
from gendistill_evals.scoring import Limits, Pair, check_fits, continuation_log_probs
from gendistill_evals.task import Metric, Task

PROTOCOLS = ("likelihood", "generation")

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ProtocolRun:
    """One task under one protocol.

    Attributes:
        score: The task's entry in ``results.json``: value, n, counts and seconds.
        samples: One entry per item, in item order, as in ``samples.jsonl``.
    """

    score: dict[str, Any]
    samples: tuple[dict[str, Any], ...]


def run_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: OnProgress | None = None,
) -> ProtocolRun:
    """Choose, for every item, the option with the highest log-likelihood as the answer.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        task: Task whose items have options.
        limit: Items to score, from the first; None scores all.
        batch_size: Rows per forward.
        progress: Called with items done and items in all.
    Raises:
        EvalError: The task has no options; ``task.likelihood_reason`` says why.
    """
    if task.likelihood_reason:
        raise EvalError(f"log-likelihood cannot score {task.name}: {task.likelihood_reason}", where=task.name)
    started = time.perf_counter()
    items = task.items[:limit]
    pairs = _pairs(Prompter(tokenizer), items)
    names = [f"{task.name}, item {item.id}" for item in items for _ in item.options or ()]

    def on_pairs(done: int) -> None:
        if progress:
            progress(done * len(items) // len(pairs), len(items))

    log_probs = iter(
        continuation_log_probs(model, pairs, batch_size=batch_size, names=names, progress=on_pairs)
    )
    samples = tuple(
        _ranked(item, [next(log_probs) for _ in item.options or ()], task.metric) for item in items
    )
    score = {
        "value": _share(sample["correct"] for sample in samples),
        "n": len(samples),
        "seconds": time.perf_counter() - started,
    }
    return ProtocolRun(score, samples)


def run_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: OnProgress | None = None,
) -> ProtocolRun:
    """Let the model answer every item greedily, and compare what it says with the right answer.

    Args:
        model: Causal language model with ``generate``.
        tokenizer: Its tokenizer.
        task: Any task.
        limit: Items to score, from the first; None scores all.
        batch_size: Prompts per batch.
        progress: Called with items done and items in all.
    """
    started = time.perf_counter()
    items = task.items[:limit]
    prompter = Prompter(tokenizer)
    answers = generate_greedily(
        model,
        tokenizer,
        [prompter.prompt_ids(item.prompt) for item in items],
        greedy_decoding(model, prompter),
        max_new_tokens=task.max_new_tokens,
        stop=(*task.stop, *prompter.stop),
        batch_size=batch_size,
        names=[f"{task.name}, item {item.id}" for item in items],
        progress=(lambda done: progress(done, len(items))) if progress else None,
    )
    samples = tuple(_judged(item, answer, task) for item, answer in zip(items, answers, strict=True))
    score = {
        "value": _share(sample["correct"] for sample in samples),
        "n": len(samples),
        "extraction_failures": sum(sample["extracted"] is None for sample in samples),
        "truncated": sum(sample["truncated"] for sample in samples),
        "eos_rate": _share(sample["ended"] for sample in samples),
        "mean_new_tokens": sum(sample["num_tokens"] for sample in samples) / len(samples),
        "seconds": time.perf_counter() - started,
    }
    return ProtocolRun(score, samples)


def check_items(
    model: PreTrainedModel | Limits,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    protocol: str,
    *,
    limit: int | None = None,
) -> None:
    """Check that a model can read every item of a task under a protocol; arguments as above.

    Raises:
        EvalError: Items that are too long for it, or have tokens that it does not know.
    """
    prompter, items, where = Prompter(tokenizer), task.items[:limit], f"{task.name}, {protocol}"
    if protocol == "likelihood":
        # The last token of a sequence is predicted and not read, but the model has to know it.
        whole = [[*context, *ending] for context, ending in _pairs(prompter, items)]
        check_fits(model, [ids[:-1] for ids in whole], where=where)
        check_fits(model, [ids[-1:] for ids in whole], where=where)
    else:
        prompts = [prompter.prompt_ids(item.prompt) for item in items]
        check_fits(model, prompts, where=where, num_new_tokens=task.max_new_tokens)


def judge(task: Task, item: Item, text: str) -> tuple[str | None, bool]:
    """Find the answer in a generated text and compare it with the right one.

    Args:
        task: Says how answers are judged.
        item: The question.
        text: What the model generated.
    Returns: The answer found, or None, and whether it is right.
    """
    if task.kind is Kind.NUMERIC:
        number = last_number(text)
        return (None, False) if number is None else (str(number), number == parse_number(item.gold))
    if task.kind is Kind.EXACT_MATCH:
        answer = normalise(text)
        return (answer, answer == normalise(item.gold)) if answer else (None, False)
    assert item.options is not None
    assert item.texts is not None
    if task.answer is AnswerForm.LETTER or not item.texts:
        found = find_letter(text, item.options, item.texts)
    else:
        found = find_option(text, item.options)
    return found, found == item.gold


def _pairs(prompter: Prompter, items: Sequence[Item]) -> list[Pair]:
    """Tokenize each item with each of its options."""
    pairs: list[Pair] = []
    for item in items:
        assert item.options is not None
        context, endings = prompter.split(item.prompt, item.options)
        pairs += [(context, ending) for ending in endings]
    return pairs


def _ranked(item: Item, log_probs: Sequence[Sequence[float]], metric: Metric) -> dict[str, Any]:
    assert item.options is not None
    scores = [math.fsum(values) for values in log_probs]
    per_token = [total / len(values) for total, values in zip(scores, log_probs, strict=True)]
    ranked_by = per_token if metric is Metric.ACCURACY_PER_TOKEN else scores
    choice = ranked_by.index(max(ranked_by))
    return {
        "correct": item.options[choice] == item.gold,
        "choice": choice,
        "scores": scores,
        "scores_per_token": per_token,
    }


def _judged(item: Item, answer: Generated, task: Task) -> dict[str, Any]:
    extracted, correct = judge(task, item, answer.text)
    return {
        "correct": correct,
        "text": answer.text,
        "extracted": extracted,
        "truncated": answer.truncated,
        "ended": answer.ended,
        "num_tokens": len(answer.token_ids),
    }


def _share(flags: Any) -> float:
    values = list(flags)
    return sum(values) / len(values)

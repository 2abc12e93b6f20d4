"""The protocols: rank the options by log-likelihood, or generate an answer and judge its text. Imports no torch.

All ask the same items with the same prompt, token for token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.errors import EvalError
from gendistill_evals.items import Item
from gendistill_evals.judges import JUDGES
from gendistill_evals.model import Generated, LanguageModel, Limits, Pair, Request, check_fits
from gendistill_evals.prompts import Prompter
from gendistill_evals.task import Metric, Task
from gendistill_evals.verbatim import Verbatim, whole_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnProgress = Callable[[int, int], None]
# Raised whenever the same model may get another score than before on the same items.
RULES = 3


class ProtocolFamily(StrEnum):
    """The two kinds of protocol: one asks a model to rank answers, the other to write one.

    The hidden gap is the generation gap minus the likelihood gap: what ranking does not show.
    """

    LIKELIHOOD = "likelihood"
    GENERATION = "generation"


@dataclass(frozen=True, slots=True)
class ProtocolRun:
    """One task under one protocol.

    Attributes:
        score: The task's entry in ``results.json``: value and n; by generation also extraction_failures, truncated,
            eos_rate and mean_new_tokens. ``evaluate_model`` adds the seconds that the model took.
        samples: One entry per item, in item order, as in ``samples.jsonl``: correct; by generation also text,
            extracted, truncated, ended and num_tokens.
    """

    score: dict[str, Any]
    samples: tuple[dict[str, Any], ...]


class EvalProtocol(Protocol):
    """One way to score a task.

    Attributes:
        name: Key of ``PROTOCOLS`` and of the entries in the files; a protocol whose rules change takes another name.
        label: A few letters for the heads of tables.
        family: What it asks of a model; files and tables expect the entries that ``ProtocolRun`` names.
    """

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def family(self) -> ProtocolFamily: ...

    def why_not(self, task: Task) -> str | None:
        """Say why this protocol cannot score a task; None if it can."""
        ...

    def check(
        self,
        model: LanguageModel | Limits,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        limit: int | None = None,
    ) -> None:
        """Check that a model can read all that ``run`` would ask; the model need not be loaded.

        Raises:
            EvalError: Items that are too long for it, or have tokens that it does not know.
        """
        ...

    def run(
        self,
        model: LanguageModel,
        task: Task,
        *,
        limit: int | None = None,
        progress: OnProgress | None = None,
    ) -> ProtocolRun:
        """Score a model on a task.

        Args:
            model: What is scored.
            task: A task that ``why_not`` has nothing against.
            limit: Items to score, from the first; None scores all.
            progress: Called with items done and items in all.
        """
        ...


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A choice, for every item, of the option with the highest log-likelihood.

    Attributes:
        name, label: As for ``EvalProtocol``.
        metric: What options are ranked by; None is the task's metric.
    """

    name: str
    label: str
    metric: Metric | None = None

    @property
    def family(self) -> ProtocolFamily:
        """Ranks answers."""
        return ProtocolFamily.LIKELIHOOD

    def why_not(self, task: Task) -> str | None:
        """Say why a task has nothing to rank; None if it has."""
        if task.items[0].options:
            return None
        return "the items have no distractors that the gold answer could be ranked against"

    def check(
        self,
        model: LanguageModel | Limits,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        limit: int | None = None,
    ) -> None:
        """Check that a model can read every item with each of its options."""
        where = f"{task.name}, {self.name}"
        pairs = _pairs(Prompter(tokenizer), task, task.items[:limit])
        # The last token of a sequence is predicted and not read, but the model has to know it.
        whole = [[*pair.context, *pair.continuation] for pair in pairs]
        check_fits(model, [ids[:-1] for ids in whole], where=where)
        check_fits(model, [ids[-1:] for ids in whole], where=where)

    def run(
        self,
        model: LanguageModel,
        task: Task,
        *,
        limit: int | None = None,
        progress: OnProgress | None = None,
    ) -> ProtocolRun:
        """Score a model on a task whose items have options.

        Raises:
            EvalError: They have none; ``why_not`` says so.
        """
        if reason := self.why_not(task):
            raise EvalError(f"log-likelihood cannot score {task.name}: {reason}", where=task.name)
        items = task.items[:limit]
        pairs = _pairs(Prompter(model.tokenizer), task, items)
        found: dict[int, list[float]] = {}
        for index, values in model.log_probs(pairs):
            found[index] = values
            if progress:
                progress(len(found) * len(items) // len(pairs), len(items))
        log_probs = iter([found[index] for index in range(len(pairs))])
        metric = self.metric or task.metric
        samples = tuple(
            _ranked(item, [next(log_probs) for _ in item.options or ()], metric) for item in items
        )
        score = {
            "value": _share(sample["correct"] for sample in samples),
            "n": len(samples),
        }
        return ProtocolRun(score, samples)


@dataclass(frozen=True, slots=True)
class Generation:
    """A greedy answer to every item, which the task's judge compares with gold.

    Attributes:
        name, label: As for ``EvalProtocol``.
    """

    name: str
    label: str

    @property
    def family(self) -> ProtocolFamily:
        """Writes answers."""
        return ProtocolFamily.GENERATION

    def why_not(self, task: Task) -> str | None:
        """Return None: every task can be answered."""
        return None

    def check(
        self,
        model: LanguageModel | Limits,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        limit: int | None = None,
    ) -> None:
        """Check that a model can read every prompt and the longest answer after it."""
        prompter = Prompter(tokenizer)
        prompts = [prompter.prompt_ids(item.prompt) for item in task.items[:limit]]
        check_fits(model, prompts, where=f"{task.name}, {self.name}", num_new_tokens=task.max_new_tokens)

    def run(
        self,
        model: LanguageModel,
        task: Task,
        *,
        limit: int | None = None,
        progress: OnProgress | None = None,
    ) -> ProtocolRun:
        """Score a model on any task."""
        items = task.items[:limit]
        prompter = Prompter(model.tokenizer)
        requests = [
            Request(
                prompter.prompt_ids(item.prompt),
                max_new_tokens=task.max_new_tokens,
                stop=(*task.stop, *prompter.stop_after(item.prompt)),
                name=f"{task.name}, item {item.id}",
            )
            for item in items
        ]
        answers: dict[int, Generated] = {}
        for index, answer in model.generate(requests, greedy_decoding(model, prompter)):
            if isinstance(items[index].prompt, Verbatim):
                # Whoever judges these answers judges their white space too.
                said = whole_answer(model.tokenizer, answer.token_ids, requests[index].stop)
                answer = replace(answer, text=said)
            answers[index] = answer
            if progress:
                progress(len(answers), len(items))
        samples = tuple(_judged(item, answers[index], task) for index, item in enumerate(items))
        score = {
            "value": _share(sample["correct"] for sample in samples),
            "n": len(samples),
            "extraction_failures": sum(sample["extracted"] is None for sample in samples),
            "truncated": sum(sample["truncated"] for sample in samples),
            "eos_rate": _share(sample["ended"] for sample in samples),
            "mean_new_tokens": sum(sample["num_tokens"] for sample in samples) / len(samples),
        }
        return ProtocolRun(score, samples)


# The first of each family are those that an evaluation runs if nothing else is asked for, and that the hidden gap
# compares. Other packages add theirs, which run where they are asked for by name.
PROTOCOLS: dict[str, EvalProtocol] = {
    protocol.name: protocol
    for protocol in (
        Likelihood("likelihood", "ll"),
        Generation("generation", "gen"),
    )
}


def lead_protocols(names: Iterable[str] | None = None) -> dict[ProtocolFamily, str]:
    """Name the first protocol of each family, in the order of ``PROTOCOLS``.

    Args:
        names: Protocols to choose from; None for all.
    Returns: A name per family, likelihood first; a family without any is left out.
    """
    among = PROTOCOLS.keys() if names is None else set(names)
    leads: dict[ProtocolFamily, str] = {}
    for name, protocol in PROTOCOLS.items():
        if name in among:
            leads.setdefault(protocol.family, name)
    return {family: leads[family] for family in ProtocolFamily if family in leads}


def _pairs(prompter: Prompter, task: Task, items: Sequence[Item]) -> list[Pair]:
    """Tokenize each item with each of its options."""
    pairs: list[Pair] = []
    for item in items:
        assert item.options is not None
        context, endings = prompter.split(item.prompt, item.options)
        pairs += [Pair(context, ending, f"{task.name}, item {item.id}") for ending in endings]
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
    judgement = JUDGES[task.judge](item, answer.text)
    return {
        "correct": judgement.correct,
        "text": answer.text,
        "extracted": judgement.extracted,
        "truncated": answer.truncated,
        "ended": answer.ended,
        "num_tokens": len(answer.token_ids),
    }


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)

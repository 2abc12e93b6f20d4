"""The protocols: rank the options by log-likelihood, or generate an answer and judge its text. Imports no torch.

All ask the same items. Those of one form (as the task writes it, by letter, with thought first) ask with the same
prompt, token for token, so that each score by generation stands beside one by likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.errors import EvalError
from gendistill_evals.extract import answer_after_thought, stated_answer
from gendistill_evals.forms import Form, example_turns, in_form
from gendistill_evals.items import LETTERS, Item
from gendistill_evals.judges import ANSWER_JUDGES, JUDGES, THOUGHT_JUDGES, Judge, Judgement, judge_letter
from gendistill_evals.model import Generated, LanguageModel, Limits, Pair, Request, check_fits
from gendistill_evals.prompts import PLAIN_STYLE, Prompter, Style, ids_sha256, opened
from gendistill_evals.task import Metric, Task
from gendistill_evals.verbatim import Verbatim, whole_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnProgress = Callable[[int, int], None]
# Raised whenever the same model may get another score than before on the same items.
RULES = 5


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
        samples: One entry per item, in item order, as in ``samples.jsonl``: correct, prompt_sha256 of the prompt's
            token ids, and choice, the place of the chosen option or None; by generation also text, extracted,
            truncated, ended, num_tokens and repeats, whether the answer ends in a loop.
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
        style: Style = PLAIN_STYLE,
    ) -> None:
        """Check that a model can read all that ``run`` would ask; the model need not be loaded.

        Raises:
            EvalError: Items that are too long for it, or have tokens that it does not know; or a style that the task
                or the tokenizer does not allow.
        """
        ...

    def run(
        self,
        model: LanguageModel,
        task: Task,
        *,
        limit: int | None = None,
        style: Style = PLAIN_STYLE,
        progress: OnProgress | None = None,
    ) -> ProtocolRun:
        """Score a model on a task.

        Args:
            model: What is scored.
            task: A task that ``why_not`` has nothing against.
            limit: Items to score, from the first; None scores all.
            style: How prompts are made of items.
            progress: Called with items done and items in all.
        """
        ...


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A choice, for every item, of the option with the highest log-likelihood.

    Attributes:
        name, label: As for ``EvalProtocol``.
        metric: What options are ranked by; None is the task's metric.
        form: How an item is asked, and whether its options are texts or letters.
    """

    name: str
    label: str
    metric: Metric | None = None
    form: Form = Form.PLAIN

    @property
    def family(self) -> ProtocolFamily:
        """Ranks answers."""
        return ProtocolFamily.LIKELIHOOD

    def why_not(self, task: Task) -> str | None:
        """Say why a task has nothing to rank; None if it has."""
        if not task.items[0].options:
            return "the items have no distractors that the gold answer could be ranked against"
        return _why_no_letters(task) if self.form is Form.LETTER else None

    def check(
        self,
        model: LanguageModel | Limits,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        limit: int | None = None,
        style: Style = PLAIN_STYLE,
    ) -> None:
        """Check that a model can read every item with each of its options."""
        where = f"{task.name}, {self.name}"
        pairs = _pairs(Prompter(tokenizer, style), task, asked_items(task, self.form, style, limit))
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
        style: Style = PLAIN_STYLE,
        progress: OnProgress | None = None,
    ) -> ProtocolRun:
        """Score a model on a task whose items have options.

        Raises:
            EvalError: They have none; ``why_not`` says so.
        """
        if reason := self.why_not(task):
            raise EvalError(f"log-likelihood cannot score {task.name}: {reason}", where=task.name)
        items = asked_items(task, self.form, style, limit)
        prompter = Prompter(model.tokenizer, style)
        pairs = _pairs(prompter, task, items)
        found: dict[int, list[float]] = {}
        for index, values in model.log_probs(pairs):
            found[index] = values
            if progress:
                progress(len(found) * len(items) // len(pairs), len(items))
        log_probs = iter([found[index] for index in range(len(pairs))])
        metric = self.metric or task.metric
        samples = tuple(
            {
                **_ranked(item, [next(log_probs) for _ in item.options or ()], metric),
                "prompt_sha256": ids_sha256(prompter.prompt_ids(item.prompt)),
            }
            for item in items
        )
        score = {
            "value": _share(sample["correct"] for sample in samples),
            "n": len(samples),
        }
        return ProtocolRun(score, samples)


@dataclass(frozen=True, slots=True)
class Generation:
    """A greedy answer to every item, which a judge compares with gold.

    A letter is judged as one, whatever the task's judge is. With thought first, the task's judge sees what the answer
    states at its end ("the answer is ...", ``####``, ``\\boxed``); an answer that states nothing has none.

    Attributes:
        name, label: As for ``EvalProtocol``.
        form: How an item is asked.
    """

    name: str
    label: str
    form: Form = Form.PLAIN

    @property
    def family(self) -> ProtocolFamily:
        """Writes answers."""
        return ProtocolFamily.GENERATION

    def why_not(self, task: Task) -> str | None:
        """Say why a task cannot be answered in this form; None if it can, as every task can in its own."""
        if self.form is Form.LETTER:
            if not task.items[0].options:
                return "the items have no options that letters could stand for"
            return _why_no_letters(task)
        if self.form is Form.THOUGHT and task.judge not in ANSWER_JUDGES:
            return f"judge: {task.judge} judges a whole text, and thought comes before an answer"
        return None

    def check(
        self,
        model: LanguageModel | Limits,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        limit: int | None = None,
        style: Style = PLAIN_STYLE,
    ) -> None:
        """Check that a model can read every prompt and the longest answer after it."""
        prompter = Prompter(tokenizer, style)
        items = asked_items(task, self.form, style, limit)
        prompts = [prompter.prompt_ids(item.prompt) for item in items]
        where = f"{task.name}, {self.name}"
        check_fits(model, prompts, where=where, num_new_tokens=self.max_new_tokens(task, style))

    def max_new_tokens(self, task: Task, style: Style = PLAIN_STYLE) -> int:
        """Return the longest answer in tokens, thought included."""
        thoughts = (self.form is Form.THOUGHT) + style.reasoning
        return task.max_new_tokens + thoughts * task.thought_tokens

    def run(
        self,
        model: LanguageModel,
        task: Task,
        *,
        limit: int | None = None,
        style: Style = PLAIN_STYLE,
        progress: OnProgress | None = None,
    ) -> ProtocolRun:
        """Score a model on a task that can be answered.

        Raises:
            EvalError: It cannot in this form; ``why_not`` says so.
        """
        if reason := self.why_not(task):
            raise EvalError(f"{self.name} cannot score {task.name}: {reason}", where=task.name)
        items = asked_items(task, self.form, style, limit)
        prompter = Prompter(model.tokenizer, style)
        # A text that ends an answer stands in thoughts as well.
        stop = () if self.form is Form.THOUGHT or style.reasoning else task.stop
        requests = [
            Request(
                prompter.prompt_ids(item.prompt),
                max_new_tokens=self.max_new_tokens(task, style),
                stop=(*stop, *prompter.stop_after(item.prompt)),
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
        samples = tuple(
            {
                **self._judged(item, answers[index], task, opens=prompter.opens_thought(item.prompt)),
                "prompt_sha256": ids_sha256(requests[index].prompt),
            }
            for index, item in enumerate(items)
        )
        score = {
            "value": _share(sample["correct"] for sample in samples),
            "n": len(samples),
            "extraction_failures": sum(sample["extracted"] is None for sample in samples),
            "truncated": sum(sample["truncated"] for sample in samples),
            "eos_rate": _share(sample["ended"] for sample in samples),
            "mean_new_tokens": sum(sample["num_tokens"] for sample in samples) / len(samples),
        }
        return ProtocolRun(score, samples)

    def _judged(self, item: Item, answer: Generated, task: Task, *, opens: bool) -> dict[str, Any]:
        judgement = self._judge(item, answer.text, task, opens=opens)
        return {
            "correct": judgement.correct,
            "choice": _place(item, judgement.extracted, JUDGES[task.judge]),
            "text": answer.text,
            "extracted": judgement.extracted,
            "truncated": answer.truncated,
            "ended": answer.ended,
            "num_tokens": len(answer.token_ids),
            "repeats": ends_in_loop(answer.token_ids),
        }

    def _judge(self, item: Item, text: str, task: Task, *, opens: bool) -> Judgement:
        nothing = Judgement(None, correct=False)
        said = answer_after_thought(text, opens=opens)
        if said is None:
            return nothing
        if said is not text:
            # Stop texts that could not end the thought end the answer.
            said = said[: min((said.find(words) for words in task.stop if words in said), default=len(said))]
        if self.form is Form.THOUGHT and task.judge not in THOUGHT_JUDGES:
            stated = stated_answer(said, number=task.judge == "numeric")
            return nothing if stated is None else JUDGES[task.judge](item, stated)
        return judge_letter(item, said) if self.form is Form.LETTER else JUDGES[task.judge](item, said)


# The first of each family are those that an evaluation runs if nothing else is asked for, and that the hidden gap
# compares. The others, and those that other packages add, run where they are asked for by name.
PROTOCOLS: dict[str, EvalProtocol] = {
    protocol.name: protocol
    for protocol in (
        Likelihood("likelihood", "ll"),
        Generation("generation", "gen"),
        Likelihood("likelihood_raw", "ll/raw", metric=Metric.ACCURACY),
        Likelihood("likelihood_per_token", "ll/tok", metric=Metric.ACCURACY_PER_TOKEN),
        Likelihood("likelihood_per_char", "ll/char", metric=Metric.ACCURACY_PER_CHAR),
        Likelihood("likelihood_letter", "ll/A", metric=Metric.ACCURACY, form=Form.LETTER),
        Generation("generation_letter", "gen/A", form=Form.LETTER),
        Generation("generation_thought", "gen/cot", form=Form.THOUGHT),
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


def asked_items(task: Task, form: Form, style: Style, limit: int | None = None) -> list[Item]:
    """Return the items of a task with the whole prompt that a form and a style make of them.

    Args:
        task: The task.
        form: How an item is asked.
        style: Its system turn and number of examples are put into the prompts.
        limit: Items, from the first; None for all.
    Raises:
        EvalError: More examples than the task has, examples without options for letters, or a second system turn.
    """
    if style.few_shot > len(task.examples):
        has = f"{len(task.examples):,}" if task.examples else "none"
        raise EvalError(
            f"few_shot asks for {style.few_shot:,} examples, and the task has {has}",
            where=task.name,
            hint="name a .jsonl file of rows that are not items with examples: in the task file, or leave few_shot out",
        )
    examples = task.examples[: style.few_shot]
    if form is Form.LETTER and (
        bare := next((each for each in examples if not 0 < len(each.options or ()) <= len(LETTERS)), None)
    ):
        raise EvalError(
            f"few_shot shows example {bare.id} by letter, and it has {len(bare.options or ()):,} options",
            where=task.name,
            hint=f"give every example up to {len(LETTERS)} options, or leave few_shot or the protocols by letter out",
        )
    shots = [turn for example in examples for turn in example_turns(example, form)]
    items = []
    for item in task.items[:limit]:
        asked = in_form(item, form)
        try:
            prompt = opened(asked.prompt, system=style.system, shots=shots)
        except EvalError as error:
            raise EvalError(error.message, where=f"{task.name}, item {item.id}", hint=error.hint) from error
        items.append(replace(asked, prompt=prompt))
    return items


def ends_in_loop(tokens: Sequence[int], *, longest: int = 32) -> bool:
    """Tell whether a text ends in the same words again and again: three times at least, and twelve tokens.

    Args:
        tokens: Token ids of the text.
        longest: Longest piece that repeats, in tokens.
    """
    for period in range(1, longest + 1):
        tail = tokens[-max(3 * period, 12) :]
        if len(tail) >= max(3 * period, 12) and all(
            token == before for token, before in zip(tail[period:], tail[:-period], strict=True)
        ):
            return True
    return False


def _why_no_letters(task: Task) -> str | None:
    most = max(len(item.options or ()) for item in task.items)
    return (
        None
        if most <= len(LETTERS)
        else f"an item has {most:,} options, and there are {len(LETTERS)} letters"
    )


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
    per_char = [total / len(option) for total, option in zip(scores, item.options, strict=True)]
    ranked_by = {
        Metric.ACCURACY: scores,
        Metric.ACCURACY_PER_TOKEN: per_token,
        Metric.ACCURACY_PER_CHAR: per_char,
    }[metric]
    choice = ranked_by.index(max(ranked_by))
    return {
        "correct": item.options[choice] == item.gold,
        "choice": choice,
        "scores": scores,
        "scores_per_token": per_token,
        "scores_per_char": per_char,
    }


def _place(item: Item, extracted: str | None, judge: Judge) -> int | None:
    """Find the option that an answer names; "1,234" is the number 1234."""
    options = item.options or ()
    if extracted is None or extracted in options:
        return None if extracted is None else options.index(extracted)
    read = [judge(item, option).extracted for option in options]
    return read.index(extracted) if extracted in read else None


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)

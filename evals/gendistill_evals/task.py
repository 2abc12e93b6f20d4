"""Tasks: items that one prompt asks and several protocols score. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from gendistill_evals.datasets import find_rows, read_dataset
from gendistill_evals.errors import EvalError
from gendistill_evals.extract import normalise
from gendistill_evals.items import (
    AnswerForm,
    GoldForm,
    Item,
    ItemFormat,
    Kind,
    build_items,
    identity_of,
    read_rows,
    reject_repeated_ids,
)
from gendistill_evals.judges import JUDGES, check_judge, default_judge
from gendistill_evals.prompts import Prompter, opened
from gendistill_evals.reading import shorten
from gendistill_evals.synthetic import Synthesis, make_rows, read_synthesis
from gendistill_evals.task_file import LONGEST_NAME, TaskKeys, read_task_yaml

_TASKS = Path(__file__).parent / "tasks"
_QUESTIONS = Path(__file__).parent / "questions"
THOUGHT_TOKENS = 256


class Metric(StrEnum):
    """The quantity that log-likelihood ranks options by: their total, or their mean per token or per character.

    Characters are those of the option's text, as lm-eval 0.4.13 counts them for ``acc_norm`` (``len`` of the choice in
    ``ConfigurableTask.process_results``); its ``acc_bytes`` counts the bytes of UTF-8 instead.
    """

    ACCURACY = "accuracy"
    ACCURACY_PER_TOKEN = "accuracy_per_token"
    ACCURACY_PER_CHAR = "accuracy_per_char"


@dataclass(frozen=True, slots=True)
class Task:
    """A set of items and everything that shapes how they are asked and judged.

    Attributes:
        name: Name in tables.
        description: One line for people.
        kind: What its rows hold.
        judge: Name in ``JUDGES`` of what judges generated answers.
        metric: What log-likelihood ranks by.
        answer: What answers a multiple-choice item.
        max_new_tokens: Longest generated answer, in tokens.
        stop: Texts that end a generated answer.
        items: The questions, in file order.
        items_sha256: Hash of the rows.
        prompt_sha256: Hash of every setting that changes a prompt, its decoding or its judgement.
        examples: Questions with answers that a prompt may show before its own, none of them an item.
        thought_tokens: Tokens for thinking, on top of ``max_new_tokens``, where a model is let to think first.
        source: Where the rows of a public benchmark were read from, for the record; empty of other tasks.
        synthesis: How items are generated; None where they were read. Such a task has none until it is ``built``.
    """

    name: str
    description: str
    kind: Kind
    judge: str
    metric: Metric
    answer: AnswerForm
    max_new_tokens: int
    stop: tuple[str, ...]
    items: tuple[Item, ...] = field(repr=False)
    items_sha256: str
    prompt_sha256: str
    examples: tuple[Item, ...] = field(default=(), repr=False)
    thought_tokens: int = THOUGHT_TOKENS
    source: Mapping[str, Any] = field(default_factory=dict)
    synthesis: Synthesis | None = None

    @property
    def num_items(self) -> int:
        """How many items there are, or will be."""
        return self.synthesis.num_items if self.synthesis is not None else len(self.items)

    def identity(self) -> dict[str, str]:
        """Return what decides the questions: the name and the hashes of items and prompt."""
        return {
            "name": self.name,
            "items_sha256": self.items_sha256,
            "prompt_sha256": self.prompt_sha256,
        }

    def cut_at(self, limit: int | None) -> int | None:
        """Return a limit that leaves items out, or None: one of at least as many items as there are does not."""
        return limit if limit is not None and limit < self.num_items else None


@dataclass(frozen=True, slots=True)
class Question:
    """One open question, which has no single right answer."""

    id: str
    question: str


@dataclass(frozen=True, slots=True)
class Questions:
    """Open questions that a model answers in its own words.

    Attributes:
        name: Name or path they were loaded by.
        items: The questions, in file order.
        sha256: Hash of the rows.
    """

    name: str
    items: tuple[Question, ...]
    sha256: str


def list_tasks() -> tuple[str, ...]:
    """List the names of the built-in tasks."""
    return tuple(sorted(path.stem for path in _TASKS.glob("*.yaml")))


class TaskOutline(NamedTuple):
    """A built-in task as lists show it.

    Attributes:
        name, description: As of ``Task``.
        num_items: How many items there are; None where they come from the hub.
    """

    name: str
    description: str
    num_items: int | None


def outline_tasks() -> list[TaskOutline]:
    """Describe the built-in tasks without asking the hub for any of their rows."""
    outlines = []
    for name in list_tasks():
        path = _TASKS / f"{name}.yaml"
        content = read_task_yaml(path)
        if "dataset" in content:
            keys = TaskKeys(content, str(path))
            outlines.append(TaskOutline(name, keys.text("description", default=""), None))
        else:
            task = load_task(name)
            outlines.append(TaskOutline(name, task.description, task.num_items))
    return outlines


def list_questions() -> tuple[str, ...]:
    """List the names of the built-in sets of open questions."""
    return tuple(sorted(path.stem for path in _QUESTIONS.glob("*.jsonl")))


def load_task(name_or_path: str | Path, *, data: str | Path | None = None) -> Task:
    """Load a built-in task by name, or any task from its YAML file.

    Args:
        name_or_path: Name from ``list_tasks()``, or path of a ``.yaml`` file.
        data: Folder with the rows of public benchmarks, or ``"sample"``; as for ``datasets.find_rows``.
    Returns: The task with its prompts rendered, but for a generated one.
    Raises:
        EvalError: Unknown name (exit code 2), or a task file or items that do not fit the format.
    """
    if (theirs := _of_others(name_or_path, trust_code=False)) is not None:
        if len(theirs) > 1:
            raise EvalError(
                f"{name_or_path} is {len(theirs)} tasks, and one is meant: {', '.join(task.name for task in theirs)}",
                hint="name one of them",
                exit_code=2,
            )
        return theirs[0]
    path = _find(name_or_path, _TASKS, ".yaml", list_tasks(), what="task")
    content = read_task_yaml(path)
    keys = TaskKeys(content, str(path))
    return _generated(keys, path) if "generate" in content else _task(keys, path, data)


def load_tasks(
    tasks: Sequence[str | Path | Task],
    *,
    data: str | Path | None = None,
    lengths: Sequence[int] | None = None,
    trust_code: bool = False,
) -> list[Task]:
    """Load several tasks, whose names must differ.

    Args:
        tasks: Names and paths as for ``load_task``, or tasks; a group of lm-eval's is all of its tasks.
        data: As for ``load_task``.
        lengths: Of the texts of generated tasks, in tokens; None leaves their own.
        trust_code: Whether Python functions that a task file of lm-eval's names may run.
    Raises:
        EvalError: As for ``load_task``, two tasks of one name, or lengths where nothing is generated.
    """
    loaded: list[Task] = []
    for task in tasks:
        if isinstance(task, Task):
            loaded.append(task)
        else:
            loaded += _of_others(task, trust_code=trust_code) or [load_task(task, data=data)]
    if lengths is not None:
        loaded = _at_lengths(loaded, lengths)
    names = [task.name for task in loaded]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise EvalError(
            f"two tasks have the name {', '.join(repeated)}",
            hint="name each task once; give one of two different tasks another name: in its file",
            exit_code=2,
        )
    return loaded


def built(task: Task, prompter: Prompter, max_tokens: int | None) -> Task:
    """Generate the items of a task that has none yet; others come back as they are.

    Args:
        task: A task.
        prompter: Prompts of the model that will be asked, whose tokens the lengths count.
        max_tokens: Longest sequence that the model reads; None if it declares no limit.
    Raises:
        EvalError: Lengths that the model cannot read, or that are too short.
    """
    if task.synthesis is None or task.items:
        return task
    system = prompter.style.system
    rows = make_rows(
        task.synthesis,
        lambda text: len(prompter.prompt_ids(opened(text, system=system))),
        max_new_tokens=task.max_new_tokens,
        max_tokens=max_tokens,
        where=task.name,
    )
    items = build_items(list(enumerate(rows, start=1)), _GENERATED, Path(task.name))
    items = tuple(
        replace(item, cell=(row["length"], row["depth"])) for item, row in zip(items, rows, strict=True)
    )
    return replace(task, items=items, items_sha256=sha256_of(rows))


def task_identity(name_or_path: str | Path) -> dict[str, str]:
    """Return what decides the questions of a task: its name and the hashes of its items and its prompt.

    Args:
        name_or_path: As for ``load_task``, whose errors it raises.
    """
    return load_task(name_or_path).identity()


def questions_identity(name_or_path: str | Path) -> dict[str, str]:
    """Return what decides a set of open questions: the hash of its rows, and its name without a folder.

    Args:
        name_or_path: As for ``load_questions``, whose errors it raises.
    """
    questions = load_questions(name_or_path)
    return {"name": Path(questions.name).stem, "items_sha256": questions.sha256}


def load_questions(name_or_path: str | Path) -> Questions:
    """Load open questions: a .jsonl file with rows of ``{"id", "question"}``.

    Args:
        name_or_path: Name from ``list_questions()``, or path of a ``.jsonl`` file.
    Raises:
        EvalError: Unknown name (exit code 2), or a row without a question.
    """
    path = _find(name_or_path, _QUESTIONS, ".jsonl", list_questions(), what="set of questions")
    rows = read_rows(path, what="the file of questions")
    questions = []
    for line, row in rows:
        text, where = row.get("question"), f"{path}:{line}"
        if not isinstance(text, str) or not text.strip():
            raise EvalError(
                f'a row needs a text under "question", got {shorten(text)}',
                where=where,
                hint='write {"id": "...", "question": "..."} on one line',
            )
        questions.append(Question(identity_of(row.get("id"), line, where), text))
    reject_repeated_ids([question.id for question in questions], path)
    return Questions(str(name_or_path), tuple(questions), sha256_of([row for _, row in rows]))


def sha256_of(content: Any) -> str:
    """Hash plain data by its canonical JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# Where else tasks come from: each loads what a name or path means to it, or returns None. Others add theirs.
LOADERS: list[Callable[[str | Path, bool], list[Task] | None]] = []


def _of_others(name_or_path: str | Path, *, trust_code: bool) -> list[Task] | None:
    """Load tasks that are not ours; None for all others."""
    found = (load(name_or_path, trust_code) for load in LOADERS)
    return next((tasks for tasks in found if tasks is not None), None)


def _find(name_or_path: str | Path, folder: Path, suffix: str, known: Sequence[str], *, what: str) -> Path:
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.endswith(suffix) or "/" in name:
        hint = f"give the path of a {suffix} file, or one of the built-in names: {', '.join(known)}"
        try:
            path = Path(name).expanduser()
            found, other = path.is_file(), path.exists()
        except (OSError, RuntimeError, ValueError) as error:
            # A name that is too long, a home folder of nobody, or a NUL byte.
            raise EvalError(
                f"{shorten(name)} is not the path of a file: {error}", hint=hint, exit_code=2
            ) from error
        if not found:
            problem = f"{path} is not a regular file" if other else f"there is no file {path}"
            raise EvalError(problem, hint=hint, exit_code=2)
        return path
    if name in known:
        return folder / f"{name}{suffix}"
    close = difflib.get_close_matches(name[:LONGEST_NAME], known, n=1)
    raise EvalError(
        f'there is no {what} "{name[:LONGEST_NAME]}"; built in: {", ".join(known)}',
        hint=f'did you mean "{close[0]}"?'
        if close
        else f"name one of these, or give the path of a {suffix} file",
        exit_code=2,
    )


# How generated rows become items.
_GENERATED = ItemFormat(
    kind=Kind.NUMERIC,
    answer=AnswerForm.TEXT,
    gold=GoldForm.TEXT,
    gold_after="",
    template="{prompt}",
    fields={"id": "id", "gold": "gold", "options": "options", "distractors": "distractors"},
    group="context",
)


def _generated(keys: TaskKeys, path: Path) -> Task:
    """Read a task whose items are generated once the model's tokenizer is known."""
    allowed = {"name", "description", "generate", "max_new_tokens", "stop"}
    if others := sorted(key for key in keys.content if key not in allowed):
        raise EvalError(
            f"{', '.join(others)} cannot stand beside generate",
            where=str(path),
            hint=f"a generated task takes {', '.join(sorted(allowed))}",
        )
    synthesis = read_synthesis(keys.content["generate"], str(path))
    max_new_tokens, stop = keys.positive("max_new_tokens"), keys.texts("stop")
    return Task(
        name=_name(keys, path),
        description=keys.text("description", default=""),
        kind=_GENERATED.kind,
        judge=default_judge(_GENERATED.kind, _GENERATED.answer),
        metric=Metric.ACCURACY,
        answer=_GENERATED.answer,
        max_new_tokens=max_new_tokens,
        stop=stop,
        items=(),
        items_sha256=sha256_of(synthesis.identity()),
        prompt_sha256=sha256_of(["generate", max_new_tokens, stop]),
        synthesis=synthesis,
    )


def _at_lengths(tasks: Sequence[Task], lengths: Sequence[int]) -> list[Task]:
    if not any(task.synthesis for task in tasks):
        raise EvalError(
            "none of the tasks generates texts, whose lengths could be chosen",
            where="lengths",
            hint="leave lengths out, or add the suite long",
            exit_code=2,
        )
    changed = []
    for task in tasks:
        if task.synthesis is not None:
            synthesis = task.synthesis.at_lengths(lengths, "lengths")
            task = replace(task, synthesis=synthesis, items=(), items_sha256=sha256_of(synthesis.identity()))
        changed.append(task)
    return changed


def _name(keys: TaskKeys, path: Path) -> str:
    name = keys.text("name", default=path.stem)
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}", name):
        raise EvalError(
            f'the name {shorten(name)} must be letters, digits, ".", "_" and "-", at most {LONGEST_NAME}',
            where=str(path),
            hint="write name: <name> in the task file",
        )
    return name


def _rows(
    keys: TaskKeys, path: Path, name: str, data: str | Path | None
) -> tuple[list[tuple[int, dict[str, Any]]], Path, dict[str, Any]]:
    """Read the rows of a task, their file and, of a dataset, where they are from."""
    if "dataset" not in keys.content:
        source = path.parent / keys.text("items")
        return read_rows(source), source, {}
    if "items" in keys.content:
        raise EvalError(
            "both items and dataset are given",
            where=str(path),
            hint="keep items for a file, dataset for the hub",
        )
    found = find_rows(read_dataset(keys.content["dataset"], name, str(path)), path.parent, data=data)
    return found.rows, found.path, found.source


def _task(keys: TaskKeys, path: Path, data: str | Path | None = None) -> Task:
    form = ItemFormat(
        kind=keys.choice("kind", Kind),
        answer=keys.choice("answer", AnswerForm, default=AnswerForm.TEXT),
        gold=keys.choice("gold", GoldForm, default=GoldForm.TEXT),
        gold_after=keys.text("gold_after", default=""),
        template=keys.prompt(),
        fields=keys.fields(),
        options=keys.options(),
        group=keys.text("group", default=""),
        subject=keys.text("subject", default=""),
    )
    choice_only = {"answer", "gold", "options"} & keys.content.keys()
    if form.kind is not Kind.MULTIPLE_CHOICE and choice_only:
        raise EvalError(
            f"{' and '.join(sorted(choice_only))} only fit kind: multiple_choice",
            where=str(path),
            hint="remove the key, or change kind",
        )
    if form.kind is Kind.MULTIPLE_CHOICE and form.gold_after:
        raise EvalError(
            "gold_after does not fit kind: multiple_choice",
            where=str(path),
            hint="remove the key, or change kind",
        )
    form.check(str(path))
    usual = default_judge(form.kind, form.answer)
    judge = keys.one_of("judge", JUDGES, default=usual)
    metric = keys.choice("metric", Metric, default=Metric.ACCURACY)
    max_new_tokens = keys.positive("max_new_tokens")
    stop = keys.texts("stop")
    name = _name(keys, path)
    rows, source, origin = _rows(keys, path, name, data)
    shape = [form.kind, form.answer, form.gold, form.gold_after, form.template, form.fields, metric]
    # What a task does not use leaves its hash as it was before there was such a thing.
    shape += [form.options] if form.options else []
    shape += [{"judge": judge}] if judge != usual else []
    items = build_items(rows, form, source)
    check_judge(judge, items, str(path))
    examples: tuple[Item, ...] = ()
    if named := keys.text("examples", default=""):
        shown = read_rows(path.parent / named, what="the file of examples")
        # Neither groups nor subjects are asked of what is only shown.
        examples = build_items(shown, replace(form, group="", subject=""), path.parent / named)
        _reject_shown_items(examples, items, str(path.parent / named))
        shape += [{"examples": sha256_of([row for _, row in shown])}]
    thought_tokens = keys.positive("thought_tokens", default=THOUGHT_TOKENS)
    shape += [{"thought_tokens": thought_tokens}] if thought_tokens != THOUGHT_TOKENS else []
    return Task(
        name=name,
        description=keys.text("description", default=""),
        kind=form.kind,
        judge=judge,
        metric=metric,
        answer=form.answer,
        max_new_tokens=max_new_tokens,
        stop=stop,
        items=items,
        items_sha256=sha256_of([row for _, row in rows]),
        prompt_sha256=sha256_of([*shape, max_new_tokens, stop]),
        examples=examples,
        thought_tokens=thought_tokens,
        source=origin,
    )


def _reject_shown_items(examples: Sequence[Item], items: Sequence[Item], where: str) -> None:
    """Raise ``EvalError`` if an example gives the answer to an item away."""

    def question(item: Item) -> tuple[str, tuple[str, ...]]:
        return normalise(item.messages[-1]["content"]), tuple(sorted(item.texts or item.options or ()))

    asked = {question(item): item.id for item in items}
    for example in examples:
        if (found := asked.get(question(example))) is not None:
            raise EvalError(
                f'example "{example.id}" is item "{found}": it shows the answer to what is asked',
                where=where,
                hint="leave it out of the examples, or out of the items",
            )

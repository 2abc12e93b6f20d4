"""Tasks: items that one prompt asks and two protocols score. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gendistill_evals.errors import EvalError
from gendistill_evals.items import (
    AnswerForm,
    GoldForm,
    Item,
    ItemFormat,
    Kind,
    build_items,
    read_rows,
    reject_repeated_ids,
)

_TASKS = Path(__file__).parent / "tasks"
_QUESTIONS = Path(__file__).parent / "questions"
_KEYS = (
    "name", "description", "kind", "items", "fields", "prompt", "answer", "gold", "gold_after", "metric",
    "max_new_tokens", "stop",
)  # fmt: skip
_COLUMNS = {"id": "id", "gold": "gold", "options": "options", "distractors": "distractors"}

Choice = TypeVar("Choice", bound=StrEnum)


class Metric(StrEnum):
    """Name what log-likelihood ranks options by: their total, or their mean per token."""

    ACCURACY = "accuracy"
    ACCURACY_PER_TOKEN = "accuracy_per_token"


@dataclass(frozen=True, slots=True)
class Task:
    """A set of items and everything that shapes how they are asked and judged.

    Attributes:
        name: Name in tables.
        description: One line for people.
        kind: How a generated answer is judged.
        metric: What log-likelihood ranks by.
        answer: What answers a multiple-choice item.
        max_new_tokens: Longest generated answer, in tokens.
        stop: Texts that end a generated answer.
        items: The questions, in file order.
        items_sha256: Hash of the rows.
        prompt_sha256: Hash of every setting that changes a prompt, its decoding or its judgement.
    """

    name: str
    description: str
    kind: Kind
    metric: Metric
    answer: AnswerForm
    max_new_tokens: int
    stop: tuple[str, ...]
    items: tuple[Item, ...] = field(repr=False)
    items_sha256: str
    prompt_sha256: str

    @property
    def likelihood_reason(self) -> str | None:
        """Why log-likelihood cannot score this task; None if it can."""
        if self.items[0].options:
            return None
        return "the items have no distractors that the gold answer could be ranked against"

    def cut_at(self, limit: int | None) -> int | None:
        """Return a limit that leaves items out, or None: one of at least as many items as there are does not."""
        return limit if limit is not None and limit < len(self.items) else None


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


def list_questions() -> tuple[str, ...]:
    """List the names of the built-in sets of open questions."""
    return tuple(sorted(path.stem for path in _QUESTIONS.glob("*.jsonl")))


def load_task(name_or_path: str | Path) -> Task:
    """Load a built-in task by name, or any task from its YAML file.

    Args:
        name_or_path: Name from ``list_tasks()``, or path of a ``.yaml`` file.
    Returns: The task with its prompts rendered.
    Raises:
        EvalError: Unknown name (exit code 2), or a task file or items that do not fit the format.
    """
    path = _find(name_or_path, _TASKS, ".yaml", list_tasks(), what="task")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EvalError(f"cannot read the task: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise EvalError("a task file maps keys to values", where=str(path))
    return _task(_Keys(content, str(path)), path)


def load_tasks(tasks: Sequence[str | Path | Task]) -> list[Task]:
    """Load several tasks, whose names must differ.

    Args:
        tasks: Names and paths as for ``load_task``, or tasks.
    Raises:
        EvalError: As for ``load_task``, or two tasks of one name.
    """
    loaded = [task if isinstance(task, Task) else load_task(task) for task in tasks]
    names = [task.name for task in loaded]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise EvalError(
            f"two tasks have the name {', '.join(repeated)}",
            hint="name each task once; give one of two different tasks another name: in its file",
        )
    return loaded


def task_identity(name_or_path: str | Path) -> dict[str, str]:
    """Return what decides the questions of a task: its name and the hashes of its items and its prompt.

    Args:
        name_or_path: As for ``load_task``, whose errors it raises.
    """
    task = load_task(name_or_path)
    return {
        "name": task.name,
        "items_sha256": task.items_sha256,
        "prompt_sha256": task.prompt_sha256,
    }


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
    rows = read_rows(path)
    questions = []
    for line, row in rows:
        text = row.get("question")
        if not isinstance(text, str) or not text.strip():
            raise EvalError('a row needs a text under "question"', where=f"{path}:{line}")
        questions.append(Question(str(row.get("id", line)), text))
    reject_repeated_ids([question.id for question in questions], path)
    return Questions(str(name_or_path), tuple(questions), sha256_of([row for _, row in rows]))


def sha256_of(content: Any) -> str:
    """Hash plain data by its canonical JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _find(name_or_path: str | Path, folder: Path, suffix: str, known: Sequence[str], *, what: str) -> Path:
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.endswith(suffix) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise EvalError(
                f"there is no file {path}",
                hint=f"give the path of a {suffix} file, or one of the built-in names: {', '.join(known)}",
                exit_code=2,
            )
        return path
    if name in known:
        return folder / f"{name}{suffix}"
    close = difflib.get_close_matches(name, known, n=1)
    raise EvalError(
        f'there is no {what} "{name}"; built in: {", ".join(known)}',
        hint=f'did you mean "{close[0]}"?'
        if close
        else f"name one of these, or give the path of a {suffix} file",
        exit_code=2,
    )


def _task(keys: _Keys, path: Path) -> Task:
    form = ItemFormat(
        kind=keys.choice("kind", Kind),
        answer=keys.choice("answer", AnswerForm, default=AnswerForm.TEXT),
        gold=keys.choice("gold", GoldForm, default=GoldForm.TEXT),
        gold_after=keys.text("gold_after", default=""),
        template=keys.text("prompt"),
        fields=keys.fields(),
    )
    choice_only = {"answer", "gold"} & keys.content.keys()
    if form.kind is not Kind.MULTIPLE_CHOICE and choice_only:
        raise EvalError(
            f"{' and '.join(sorted(choice_only))} only fit kind: multiple_choice", where=str(path)
        )
    if form.kind is Kind.MULTIPLE_CHOICE and form.gold_after:
        raise EvalError("gold_after does not fit kind: multiple_choice", where=str(path))
    form.check(str(path))
    metric = keys.choice("metric", Metric, default=Metric.ACCURACY)
    max_new_tokens = keys.positive("max_new_tokens")
    stop = keys.texts("stop")
    name = keys.text("name", default=path.stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise EvalError(f'the name "{name}" must be letters, digits, ".", "_" and "-"', where=str(path))
    source = path.parent / keys.text("items")
    rows = read_rows(source)
    shape = [form.kind, form.answer, form.gold, form.gold_after, form.template, form.fields, metric]
    return Task(
        name=name,
        description=keys.text("description", default=""),
        kind=form.kind,
        metric=metric,
        answer=form.answer,
        max_new_tokens=max_new_tokens,
        stop=stop,
        items=build_items(rows, form, source),
        items_sha256=sha256_of([row for _, row in rows]),
        prompt_sha256=sha256_of([*shape, max_new_tokens, stop]),
    )


class _Keys:
    """Read typed keys of a task file; every error names the file."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content = content
        self.where = where
        for key in content:
            if key not in _KEYS:
                close = difflib.get_close_matches(str(key), _KEYS, n=1)
                hint = f'did you mean "{close[0]}"?' if close else f"allowed: {', '.join(_KEYS)}"
                raise EvalError(f'unknown key "{key}"', where=where, hint=hint)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.content.get(key, default)
        if not isinstance(value, str) or (default is None and not value):
            raise EvalError(f'"{key}" must be a text, got {value!r}', where=self.where)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.content.get(key, [])
        if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
            raise EvalError(f'"{key}" must be a list of texts, got {value!r}', where=self.where)
        return tuple(value)

    def positive(self, key: str) -> int:
        value = self.content.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EvalError(f'"{key}" must be a whole number above 0, got {value!r}', where=self.where)
        return value

    def choice(self, key: str, kinds: type[Choice], default: Choice | None = None) -> Choice:
        value = self.content.get(key, default)
        if value not in list(kinds):
            raise EvalError(f'"{key}" must be one of {", ".join(kinds)}, got {value!r}', where=self.where)
        return kinds(value)

    def fields(self) -> dict[str, str | list[str]]:
        value = self.content.get("fields", {})
        if not isinstance(value, dict) or not all(
            isinstance(name, str) and (isinstance(source, str) or (name == "options" and _is_texts(source)))
            for name, source in value.items()
        ):
            raise EvalError(
                f'"fields" maps names to columns, got {value!r}',
                where=self.where,
                hint="a dotted path reaches inside a column; options may be a list of columns",
            )
        return {**_COLUMNS, **value}


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)

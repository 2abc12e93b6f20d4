"""Score a model on tasks under several protocols, keeping what is finished. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.errors import EvalError
from gendistill_evals.fingerprint import tokenizer_fingerprint
from gendistill_evals.model import LanguageModel, Limits
from gendistill_evals.parts import PartKey, PartStore
from gendistill_evals.prompts import Prompter
from gendistill_evals.protocols import PROTOCOLS, ProtocolFamily, lead_protocols
from gendistill_evals.reading import shorten
from gendistill_evals.results import (
    SCHEMA,
    write_results,
    write_samples,
    write_transcripts,
)
from gendistill_evals.task import Questions, Task, load_questions, load_tasks
from gendistill_evals.transcripts import check_questions, write_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnTaskProgress = Callable[[str, str, int, int], None]
# Task and protocol.
Key = tuple[str, str]
ROLES = ("teacher", "student", "model")
# What a protocol cannot be called: its entries stand beside these in the files.
_OWN_KEYS = frozenset({
    "task", "kind", "judge", "metric", "items_sha256", "prompt_sha256", "n", "limit", "id", "prompt", "options", "gold",
})  # fmt: skip


def evaluate_model(
    model: PreTrainedModel | LanguageModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    tasks: Sequence[str | Path | Task],
    out_dir: str | Path,
    model_name: str,
    parts_dir: str | Path | None = None,
    protocols: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    questions: str | Path | Questions | None = None,
    question_tokens: int = 64,
    role: str = "model",
    progress: OnTaskProgress | None = None,
    teacher: PreTrainedModel | LanguageModel | None = None,
) -> dict[str, Any]:
    """Score any causal language model and write its files.

    Each task under each protocol is kept in ``parts_dir`` when it is done, under a hash of everything that its
    scores depend on. Calling again with the same model, tokenizer, items and settings runs only what is missing.

    Args:
        model: Hugging Face causal language model, on the device and in the dtype to score it with; or any
            ``LanguageModel``.
        tokenizer: The tokenizer of a Hugging Face model; a ``LanguageModel`` has its own.
        tasks: Built-in names, paths of task files, or tasks.
        out_dir: Folder for ``results.json``, ``samples.jsonl`` and ``transcripts.jsonl``.
        model_name: Name of the model in the files.
        parts_dir: Folder of finished parts, which several ``out_dir`` may share; None is ``out_dir/parts``.
        protocols: Names in ``PROTOCOLS``; None for the first of each family, ``likelihood`` and ``generation``.
        limit: Items per task, from the first; None scores all.
        batch_size: Sequences per forward of a Hugging Face model.
        questions: Open questions for transcripts: built-in name, path, loaded, or None for none.
        question_tokens: Longest open answer, in tokens.
        role: ``teacher``, ``student`` or ``model``, for the files.
        progress: Called with task, protocol, items done and items in all.
        teacher: Model of the same kind that scores the open answers (``teacher_nll``); None leaves that null.
    Returns: The content of ``results.json``.
    Raises:
        EvalError: A task or setting that does not exist, a file that cannot be written, or a model that cannot
            be scored.
    """
    protocols = _default_protocols() if protocols is None else protocols
    _check_settings(protocols, limit=limit, batch_size=batch_size, question_tokens=question_tokens, role=role)
    loaded = load_tasks(tasks)
    if questions is not None and not isinstance(questions, Questions):
        questions = load_questions(questions)
    folder = Path(out_dir)
    scored = _language_model(model, tokenizer, batch_size)
    prompter = Prompter(scored.tokenizer)
    decoding = greedy_decoding(scored, prompter)
    setup = scored.setup()
    settings = {
        **decoding.settings(),
        **prompter.settings(),
        "batch_size": setup.batch_size,
        "overrode": decoding.overrode,
    }
    scorer = _Scorer(
        scored,
        progress,
        identity={
            **scored.identity(),
            "tokenizer": tokenizer_fingerprint(scored.tokenizer),
            "prompts": prompter.settings(),
        },
        decoding=decoding.settings(),
    )
    parts = {
        (task.name, protocol): scorer.task_part(task, protocol, limit)
        for task in loaded
        for protocol in _fitting(task, protocols)
    }
    if questions:
        judge = None if teacher is None else _language_model(teacher, tokenizer, batch_size)
        parts["", "transcripts"] = scorer.transcripts_part(questions, question_tokens, judge)
    contents = _finish(parts, PartStore(Path(parts_dir) if parts_dir is not None else folder / "parts"))
    rows = contents.pop(("", "transcripts"), None)
    done: dict[str, dict[str, Any]] = {task.name: {} for task in loaded}
    for (task, protocol), content in contents.items():
        done[task][protocol] = content
    results = {
        "schema": SCHEMA,
        "model": model_name,
        "role": role,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": dict(setup.versions),
        "device": setup.device,
        "dtype": setup.dtype,
        "settings": settings,
        "tasks": [_task_entry(task, done[task.name], limit, protocols) for task in loaded],
        "transcripts": None if rows is None else {"n": len(rows), "max_new_tokens": question_tokens},
    }
    write_samples(folder, [row for task in loaded for row in _task_samples(task, done[task.name], limit)])
    # Without questions the file is emptied, or older answers would pass for this model's.
    write_transcripts(folder, rows or [])
    # Last, because it says that the other files are complete.
    write_results(folder, results)
    return results


def check_evaluation(
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str | Path | Task],
    protocols: Sequence[str] | None = None,
    limit: int | None = None,
    questions: str | Path | Questions | None = None,
    question_tokens: int = 64,
) -> None:
    """Check, before there is a model, that it will be able to read all that ``evaluate_model`` would ask.

    Args:
        limits: Positions and tokens of the model that will be scored.
        tokenizer: Its tokenizer; the rest is as for ``evaluate_model``.
    Raises:
        EvalError: A task that does not exist, a chat template that cannot ask it, or items that are too long or have
            tokens that the model does not know.
    """
    protocols = _default_protocols() if protocols is None else protocols
    for task in load_tasks(tasks):
        for protocol in _fitting(task, protocols):
            PROTOCOLS[protocol].check(limits, tokenizer, task, limit=limit)
    if questions is not None:
        asked = questions if isinstance(questions, Questions) else load_questions(questions)
        check_questions(limits, tokenizer, asked, max_new_tokens=question_tokens)


def _default_protocols() -> tuple[str, ...]:
    return tuple(lead_protocols().values())


def _language_model(
    model: PreTrainedModel | LanguageModel, tokenizer: PreTrainedTokenizerBase | None, batch_size: int
) -> LanguageModel:
    if isinstance(model, LanguageModel):
        return model
    if tokenizer is None:
        raise EvalError(
            f"{type(model).__name__} is not a LanguageModel, and a Hugging Face model needs its tokenizer",
            hint="evaluate_model(model, tokenizer, ...)",
        )
    # Imported here: torch and transformers take seconds, and another engine may do without.
    from gendistill_evals.hf import HFModel

    return HFModel(model, tokenizer, batch_size=batch_size)


def _fitting(task: Task, protocols: Sequence[str]) -> list[str]:
    """List the protocols that are asked for and can score a task."""
    return [
        name for name, protocol in PROTOCOLS.items() if name in protocols and protocol.why_not(task) is None
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece that can be scored alone: its key, a check of its inputs, and the computation."""

    key: PartKey
    check: Callable[[], None]
    compute: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class _Scorer:
    """The scoring of one model part by part; ``identity`` is what every score of it depends on."""

    model: LanguageModel
    progress: OnTaskProgress | None
    identity: dict[str, Any]
    decoding: dict[str, Any]

    def task_part(self, task: Task, protocol: str, limit: int | None) -> _Part:
        """One task under one protocol: ``{score, samples}``."""
        generates = PROTOCOLS[protocol].family is ProtocolFamily.GENERATION
        inputs = {
            "items": task.items_sha256,
            "prompt": task.prompt_sha256,
            "limit": task.cut_at(limit),
            # Log-likelihood decodes nothing.
            "decoding": self.decoding if generates else None,
        }
        return _Part(
            PartKey.of(f"{task.name}.{protocol}", [self.identity, inputs]),
            check=partial(PROTOCOLS[protocol].check, self.model, self.model.tokenizer, task, limit=limit),
            compute=partial(self._score, protocol, task, limit),
        )

    def transcripts_part(
        self, questions: Questions, max_new_tokens: int, teacher: LanguageModel | None
    ) -> _Part:
        """The answers to open questions: their rows."""
        inputs = {
            "questions": questions.sha256,
            "max_new_tokens": max_new_tokens,
            "teacher": teacher.identity() if teacher is not None else None,
            "decoding": self.decoding,
        }
        return _Part(
            PartKey.of("transcripts", [self.identity, inputs]),
            check=partial(
                check_questions,
                self.model,
                self.model.tokenizer,
                questions,
                max_new_tokens=max_new_tokens,
                teacher=teacher,
            ),
            compute=partial(
                write_answers,
                self.model,
                questions,
                max_new_tokens=max_new_tokens,
                teacher=teacher,
                progress=self._on_progress(questions.name, "transcripts"),
            ),
        )

    def _score(self, protocol: str, task: Task, limit: int | None) -> dict[str, Any]:
        progress = self._on_progress(task.name, protocol)
        run = PROTOCOLS[protocol].run(self.model, task, limit=limit, progress=progress)
        return {"score": run.score, "samples": list(run.samples)}

    def _on_progress(self, task: str, protocol: str) -> Callable[[int, int], None] | None:
        return partial(self.progress, task, protocol) if self.progress else None


def _finish(parts: Mapping[Key, _Part], store: PartStore) -> dict[Key, Any]:
    """Return the content of every part, computing what is missing once all of it is known to fit the model."""
    done = {name: store.read(part.key) for name, part in parts.items()}
    missing = [name for name, content in done.items() if content is None]
    for name in missing:
        parts[name].check()
    for name in missing:
        done[name] = parts[name].compute()
        store.write(parts[name].key, done[name])
    return done


def _task_entry(
    task: Task, done: dict[str, Any], limit: int | None, protocols: Sequence[str]
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "task": task.name,
        "kind": str(task.kind),
        "judge": task.judge,
        "metric": str(task.metric),
        "items_sha256": task.items_sha256,
        "prompt_sha256": task.prompt_sha256,
        "n": len(task.items[:limit]),
        "limit": task.cut_at(limit),
    }
    for name, protocol in PROTOCOLS.items():
        entry[name] = done[name]["score"] if name in done else None
        entry[f"{name}_reason"] = protocol.why_not(task) or (None if name in protocols else "not asked for")
    return entry


def _task_samples(task: Task, done: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    return [
        {
            "task": task.name,
            "id": item.id,
            "prompt": item.prompt,
            "options": list(item.options) if item.options else None,
            "gold": item.gold,
            **{name: done[name]["samples"][place] if name in done else None for name in PROTOCOLS},
        }
        for place, item in enumerate(task.items[:limit])
    ]


def _check_settings(
    protocols: Sequence[str], *, limit: int | None, batch_size: int, question_tokens: int, role: str
) -> None:
    unknown = [protocol for protocol in protocols if protocol not in PROTOCOLS]
    if unknown or not protocols:
        raise EvalError(
            f"protocols must be one or more of {', '.join(PROTOCOLS)}, got {', '.join(unknown) or 'none'}",
            exit_code=2,
        )
    if taken := [name for name in PROTOCOLS if name in _OWN_KEYS]:
        raise EvalError(
            f"a protocol is called {', '.join(taken)}, which names something else in the files",
            hint="register it in PROTOCOLS under another name",
        )
    if role not in ROLES:
        raise EvalError(f'role must be one of {", ".join(ROLES)}, got "{role}"', exit_code=2)
    for name, value in (("limit", limit), ("batch_size", batch_size), ("question_tokens", question_tokens)):
        if value is None and name == "limit":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EvalError(f"{name} must be at least 1, got {shorten(value)}", exit_code=2)

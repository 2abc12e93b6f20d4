"""Score a model on tasks under several protocols. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.errors import EvalError
from gendistill_evals.keeping import KeepingModel
from gendistill_evals.model import LanguageModel, Limits
from gendistill_evals.prompts import Prompter
from gendistill_evals.protocols import PROTOCOLS, ProtocolRun, lead_protocols
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

    Every answer and log-probability is kept in ``parts_dir`` as soon as it is there, under a hash of all that decides
    it (``KeepingModel``). Calling again, with more items or in another ``out_dir``, asks only for what is missing.

    Args:
        model: Hugging Face causal language model, on the device and in the dtype to score it with; or any
            ``LanguageModel``.
        tokenizer: The tokenizer of a Hugging Face model; a ``LanguageModel`` has its own.
        tasks: Built-in names, paths of task files, or tasks.
        out_dir: Folder for ``results.json``, ``samples.jsonl`` and ``transcripts.jsonl``.
        model_name: Name of the model in the files.
        parts_dir: Folder of what is kept, which several models, processes and ``out_dir`` may share; None is
            ``out_dir/parts``.
        protocols: Names in ``PROTOCOLS``; None for the first of each family, ``likelihood`` and ``generation``.
        limit: Items per task, from the first; None scores all.
        batch_size: Sequences per forward of a Hugging Face model.
        questions: Open questions for transcripts: built-in name, path, loaded, or None for none.
        question_tokens: Longest open answer, in tokens.
        role: ``teacher``, ``student`` or ``model``, for the files.
        progress: Called with task, protocol, items done and items in all; what was kept is done at once.
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
    kept = Path(parts_dir) if parts_dir is not None else folder / "parts"
    scored = _language_model(model, tokenizer, batch_size)
    judge = None
    if questions and teacher is not None:
        judge = scored if teacher is model else _language_model(teacher, tokenizer, batch_size)
    prompter = Prompter(scored.tokenizer)
    decoding = greedy_decoding(scored, prompter)
    asked = [(task, PROTOCOLS[name]) for task in loaded for name in _fitting(task, protocols)]
    for task, protocol in asked:
        protocol.check(scored, scored.tokenizer, task, limit=limit)
    if questions:
        check_questions(scored, scored.tokenizer, questions, max_new_tokens=question_tokens, teacher=judge)
    done: dict[str, dict[str, ProtocolRun]] = {task.name: {} for task in loaded}
    rows: list[dict[str, Any]] | None = None
    with ExitStack() as stack:
        keeping = stack.enter_context(KeepingModel(scored, kept))
        for task, protocol in asked:
            shown = partial(progress, task.name, protocol.name) if progress else None
            run = protocol.run(keeping, task, limit=limit, progress=shown)
            score = {**run.score, "seconds": keeping.take_seconds()}
            done[task.name][protocol.name] = ProtocolRun(score, run.samples)
        if questions:
            rows = write_answers(
                keeping,
                questions,
                max_new_tokens=question_tokens,
                # One that judges its own answers is not hashed twice.
                teacher=keeping
                if judge is scored
                else judge and stack.enter_context(KeepingModel(judge, kept)),
                progress=partial(progress, questions.name, "transcripts") if progress else None,
            )
    setup = scored.setup()
    settings = {
        **decoding.settings(),
        **prompter.settings(),
        "batch_size": setup.batch_size,
        "overrode": decoding.overrode,
    }
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


def _task_entry(
    task: Task, done: Mapping[str, ProtocolRun], limit: int | None, protocols: Sequence[str]
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
        entry[name] = done[name].score if name in done else None
        entry[f"{name}_reason"] = protocol.why_not(task) or (None if name in protocols else "not asked for")
    return entry


def _task_samples(task: Task, done: Mapping[str, ProtocolRun], limit: int | None) -> list[dict[str, Any]]:
    return [
        {
            "task": task.name,
            "id": item.id,
            "prompt": item.prompt,
            "options": list(item.options) if item.options else None,
            "gold": item.gold,
            **{name: done[name].samples[place] if name in done else None for name in PROTOCOLS},
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

"""Score a model on tasks under several protocols. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.diagnostics import MOST_PERMUTATIONS, Reordered, diagnose, in_other_orders
from gendistill_evals.errors import EvalError
from gendistill_evals.forms import Form
from gendistill_evals.judges import WHY_NOT
from gendistill_evals.keeping import KeepingModel
from gendistill_evals.model import LanguageModel, Limits
from gendistill_evals.prompts import PLAIN_STYLE, Prompter, Style
from gendistill_evals.protocols import (
    PROTOCOLS,
    EvalProtocol,
    ProtocolFamily,
    ProtocolRun,
    asked_items,
    lead_protocols,
)
from gendistill_evals.reading import shorten
from gendistill_evals.results import (
    SCHEMA,
    write_results,
    write_samples,
    write_transcripts,
)
from gendistill_evals.task import Questions, Task, built, load_questions, load_tasks
from gendistill_evals.transcripts import check_questions, write_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnTaskProgress = Callable[[str, str, int, int], None]
ROLES = ("teacher", "student", "model")
# What a protocol cannot be called: its entries stand beside these in the files.
_OWN_KEYS = frozenset({
    "task", "kind", "judge", "metric", "items_sha256", "prompt_sha256", "n", "limit", "id", "group", "subject",
    "length", "depth", "source", "prompt", "options", "gold",
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
    style: Style = PLAIN_STYLE,
    permutations: int = 0,
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
        style: How prompts are made of items: chat template, system turn, reasoning, examples.
        permutations: In how many further orders options are shown, to see whether a model chooses places.
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
    _check_settings(
        protocols,
        limit=limit,
        batch_size=batch_size,
        question_tokens=question_tokens,
        role=role,
        permutations=permutations,
    )
    loaded = load_tasks(tasks)
    if questions is not None and not isinstance(questions, Questions):
        questions = load_questions(questions)
    folder = Path(out_dir)
    kept = Path(parts_dir) if parts_dir is not None else folder / "parts"
    scored = _language_model(model, tokenizer, batch_size)
    judge = None
    if questions and teacher is not None:
        judge = scored if teacher is model else _language_model(teacher, tokenizer, batch_size)
    prompter = Prompter(scored.tokenizer, style)
    decoding = greedy_decoding(scored, prompter)
    loaded = [built(task, prompter, scored.max_tokens) for task in loaded]
    asked = _asked(loaded, protocols)
    for task, protocol in asked:
        if protocol.family is ProtocolFamily.GENERATION:
            check_judged(task)
        for each in (task, *(shuffled.task for shuffled in in_other_orders(task, permutations, limit=limit))):
            protocol.check(scored, scored.tokenizer, each, limit=limit, style=style)
    if questions:
        check_questions(
            scored, scored.tokenizer, questions, max_new_tokens=question_tokens, teacher=judge, style=style
        )
    orders: dict[str, dict[str, list[Reordered]]] = {task.name: {} for task in loaded}
    done: dict[str, dict[str, ProtocolRun]] = {task.name: {} for task in loaded}
    rows: list[dict[str, Any]] | None = None
    with ExitStack() as stack:
        keeping = stack.enter_context(KeepingModel(scored, kept))
        for task, protocol in asked:
            shown = partial(progress, task.name, protocol.name) if progress else None
            run = protocol.run(keeping, task, limit=limit, style=style, progress=shown)
            score = {**run.score, "seconds": keeping.take_seconds()}
            done[task.name][protocol.name] = ProtocolRun(score, run.samples)
            found = orders[task.name].setdefault(protocol.name, [])
            for shuffled in in_other_orders(task, permutations, limit=limit):
                samples = protocol.run(keeping, shuffled.task, style=style).samples
                found.append(shuffled.answered(samples, run.samples))
            # Time that is spent on other orders is not the score's.
            keeping.take_seconds()
        if questions:
            rows = write_answers(
                keeping,
                questions,
                max_new_tokens=question_tokens,
                # One that judges its own answers is not hashed twice.
                teacher=keeping
                if judge is scored
                else judge and stack.enter_context(KeepingModel(judge, kept)),
                style=style,
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
        "diagnostics": {
            "permutations": permutations,
            "tasks": {
                task.name: diagnose(task.items[:limit], done[task.name], orders[task.name]) for task in loaded
            },
        },
    }
    shown = _shown(protocols)
    write_samples(
        folder,
        [
            row
            for task in loaded
            for row in _task_samples(task, done[task.name], orders[task.name], limit, shown)
        ],
    )
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
    style: Style = PLAIN_STYLE,
    questions: str | Path | Questions | None = None,
    question_tokens: int = 64,
) -> None:
    """Check, before there is a model, that it will be able to read all that ``evaluate_model`` would ask.

    Args:
        limits: Positions and tokens of the model that will be scored.
        tokenizer: Its tokenizer; the rest is as for ``evaluate_model``.
    Raises:
        EvalError: A task that does not exist, that no protocol can score or whose answers nobody would judge, a chat
            template that cannot ask it, or items that are too long or have tokens that the model does not know.
    """
    protocols = _default_protocols() if protocols is None else protocols
    loaded = load_tasks(tasks)
    if any(task.synthesis for task in loaded):
        prompter = Prompter(tokenizer, style)
        loaded = [built(task, prompter, limits.max_tokens) for task in loaded]
    for task, protocol in _asked(loaded, protocols):
        if protocol.family is ProtocolFamily.GENERATION:
            check_judged(task)
        protocol.check(limits, tokenizer, task, limit=limit, style=style)
    if questions is not None:
        asked = questions if isinstance(questions, Questions) else load_questions(questions)
        check_questions(limits, tokenizer, asked, max_new_tokens=question_tokens, style=style)


def check_tasks(tasks: Sequence[Task], *, protocols: Sequence[str], style: Style = PLAIN_STYLE) -> None:
    """Check what can be checked of tasks without a tokenizer or a model, which may be a download of hours.

    Args:
        tasks: Loaded.
        protocols, style: As for ``evaluate_model``.
    Raises:
        EvalError: Tasks that no protocol can score, that have too few examples, or whose answers nobody would judge.
    """
    # Texts that are generated wait for a tokenizer.
    known = [task for task in tasks if task.items]
    if len(known) == len(tasks):
        known = list({task.name: task for task, _ in _asked(known, protocols)}.values())
    for task in known:
        if any(PROTOCOLS[name].family is ProtocolFamily.GENERATION for name in protocols):
            check_judged(task)
        asked_items(task, Form.PLAIN, style, 1)


def check_judged(task: Task) -> None:
    """Refuse a task whose answers nobody would judge, before any is asked for.

    Raises:
        EvalError: Its judge judges nothing at the moment; says why.
    """
    ready = WHY_NOT.get(task.judge)
    if ready is not None and (reason := ready()):
        raise EvalError(
            f"{task.name} cannot be scored: {reason}",
            where=task.name,
            hint="gendistill eval --allow-code, or eval.allow_code: true; from Python gendistill_evals.code.allowed()",
        )


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


def _asked(tasks: Sequence[Task], protocols: Sequence[str]) -> list[tuple[Task, EvalProtocol]]:
    """List the tasks with the protocols that are asked for and can score them.

    Raises:
        EvalError: Nothing can be scored, or nothing by a protocol that only runs where it is asked for by name.
    """
    asked = [
        (task, protocol)
        for task in tasks
        for name, protocol in PROTOCOLS.items()
        if name in protocols and protocol.why_not(task) is None
    ]
    used = {protocol.name for _, protocol in asked}
    idle = [name for name in protocols if name not in used and name in PROTOCOLS]
    if tasks and (not used or any(name not in _default_protocols() for name in idle)):
        name = next((name for name in idle if name not in _default_protocols()), idle[0])
        reasons = "; ".join(f"{task.name}: {PROTOCOLS[name].why_not(task)}" for task in tasks)
        raise EvalError(
            f"{name} can score none of the tasks: {reasons}",
            hint="leave the protocol out, or add a task that it can score",
            exit_code=2,
        )
    return asked


def _shown(protocols: Sequence[str]) -> list[str]:
    """List the protocols that have entries in the files: those asked for, and the first of each family."""
    return [name for name in PROTOCOLS if name in protocols or name in _default_protocols()]


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
        **({"source": dict(task.source)} if task.source else {}),
    }
    for name in _shown(protocols):
        entry[name] = done[name].score if name in done else None
        reason = PROTOCOLS[name].why_not(task)
        entry[f"{name}_reason"] = reason or (None if name in protocols else "not asked for")
    return entry


def _task_samples(
    task: Task,
    done: Mapping[str, ProtocolRun],
    orders: Mapping[str, Sequence[Reordered]],
    limit: int | None,
    protocols: Sequence[str],
) -> list[dict[str, Any]]:
    def entry(name: str, place: int) -> dict[str, Any] | None:
        if name not in done:
            return None
        others = [found.choices[place] for found in orders[name] if place in found.choices]
        return {**done[name].samples[place], **({"permuted": others} if others else {})}

    return [
        {
            "task": task.name,
            "id": item.id,
            "group": item.group,
            **({"subject": item.subject} if item.subject is not None else {}),
            **({"length": item.cell[0], "depth": item.cell[1]} if item.cell is not None else {}),
            "prompt": item.prompt,
            "options": list(item.options) if item.options else None,
            "gold": item.gold,
            **{name: entry(name, place) for name in protocols},
        }
        for place, item in enumerate(task.items[:limit])
    ]


def _check_settings(
    protocols: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    question_tokens: int,
    role: str,
    permutations: int,
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
    if (
        not isinstance(permutations, int)
        or isinstance(permutations, bool)
        or not 0 <= permutations <= MOST_PERMUTATIONS
    ):
        raise EvalError(
            f"permutations must be a whole number from 0 to {MOST_PERMUTATIONS}, got {shorten(permutations)}",
            exit_code=2,
        )

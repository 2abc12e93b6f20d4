"""What is wrong or unwise about a recipe beside its teacher, said before anything trains. Imports no torch.

One function per rule; ``recipe check``, ``--dry-run`` and the run itself all ask ``advise``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gendistill.config.schema import MixtureConfig, Recipe, SourceConfig
from gendistill.errors import CheckpointError, RecipeError
from gendistill.paths import read_json


def advise(recipe: Recipe, teacher_config: Mapping[str, Any] | None, *, chat_template: bool) -> list[str]:
    """List what a recipe should not do with this teacher, one warning a line.

    Args:
        recipe: The recipe.
        teacher_config: Content of the teacher's config.json; None if it is not known yet.
        chat_template: Whether the teacher's tokenizer has one.
    """
    return [
        *beyond_the_positions(recipe, teacher_config or {}),
        *outside_the_template(recipe, chat_template=chat_template),
        *stops_on_what_is_scored(recipe),
    ]


def beyond_the_positions(recipe: Recipe, teacher_config: Mapping[str, Any]) -> Iterator[str]:
    """Warn of rows that are longer than what the teacher was trained on."""
    positions = teacher_config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return
    lengths = {f"stages.{name}.seq_len": stage.seq_len for name, stage in recipe.stages.items()}
    lengths["heldout.seq_len"] = recipe.heldout.seq_len
    if recipe.eval.questions is not None:
        lengths["eval.question_tokens"] = recipe.eval.question_tokens
    for setting, length in lengths.items():
        if length > positions:
            yield (
                f"{setting} is {length:,}, the teacher has {positions:,} positions: beyond them it was never "
                f"trained, and its predictions are not a target; set {setting}={positions}"
            )


def stops_on_what_is_scored(recipe: Recipe) -> Iterator[str]:
    """Warn of a stage that is ended by the very items that its student is scored on afterwards."""
    for name, stage in recipe.stages.items():
        if stage.stop_early is not None and stage.stop_early.task in recipe.eval.all_tasks:
            yield (
                f"stages.{name}.stop_early chooses the end of the stage by {stage.stop_early.task}, which the "
                "evaluation scores too: its score will be too good; give the one or the other another task"
            )


def outside_the_template(recipe: Recipe, *, chat_template: bool) -> Iterator[str]:
    """Warn of a chat model that is trained on plain text alone and asked in its template."""
    asks = recipe.eval.asks
    sources = {
        name: recipe.data[name] for stage in recipe.stages.values() for name in _names(recipe, stage.data)
    }
    formats = {source.format for source in sources.values() if isinstance(source, SourceConfig)}
    if chat_template and asks and formats and "messages" not in formats:
        name = list(recipe.stages)[-1]
        yield (
            "no stage trains in the teacher's chat template, in which the evaluation asks: what it writes there "
            f"will suffer more than its likelihoods show; give stages.{name}.data a source with format: messages"
        )


def _names(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Name the sources behind an entry under ``data:``."""
    entry = recipe.data[name]
    return tuple(entry.mix) if isinstance(entry, MixtureConfig) else (name,)


def check_batches(recipe: Recipe, num_processes: int) -> None:
    """Refuse a batch that the processes cannot share.

    Raises:
        RecipeError: ``batch_size`` of a stage is not a multiple of ``micro_batch_size`` times processes.
    """
    if num_processes == 1:
        return
    for name, stage in recipe.stages.items():
        batch, micro, where = stage.batch_size, stage.micro_batch_size, f"stages.{name}"
        if batch % num_processes:
            most = max(number for number in range(1, num_processes) if batch % number == 0)
            few = f"{num_processes} processes are more than the {batch} rows of a step"
            uneven = f"batch_size {batch} cannot be shared equally by {num_processes} processes"
            raise RecipeError(
                few if batch < num_processes else uneven,
                where=f"{where}.batch_size",
                hint=f"use {most} processes, or {where}.batch_size={math.ceil(batch / num_processes) * num_processes}, "
                "which is another training",
            )
        share = batch // num_processes
        if share % micro:
            fits = max(rows for rows in range(1, micro) if share % rows == 0)
            raise RecipeError(
                f"each of {num_processes} processes has {share} of the {batch} rows of a step, which is not a multiple "
                f"of micro_batch_size {micro}",
                where=f"{where}.micro_batch_size",
                hint=f"{where}.micro_batch_size={fits}: the result is the same up to rounding",
            )


def known_teacher(recipe: Recipe) -> tuple[dict[str, Any] | None, bool]:
    """Read what lies on this machine of a teacher: its config, and whether it has a chat template.

    Returns: ``(None, False)`` for a teacher that has to be fetched or made first, or that cannot be read.
    """
    spec = recipe.teacher.model
    folder = Path(spec)
    if not folder.is_absolute():
        if (
            spec.startswith(("pypi:", "builtin:"))
            or (cached := cached_folder(spec, recipe.teacher.revision)) is None
        ):
            return None, False
        folder = cached
    if not (folder / "config.json").is_file():
        return None, False
    try:
        config = read_json(folder / "config.json", shape=dict[str, Any], error=CheckpointError)
    except CheckpointError:
        return None, False
    return config, has_chat_template(folder)


def cached_folder(spec: str, revision: str) -> Path | None:
    """Find a hub model's folder among what was downloaded before; no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(spec, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a checkpoint folder has a chat template."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    try:
        settings = read_json(path, shape=dict[str, Any], error=CheckpointError)
    except CheckpointError:
        return False
    return bool(settings.get("chat_template"))

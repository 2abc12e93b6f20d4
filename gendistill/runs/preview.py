"""Show what a stage trains on: packed rows with counted tokens apart from ignored ones."""

from __future__ import annotations

import itertools
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gendistill.config.schema import Recipe
from gendistill.data.batch import IGNORE, Batch
from gendistill.data.stream import BatchStream, build_stream
from gendistill.errors import RecipeError
from gendistill.text import printable, printable_lines

_COUNTED = "bold green"
_IGNORED = "dim"
_TIMED_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PackedDocument:
    """One document of a packed row.

    Attributes:
        ids: ``[T]`` token ids.
        counted: ``[T]`` bool, the tokens that some position must predict.
    """

    ids: np.ndarray
    counted: np.ndarray


def render_preview(
    recipe: Recipe, stage_name: str, num_rows: int = 3, *, plain: bool | None = None
) -> RenderableType:
    """Render the first packed rows of a stage with their statistics.

    Args:
        recipe: The recipe.
        stage_name: Name of the stage.
        num_rows: Packed rows to show.
        plain: Mark counted tokens with ``{+ +}`` instead of colour; None: when the output is not a terminal, or
            ``NO_COLOR`` is set.
    Raises:
        CheckpointError: The teacher's tokenizer cannot be loaded.
        DataError: The data cannot be read or rendered.
        RecipeError: No such stage.
    """
    # only this command needs a tokenizer without a model, and opening a checkpoint may convert it
    from gendistill.checkpoints.resolve import load_tokenizer, resolve_checkpoint

    if stage_name not in recipe.stages:
        raise RecipeError(
            f'there is no stage "{stage_name}"', where="stages", hint="stages: " + ", ".join(recipe.stages)
        )
    checkpoint = resolve_checkpoint(recipe.teacher.model, revision=recipe.teacher.revision)
    tokenizer = load_tokenizer(checkpoint.folder)
    stream = build_stream(recipe, stage_name, tokenizer)
    return preview_stream(stream, tokenizer, title=stage_name, num_rows=num_rows, plain=plain)


def preview_stream(
    stream: BatchStream,
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    num_rows: int = 3,
    plain: bool | None = None,
) -> RenderableType:
    """Render the next step of a stream, with statistics over about a second of steps.

    Args:
        stream: Where the batches come from; the steps looked at are consumed.
        tokenizer: Turns ids back into text.
        title: Name of the stage.
        num_rows: Packed rows to show.
        plain: As in ``render_preview``.
    """
    if plain is None:
        plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    started = time.perf_counter()
    first = next(stream)
    batches = list(first)
    while (seconds := time.perf_counter() - started) < _TIMED_SECONDS:
        batches += next(stream)
    rows = [row for batch in first for row in split_rows(batch)]
    parts: list[RenderableType] = [_statistics(stream, batches, seconds, title=title), _legend(plain)]
    for number, row in enumerate(rows[:num_rows]):
        parts.append(_row_text(number, row, tokenizer, plain=plain))
    return Group(*parts)


def split_rows(batch: Batch) -> list[list[PackedDocument]]:
    """Take the documents of every row out of a batch again, without the padding."""
    num_rows, seq_len = batch.input_ids.shape
    rows: list[list[PackedDocument]] = [[] for _ in range(num_rows)]
    ids, labels = batch.input_ids.flatten().numpy(), batch.labels.flatten().numpy()
    bounds = batch.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        counted = np.concatenate([[False], labels[start : end - 1] != IGNORE])
        # every packed document has a label, and padding has none
        if counted.any():
            rows[start // seq_len].append(PackedDocument(ids[start:end], counted))
    return rows


def _statistics(stream: BatchStream, batches: list[Batch], seconds: float, *, title: str) -> Table:
    size = sum(batch.input_ids.numel() for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    labels = sum(batch.num_labels for batch in batches)
    documents = sum(len(row) for batch in batches for row in split_rows(batch))
    table = Table.grid(padding=(0, 2))
    table.add_row("stage", title)
    table.add_row("looked at", f"{tokens:,} tokens in {documents:,} documents")
    table.add_row("counted", f"{labels / tokens:.1%} of the tokens enter the loss")
    table.add_row("packing", f"{tokens / size:.1%} of the positions hold a token")
    ahead = f"{stream.prefetch} steps ahead of the training" if stream.prefetch else "when a step needs them"
    speed = f"{tokens / seconds:,.0f} tokens per second, read to packed, {ahead} (engine.prefetch)"
    table.add_row("speed", speed)
    for name, counts in stream.dropped.items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if reason != "rows")
        read = f"{counts['rows']:,} rows read; left out: {reasons or 'none'}"
        # reasons quote rows, which are neither markup nor for the terminal to obey
        table.add_row(f"data.{name}", Text(printable_lines(read)))
    for note in stream.notes:
        table.add_row("note", Text(printable_lines(note)))
    return table


def _legend(plain: bool) -> Text:
    if plain:
        return Text("{+counted+}, the rest is context only\n")
    return Text.assemble(("counted", _COUNTED), ("  context only", _IGNORED), "\n")


def _row_text(
    number: int, row: list[PackedDocument], tokenizer: PreTrainedTokenizerBase, *, plain: bool
) -> Text:
    text = Text(no_wrap=plain, overflow="ignore" if plain else None)
    for index, segment in enumerate(row):
        head = f"row {number + 1}, document {index + 1} of {len(row)}"
        text.append(f"--- {head}: {len(segment.ids):,} tokens, {int(segment.counted.sum()):,} counted ---\n")
        edges = np.flatnonzero(np.diff(segment.counted)) + 1
        for piece in np.split(np.arange(len(segment.ids)), edges):
            words = str(tokenizer.decode(segment.ids[piece].tolist(), skip_special_tokens=False))
            words = "\n".join(printable(line, longest=len(line)) for line in words.split("\n"))
            is_counted = bool(segment.counted[piece[0]])
            if plain:
                text.append(f"{{+{words}+}}" if is_counted else words)
            else:
                text.append(words, style=_COUNTED if is_counted else _IGNORED)
        text.append("\n")
    return text

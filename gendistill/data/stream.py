"""Global steps of packed batches: the same documents whatever the number of ranks, resumable at every step."""

from __future__ import annotations

import copy
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gendistill.config.schema import MixtureConfig, Recipe, SourceConfig
from gendistill.data.ahead import PATIENCE, Ahead, Stopped
from gendistill.data.batch import Batch, with_room
from gendistill.data.feed import Feed, Packed, Sent
from gendistill.data.files import BadRow, Row, warn_once
from gendistill.data.first_token import note_first_tokens
from gendistill.data.mixture import Mixture
from gendistill.data.packing import WINDOW, build_batch, choose_row, pack
from gendistill.data.render import Mask, Renderer, TokenizedSample
from gendistill.data.sources import heldout_rows, open_source
from gendistill.errors import DataError, RecipeError

CHUNK_ROWS = 64
_HELDOUT_BATCH_ROWS = 4


@dataclass(slots=True)
class _Waiting:
    """A document that has been rendered and not yet packed, and where it came from."""

    chunk: int
    index: int
    sample: TokenizedSample


@dataclass(slots=True)
class _Step:
    """The batches of one global step on this rank, and the state after it.

    Attributes:
        packed: The batches once more, to be sent to a GPU.
    """

    batches: list[Batch]
    state: dict[str, Any]
    packed: Packed | None


class BatchStream:
    """Global steps without end; each is the list of micro-batches of this rank.

    A step is ``batch_size`` packed rows. Every rank packs all of them and keeps its share, so the documents of a
    step depend neither on the number of ranks nor on ``micro_batch_size``, and a saved state may be resumed with
    other values of both. Steps are prepared in a thread while others are used, and the next one is on its way to the
    GPU while the current one is computed.

    Args:
        mixture: Rows with the names of their sources.
        renderers: One per source.
        seq_len: Tokens of a row.
        batch_size: Rows of a step, over all ranks; a multiple of ``world``.
        micro_batch_size: Rows of a micro-batch; the last one of a rank may have fewer.
        pad_id: Fills the ends of rows.
        rank: This process.
        world: Number of processes.
        prefetch: Steps that may be prepared ahead; 0: each when it is asked for.
        device: Where batches are to be; they stay on the host for any device but a GPU.
        room: Give batches room (``with_room``).
        notes: What is odd about the rows, for people; like ``prefetch`` an attribute of the same name.
    """

    def __init__(
        self,
        mixture: Mixture,
        renderers: Mapping[str, Renderer],
        *,
        seq_len: int,
        batch_size: int,
        micro_batch_size: int,
        pad_id: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        device: torch.device | None = None,
        room: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        assert batch_size % world == 0
        self.notes = tuple(notes)
        self._mixture = mixture
        self._renderers = dict(renderers)
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._pad_id = pad_id
        self._rank = rank
        self._world = world
        self._room = room
        self._waiting: list[_Waiting] = []
        self._chunk_states: dict[int, dict[str, Any]] = {}
        self._num_chunks = 0
        self._steps = 0
        self.prefetch, self._closed = prefetch, False
        self._ahead: Ahead | None = None
        self._feed = Feed(device) if device is not None and device.type == "cuda" else None
        self._sent: tuple[_Step, Sent] | None = None
        self._used: Sequence[Batch] = ()
        self._builders: tuple[Callable[..., Any], ...] = ()
        self._state = self._snapshot()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> list[Batch]:
        assert not self._closed
        if self._feed is None:
            step = self._take()
            self._state = step.state
            return step.batches
        # what kernels have asked of the last step's documents, they will ask of every step's
        used = [build for batch in self._used for build in batch.segments.builders]
        self._builders = tuple(dict.fromkeys([*self._builders, *used]))
        step, sent = self._sent or self._send(self._feed)
        is_next_there = self._ahead is not None and self._ahead.waits()
        self._sent = self._send(self._feed) if is_next_there else None
        self._state, self._used = step.state, sent.batches
        return self._feed.receive(sent)

    def _take(self) -> _Step:
        if not self.prefetch:
            return self._make_step()
        if self._ahead is None:
            self._ahead = Ahead(self._make_step, self.prefetch)
        return self._ahead.take()

    def _send(self, feed: Feed) -> tuple[_Step, Sent]:
        step = self._take()
        assert step.packed is not None
        return step, feed.send(step.packed)

    def close(self) -> None:
        """Prepare nothing more. What was prepared is lost: only a saved state can go on."""
        self._halt(PATIENCE)
        self._closed = True

    def _halt(self, patience: float | None = None) -> None:
        self._sent, self._used = None, ()
        # what it was at is of no interest, but it must not run on beside a restored state
        if self._ahead is not None and self._ahead.close(patience):
            self._ahead = None

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """Rows left out so far, by source and reason, with the rows read under ``rows``."""
        return {
            name: {"rows": each["rows"], **each["dropped"]} for name, each in self._state["rendered"].items()
        }

    @property
    def epochs(self) -> dict[str, int]:
        """Epochs finished by each source."""
        return {name: state["epoch"] for name, state in self._state["mixture"]["sources"].items()}

    def state_dict(self) -> dict[str, Any]:
        """Say where the stream stands after the last step it yielded, as JSON of a few kilobytes."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the step after the one that was last yielded when the state was taken.

        Raises:
            DataError: The state belongs to other data, another sequence length or another batch size.
        """
        self._halt()
        shape = state.get("shape") if isinstance(state, dict) else None
        if shape != self._shape():
            raise DataError(
                f"the data state was saved for {json.dumps(shape)}, this stage has "
                f"{json.dumps(self._shape())}",
                hint="restore these settings in the recipe, or start a new run with another name=",
            )
        state = copy.deepcopy(state)
        try:
            self._restore(state)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                "the saved state of the data is damaged, or the rows are others than when the run was saved",
                where="data",
                hint="restore the data, or start a new run with another name=",
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        self._waiting, self._chunk_states = [], {}
        for chunk in state["chunks"]:
            # documents that were rendered but not packed are rendered again
            self._mixture.load_state_dict(chunk["from"])
            samples = self._read_chunk()
            number = len(self._chunk_states)
            self._chunk_states[number] = chunk["from"]
            self._waiting += [_Waiting(number, index, samples[index]) for index in chunk["left"]]
        self._num_chunks = len(self._chunk_states)
        self._mixture.load_state_dict(state["mixture"])
        for name, renderer in self._renderers.items():
            renderer.rows = state["rendered"][name]["rows"]
            renderer.dropped = Counter(state["rendered"][name]["dropped"])
        self._steps = state["steps"]
        self._state, self._closed = state, False

    def _shape(self) -> dict[str, Any]:
        return {
            "sources": sorted(self._renderers),
            "seq_len": self._seq_len,
            "batch_size": self._batch_size,
        }

    def _snapshot(self) -> dict[str, Any]:
        left: dict[int, list[int]] = {}
        for each in self._waiting:
            left.setdefault(each.chunk, []).append(each.index)
        self._chunk_states = {chunk: self._chunk_states[chunk] for chunk in left}
        return {
            "shape": self._shape(),
            "steps": self._steps,
            "mixture": self._mixture.state_dict(),
            "chunks": [
                {"from": self._chunk_states[chunk], "left": indices} for chunk, indices in left.items()
            ],
            "rendered": {
                name: {"rows": renderer.rows, "dropped": dict(renderer.dropped)}
                for name, renderer in self._renderers.items()
            },
        }

    def _read_chunk(self) -> list[TokenizedSample]:
        """Draw and render the next rows. Pieces of long documents come in turns, so that one fills no batch alone."""
        by_source: dict[str, list[Row | BadRow]] = {}
        order: list[tuple[str, int]] = []
        for _ in range(CHUNK_ROWS):
            name, row = next(self._mixture)
            rows = by_source.setdefault(name, [])
            order.append((name, len(rows)))
            rows.append(row)
        rendered = {name: self._renderers[name].render(rows) for name, rows in by_source.items()}
        turns = zip_longest(*(rendered[name][place] for name, place in order))
        return [sample for sample in chain.from_iterable(turns) if sample is not None]

    def _take_row(self) -> list[TokenizedSample]:
        while len(self._waiting) < WINDOW:
            if self._ahead is not None and self._ahead.stopped:
                raise Stopped
            state = self._mixture.state_dict()
            samples = self._read_chunk()
            number, self._num_chunks = self._num_chunks, self._num_chunks + 1
            self._chunk_states[number] = state
            self._waiting += [_Waiting(number, index, sample) for index, sample in enumerate(samples)]
        chosen = choose_row([len(each.sample) for each in self._waiting], self._seq_len)
        row = [self._waiting[index].sample for index in chosen]
        taken = set(chosen)
        self._waiting = [each for index, each in enumerate(self._waiting) if index not in taken]
        return row

    def _make_step(self) -> _Step:
        rows = [self._take_row() for _ in range(self._batch_size)]
        self._steps += 1
        share = self._batch_size // self._world
        mine = rows[self._rank * share : (self._rank + 1) * share]
        batches = [
            build_batch(
                mine[start : start + self._micro_batch_size], seq_len=self._seq_len, pad_id=self._pad_id
            )
            for start in range(0, share, self._micro_batch_size)
        ]
        if self._room:
            batches = [with_room(batch) for batch in batches]
        packed = Packed(batches, self._builders) if self._feed else None
        return _Step(batches, self._snapshot(), packed)


def build_stream(
    recipe: Recipe,
    stage_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
) -> BatchStream:
    """Build the training stream of one stage of a recipe.

    Each stage has its own shuffle, so that short stages over one dataset see different rows.

    Args:
        recipe: The recipe.
        stage_name: Name of the stage.
        tokenizer: The teacher's tokenizer.
        rank: This process.
        world: Number of processes.
        device: Where batches are to be; they have room (``with_room``) where passes on them may be captured.
    Raises:
        DataError: A dataset is missing, empty, lacks a column, or does not fit the stage's mask.
        RecipeError: ``batch_size`` cannot be shared equally by the ranks.
    """
    stage = recipe.stages[stage_name]
    if stage.batch_size % world:
        raise RecipeError(
            f"batch_size {stage.batch_size} cannot be shared equally by {world} processes",
            where=f"stages.{stage_name}.batch_size",
            hint=f"use a multiple of {world}",
        )
    config = recipe.data[stage.data]
    weights = dict(config.mix) if isinstance(config, MixtureConfig) else {stage.data: 1.0}
    seed = recipe.seed ^ zlib.crc32(stage_name.encode())
    sources = {
        name: open_source(
            source_config(recipe, name), name=name, seed=seed, skip_rows=reserved_rows(recipe, name)
        )
        for name in weights
    }
    renderers = {
        name: Renderer(
            tokenizer,
            source_config(recipe, name),
            columns=source.columns,
            mask=stage.mask,
            seq_len=stage.seq_len,
            name=name,
            num_rows=source.num_rows,
        )
        for name, source in sources.items()
    }
    notes = [
        note_first_tokens(source, tokenizer, source_config(recipe, name), mask=stage.mask, name=name)
        for name, source in sources.items()
    ]
    return BatchStream(
        Mixture(sources, weights, where=f"data.{stage.data}"),
        renderers,
        seq_len=stage.seq_len,
        batch_size=stage.batch_size,
        micro_batch_size=stage.micro_batch_size,
        pad_id=pad_id(tokenizer),
        rank=rank,
        world=world,
        prefetch=recipe.engine.prefetch,
        device=device,
        room=device is not None and recipe.engine.may_capture(device.type),
        notes=[note for note in notes if note],
    )


def heldout_batches(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask: Mask = "all",
    rows_per_batch: int = _HELDOUT_BATCH_ROWS,
) -> list[Batch]:
    """Pack the held-out rows of a recipe: at most ``heldout.seq_len`` tokens of each, none twice.

    Args:
        recipe: The recipe.
        tokenizer: The teacher's tokenizer.
        mask: Which tokens count.
        rows_per_batch: Packed rows of a batch; the last may have fewer.
    Raises:
        DataError: As ``build_stream``; also when no held-out row can be used.
    """
    heldout = recipe.heldout
    config = source_config(recipe, heldout.data)
    rows, columns = heldout_rows(config, name=heldout.data, rows=heldout.rows)
    renderer = Renderer(
        tokenizer,
        config,
        columns=columns,
        mask=mask,
        seq_len=heldout.seq_len,
        name=heldout.data,
        num_rows=len(rows),
    )
    # the first piece of every document: the cost of an evaluation must not depend on how long documents are
    samples = [pieces[0] for pieces in renderer.render(rows) if pieces]
    if not samples:
        raise renderer.unusable(
            rows="held-out rows",
            hint="where only the first rows are like that, set a larger heldout.rows; else ",
        )
    if renderer.dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in renderer.dropped.most_common())
        warn_once(f"heldout: of the {len(rows):,} rows that are reserved some are left out: {reasons}")
    return list(
        pack(samples, seq_len=heldout.seq_len, rows_per_batch=rows_per_batch, pad_id=pad_id(tokenizer))
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Choose what fills the ends of rows: the pad token, else the end-of-sequence token, else any.

    Masks never depend on it.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(index for index in ids if isinstance(index, int))


def source_config(recipe: Recipe, name: str) -> SourceConfig:
    """Return one source of a recipe, which must be no mixture."""
    config = recipe.data[name]
    assert isinstance(config, SourceConfig)
    return config


def reserved_rows(recipe: Recipe, name: str) -> int:
    """Count the first rows that a source must not train on: also under another name the held-out rows stay out."""
    heldout, config = source_config(recipe, recipe.heldout.data), source_config(recipe, name)
    same = all(
        getattr(heldout, field) == getattr(config, field) for field in ("path", "subset", "split", "revision")
    )
    return recipe.heldout.rows if same else 0

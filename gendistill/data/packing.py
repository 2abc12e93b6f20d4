"""Whole documents into rows of a fixed length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from gendistill.data.batch import IGNORE, PADDING, Batch
from gendistill.data.render import TokenizedSample
from gendistill.ops import Segments

WINDOW = 64


def choose_row(lengths: Sequence[int], seq_len: int) -> list[int]:
    """Choose the documents of one row: the oldest, then always the longest that still fits.

    Starting with the oldest keeps a document from waiting for ever.

    Args:
        lengths: Tokens of the waiting documents, oldest first; each at most ``seq_len``.
        seq_len: Tokens of a row.
    Returns:
        Indices into ``lengths``, in the order in which the documents are laid out.
    """
    room = seq_len - lengths[0]
    chosen = [0]
    for index in sorted(range(1, len(lengths)), key=lambda each: -lengths[each]):
        if not room:
            break
        if lengths[index] <= room:
            chosen.append(index)
            room -= lengths[index]
    return chosen


def build_batch(rows: Sequence[Sequence[TokenizedSample]], *, seq_len: int, pad_id: int) -> Batch:
    """Lay documents out in rows.

    Args:
        rows: Documents of each row; together at most ``seq_len`` tokens.
        seq_len: Tokens of a row.
        pad_id: Fills the end of a row. Labels never depend on it: it may be a real token.
    Returns:
        A batch of ``[len(rows), seq_len]``; the padding of a row is a segment of its own.
    """
    shape = (len(rows), seq_len)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    lengths: list[int] = []
    document_ids: list[int] = []
    num_tokens = 0
    for index, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample)
            input_ids[index, start:end] = sample.ids
            labels[index, start : end - 1] = np.where(sample.counted[1:], sample.ids[1:], IGNORE)
            position_ids[index, start:end] = np.arange(len(sample))
            lengths.append(len(sample))
            document_ids.append(document_id(sample.ids))
            start = end
        num_tokens += start
        if start < seq_len:
            position_ids[index, start:] = np.arange(seq_len - start)
            lengths.append(seq_len - start)
            document_ids.append(PADDING)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        segments=Segments(lengths),
        num_labels=int((labels != IGNORE).sum()),
        num_tokens=num_tokens,
        document_ids=tuple(document_ids),
    )


def document_id(ids: np.ndarray) -> int:
    """Name a document by its tokens: 63 bits, never ``PADDING``, the same in every run and on every machine.

    Args:
        ids: ``[T]`` token ids.
    """
    digest = hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).digest()
    return max(int.from_bytes(digest, "little") >> 1, PADDING + 1)


def pack(
    samples: Iterable[TokenizedSample], *, seq_len: int, rows_per_batch: int, pad_id: int
) -> Iterator[Batch]:
    """Pack a finite series of documents; the last batch may have fewer rows.

    Args:
        samples: Documents of at most ``seq_len`` tokens.
        seq_len: Tokens of a row.
        rows_per_batch: Rows of a batch.
        pad_id: Fills the end of a row.
    """
    waiting: list[TokenizedSample] = []
    rows: list[list[TokenizedSample]] = []
    source = iter(samples)
    ended = False
    while waiting or not ended:
        while not ended and len(waiting) < WINDOW:
            sample = next(source, None)
            ended = sample is None
            if sample is not None:
                waiting.append(sample)
        if waiting:
            rows.append(take_row(waiting, seq_len))
        if rows and (len(rows) == rows_per_batch or (ended and not waiting)):
            yield build_batch(rows, seq_len=seq_len, pad_id=pad_id)
            rows = []


def take_row(waiting: list[TokenizedSample], seq_len: int) -> list[TokenizedSample]:
    """Take the documents of one row out of those that wait."""
    chosen = choose_row([len(sample) for sample in waiting], seq_len)
    row = [waiting[index] for index in chosen]
    for index in sorted(chosen, reverse=True):
        del waiting[index]
    return row

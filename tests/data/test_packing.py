"""Packing: documents come back whole, boundaries everywhere, labels never cross them."""

import random

import numpy as np
import pytest
import torch

from gendistill.data.batch import IGNORE, PADDING, Batch
from gendistill.data.packing import build_batch, choose_row, document_id, pack
from gendistill.data.render import TokenizedSample

PAD = 2


def _documents(seed: int, count: int, longest: int) -> list[TokenizedSample]:
    """Random documents that use the pad id as an ordinary token, each with at least one label."""
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        length = rng.choice([2, 3, longest, rng.randint(2, longest)])
        counted = np.array([rng.random() < 0.5 for _ in range(length)])
        counted[rng.randrange(1, length)] = True
        ids = np.array([rng.choice([PAD, rng.randrange(50)]) for _ in range(length)])
        documents.append(TokenizedSample(ids, counted))
    return documents


def _naive(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Cut a batch at its boundaries with plain loops: ids, labels and positions of every segment."""
    flat = [batch.input_ids, batch.labels, batch.position_ids]
    ids, labels, positions = (tensor.reshape(-1).tolist() for tensor in flat)
    bounds = batch.cu_seqlens.tolist()
    return [
        (
            ids[bounds[n] : bounds[n + 1]],
            labels[bounds[n] : bounds[n + 1]],
            positions[bounds[n] : bounds[n + 1]],
        )
        for n in range(len(bounds) - 1)
    ]


def _expected_labels(document: TokenizedSample) -> list[int]:
    labels = []
    for t in range(len(document.ids)):
        is_counted = t + 1 < len(document.ids) and document.counted[t + 1]
        labels.append(int(document.ids[t + 1]) if is_counted else IGNORE)
    return labels


@pytest.mark.parametrize("seq_len", [8, 31, 100])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 7, 250])
def test_every_document_comes_back_exactly_once_with_its_labels(seq_len, rows, count):
    documents = _documents(seq_len + rows + count, count, seq_len)
    found = []
    batches = list(pack(documents, seq_len=seq_len, rows_per_batch=rows, pad_id=PAD))
    for batch in batches:
        assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        bounds = batch.cu_seqlens.tolist()
        assert bounds == sorted(set(bounds))
        assert bounds[0] == 0
        assert bounds[-1] == batch.input_ids.numel()
        assert set(range(0, bounds[-1], seq_len)) <= set(bounds)
        segments = _naive(batch)
        assert all(positions == list(range(len(ids))) for ids, _, positions in segments)
        real = [(ids, labels) for ids, labels, _ in segments if set(labels) != {IGNORE}]
        padding = [(ids, labels) for ids, labels, _ in segments if set(labels) == {IGNORE}]
        assert all(set(ids) == {PAD} for ids, _ in padding)
        assert batch.num_tokens == sum(len(ids) for ids, _ in real)
        assert batch.num_labels == sum(label != IGNORE for _, labels in real for label in labels)
        assert type(batch.num_labels) is type(batch.num_tokens) is int
        found += real
    expected = [(document.ids.tolist(), _expected_labels(document)) for document in documents]
    assert sorted(found) == sorted(expected)
    assert [len(batch.input_ids) for batch in batches[:-1]] == [rows] * (len(batches) - 1)


def test_padding_is_a_segment_of_its_own_in_every_row():
    document = TokenizedSample(np.array([5, 6, 7]), np.array([True, True, False]))
    batch = build_batch([[document], [document, document]], seq_len=8, pad_id=PAD)
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 11, 14, 16]
    assert batch.input_ids[0].tolist() == [5, 6, 7, PAD, PAD, PAD, PAD, PAD]
    assert batch.labels[1].tolist() == [6, IGNORE, IGNORE, 6, IGNORE, IGNORE, IGNORE, IGNORE]
    assert batch.position_ids[1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert (batch.num_tokens, batch.num_labels) == (9, 3)


def test_documents_are_named_by_their_tokens_wherever_they_lie():
    first = TokenizedSample(np.array([5, 6, 7]), np.array([True, True, False]))
    second = TokenizedSample(np.array([5, 6, 8]), np.ones(3, dtype=bool))
    masked = TokenizedSample(np.array([5, 6, 7], dtype=np.int32), np.zeros(3, dtype=bool))
    one = build_batch([[first], [second, first]], seq_len=8, pad_id=PAD)
    other = build_batch([[masked, second]], seq_len=6, pad_id=PAD)
    a, b = one.document_ids[0], one.document_ids[2]
    assert one.document_ids == (a, PADDING, b, a, PADDING)
    assert other.document_ids == (a, b)
    assert len({a, b, PADDING}) == 3
    # the key of what was kept: it must not change with a version of anything
    assert a == document_id(np.array([5, 6, 7])) == 4_230_528_644_636_332_576


def test_a_batch_moves_with_its_segments_and_stays_where_it_is():
    batch = build_batch([[TokenizedSample(np.arange(5), np.ones(5, dtype=bool))]], seq_len=8, pad_id=PAD)
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert moved.segments.lengths == batch.segments.lengths == [5, 3]
    assert {moved.input_ids.device.type, moved.cu_seqlens.device.type} == {"meta"}
    assert moved.document_ids == batch.document_ids


def test_full_row_has_no_padding_segment():
    document = TokenizedSample(np.arange(4), np.ones(4, dtype=bool))
    assert build_batch([[document, document]], seq_len=8, pad_id=PAD).cu_seqlens.tolist() == [0, 4, 8]


def test_row_holds_the_oldest_and_leaves_no_document_that_fits():
    rng = random.Random(0)
    for _ in range(300):
        seq_len = rng.randint(2, 60)
        lengths = [rng.randint(1, seq_len) for _ in range(rng.randint(1, 30))]
        chosen = choose_row(lengths, seq_len)
        room = seq_len - sum(lengths[index] for index in chosen)
        assert chosen[0] == 0
        assert len(set(chosen)) == len(chosen)
        assert room >= 0
        assert all(lengths[index] > room for index in set(range(len(lengths))) - set(chosen))


def test_short_documents_fill_rows_almost_fully():
    documents = [
        TokenizedSample(np.arange(length), np.ones(length, dtype=bool))
        for length in np.random.default_rng(0).integers(5, 120, size=2000)
    ]
    batches = list(pack(documents, seq_len=128, rows_per_batch=8, pad_id=PAD))
    used = sum(batch.num_tokens for batch in batches) / sum(batch.input_ids.numel() for batch in batches)
    assert used > 0.96

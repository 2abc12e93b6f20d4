"""Batches with room: shapes of few kinds, and the same documents and labels."""

from __future__ import annotations

import math

import pytest
import torch

from gendistill.bench.documents import synthetic_batch, synthetic_stream
from gendistill.data.batch import PADDING, Batch, with_room
from gendistill.data.feed import Packed
from gendistill.ops import Segments
from gendistill.training.monitors import speed
from gendistill_kernels.block.layout import Tiles as AttentionTiles
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta.layout import Chunks, InferenceChunks

SETTINGS = {"vocab_size": 257, "seq_len": 64, "mean_tokens": 20, "rows": 4, "seed": 3}
BUILDERS = (Chunks.of, InferenceChunks.of, Tiles.of, AttentionTiles.of)
TENSORS = ("input_ids", "labels", "position_ids")


def batch_of(documents: int, *, num_labels: int = 0, rows: int = 4, tokens: int = 100) -> Batch:
    """Make a batch of a number of documents, of one token each but for the last."""
    grid = torch.zeros(rows, tokens, dtype=torch.int64)
    lengths = [1] * (documents - 1) + [rows * tokens - documents + 1]
    ids = tuple(range(1, documents + 1))
    return Batch(grid, grid, grid, Segments(lengths), num_labels, rows * tokens, ids)


def test_numbers_of_documents_are_of_few_kinds():
    found = {number: len(with_room(batch_of(number)).segments.lengths) for number in range(1, 400)}
    for number, room in found.items():
        least = number + 1
        step = max(16, 2 ** (math.floor(math.log2(least)) - 1))
        assert room == math.ceil(least / step) * step
        assert number < room
    assert sorted(set(found.values())) == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512]


def test_dead_tiles_are_few():
    for documents in (1, 7, 40, 300):
        for tokens in (100, 256, 1024, 4096, 65536):
            segments = with_room(batch_of(documents, tokens=tokens)).segments
            tiles = sum(-(-length // 64) for length in segments.lengths)
            assert tiles <= segments.room < tiles + max(4, tiles / 8)
            if tiles > 128:
                assert segments.room < tiles + max(16, tiles / 32)


@pytest.mark.parametrize(("tokens", "most"), [(1024, 0.25), (2048, 0.13), (4096, 0.13), (16384, 0.07)])
def test_a_row_alone_has_few_dead_tiles_too(tokens, most):
    for documents in range(1, 9):
        segments = with_room(batch_of(documents, rows=1, tokens=tokens)).segments
        tiles = sum(-(-length // 64) for length in segments.lengths)
        assert segments.room <= tiles * (1 + most)


@pytest.mark.parametrize(
    ("num_labels", "places"), [(0, 25), (1, 25), (25, 25), (26, 50), (399, 400), (400, 400)]
)
def test_places_are_a_sixteenth_of_the_positions_or_a_multiple(num_labels, places):
    assert with_room(batch_of(3, num_labels=num_labels)).places == places


def test_places_are_at_most_the_positions():
    # a sixteenth of 51 positions is 4, and 51 is no multiple of it
    assert with_room(batch_of(3, num_labels=50, rows=1, tokens=51)).places == 51


def test_what_is_appended_is_empty_and_the_rest_stays():
    batch = synthetic_batch(**SETTINGS)
    room = with_room(batch)
    number = len(batch.segments.lengths)
    assert batch.places is None
    assert room.segments.room
    assert room.segments.lengths[:number] == batch.segments.lengths
    assert not any(room.segments.lengths[number:])
    assert room.document_ids[:number] == batch.document_ids
    assert set(room.document_ids[number:]) == {PADDING}
    assert len(room.document_ids) == len(room.segments.lengths)
    for name in TENSORS:
        assert getattr(room, name) is getattr(batch, name)
    assert speed.lengths(room) == speed.lengths(batch)
    assert with_room(room) is room


def test_a_batch_made_by_hand_names_no_documents_with_room_either():
    batch = batch_of(3)
    batch = Batch(*(getattr(batch, name) for name in TENSORS), batch.segments, 1, 400)
    room = with_room(batch)
    assert room.document_ids == ()
    assert speed.lengths(room) == batch.segments.lengths


def test_a_batch_keeps_its_room_on_the_way_to_a_device():
    batch = with_room(synthetic_batch(**SETTINGS))
    there = batch.to("meta")
    assert there.segments.room
    assert there.places == batch.places
    packed = Packed([batch], BUILDERS)
    [found] = packed.unpack(packed.buffer)
    assert found.segments.room
    assert found.places == batch.places
    assert found.segments.builders == BUILDERS
    for build in BUILDERS:
        for one, other in zip(found.segments.table(build), batch.segments.table(build), strict=True):
            assert one is other or torch.equal(one, other)


def test_a_stream_with_room_yields_the_same_documents_and_labels_in_shapes_of_few_kinds():
    settings = {**SETTINGS, "micro_batch": 2}
    plain, room = synthetic_stream(**settings), synthetic_stream(**settings, room=True)
    kinds = set()
    for _ in range(12):
        for expected, found in zip(next(plain), next(room), strict=True):
            assert not expected.segments.room
            assert found.segments.room
            for name in TENSORS:
                assert torch.equal(getattr(found, name), getattr(expected, name))
            assert (found.num_labels, found.num_tokens) == (expected.num_labels, expected.num_tokens)
            assert [length for length in found.segments.lengths if length] == expected.segments.lengths
            assert found.places >= found.num_labels
            tables = [part for build in BUILDERS for part in found.segments.table(build) if part is not None]
            shapes = tuple(part.shape for part in (found.cu_seqlens, *tables))
            kinds.add((len(found.segments.lengths), shapes))
        assert room.state_dict() == plain.state_dict()
    assert len(kinds) <= 3
    plain.close()
    room.close()


@pytest.mark.parametrize(
    ("device", "capture", "room"),
    [
        ("cuda", "auto", True),
        ("cuda", "never", False),
        ("cpu", "always", False),
        (None, "auto", False),
    ],
)
def test_streams_of_recipes_have_room_where_passes_may_be_captured(
    monkeypatch, make_tokenizer, device, capture, room
):
    from gendistill.config.load import load_recipe
    from gendistill.data import stream

    monkeypatch.setattr(stream, "Feed", lambda device: None)
    recipe = load_recipe("tiny", [f"engine.capture={capture}"])
    device = None if device is None else torch.device(device)
    found = stream.build_stream(recipe, "distill", make_tokenizer(), device=device)
    assert found._room == room
    found.close()

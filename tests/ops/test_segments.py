"""Sequences with room for others, and sequences whose lengths no host knows."""

from __future__ import annotations

import operator
import random

import numpy as np
import pytest
import torch

from gendistill.ops import Segments, causal_conv, chunk_kda, sliding_window_attention
from gendistill.ops.types import UnknownLengths
from gendistill_kernels.block.layout import Tiles as AttentionTiles
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta.layout import Chunks, InferenceChunks

BUILDERS = (Chunks.of, Tiles.of, AttentionTiles.of)


def draw(tokens: int, number: int, rng: random.Random) -> list[int]:
    """Draw lengths that add up to ``tokens``, the last of which is zero."""
    ends = sorted(rng.choices(range(tokens + 1), k=number - 2))
    return [b - a for a, b in zip([0, *ends], [*ends, tokens], strict=True)] + [0]


@pytest.mark.parametrize(("tokens", "number"), [(64, 16), (300, 16), (1024, 32), (127, 2), (1, 2)])
@pytest.mark.parametrize("build", [*BUILDERS, InferenceChunks.of])
def test_shapes_with_room_depend_on_tiles_and_sequences_alone(build, tokens, number):
    rng = random.Random(tokens)
    drawn = [draw(tokens, number, rng) for _ in range(20)]
    # as many tiles as there can be
    short = min(number - 2, tokens)
    most = tokens // 64 + number
    drawn.append([1] * short + [tokens - short] + [0] * (number - short - 1))
    shapes = set()
    for lengths in drawn:
        assert sum(lengths) == tokens
        plain, found = Segments(lengths).table(build), Segments(lengths, room=most).table(build)
        assert type(found) is type(plain)
        shapes.add(tuple(None if part is None else (part.shape, part.dtype) for part in found))
        for one, other in zip(found, plain, strict=True):
            if other is not None:
                assert torch.equal(one[: len(other)], other)
    assert len(shapes) == 1


def test_tiles_that_fill_a_table_are_of_no_token():
    segments = Segments([64, 1, 0], room=4)
    chunks, tiles, places = (segments.table(build) for build in BUILDERS)
    assert chunks.starts.tolist() == [0, 64, 0, 0]
    assert chunks.lengths.tolist() == [64, 1, 0, 0]
    assert chunks.sequences.shape == (3, 6)
    assert tiles.owners.tolist() == [0, 1, 2, 2, 2, 2, 2]
    assert tiles.firsts.tolist() == [0, 0, 0, 0, 0, 0, 0]
    assert places.places.tolist() == [[0, 0, 64], [64, 64, 65], [0, 0, 0], [0, 0, 0]]


def test_a_table_that_cannot_be_filled_is_what_was_built():
    def build(lengths: list[int], device: torch.device) -> list[int]:
        return [*lengths, -1]

    assert Segments([3, 0], room=1).table(build) == [3, 0, -1]


@pytest.mark.parametrize("lengths", [[], [0, 5]])
def test_room_without_an_empty_sequence_at_the_end_is_refused(lengths):
    with pytest.raises(ValueError, match=r"the last sequence must be empty.*append one of length 0"):
        Segments(lengths, room=3)


def test_less_room_than_needed_is_refused():
    segments = Segments([65, 1, 0], room=2)
    for build in (Chunks.of, AttentionTiles.of):
        with pytest.raises(ValueError, match="the sequences have 3 tiles, and there is room for 2"):
            segments.table(build)


def test_reference_ops_see_no_difference_between_sequences_with_room_and_without():
    torch.manual_seed(0)
    plain, room = Segments([5, 70, 0]), Segments([5, 70, 0, 0, 0], room=3)
    q, k, v = (torch.randn(1, 75, 2, 8) for _ in range(3))
    decay, beta, weight = -torch.rand(1, 75, 2, 8), torch.rand(1, 75, 2), torch.randn(8, 4)
    ops = {
        "kda": lambda segments: chunk_kda(q, k, v, decay, beta, segments=segments),
        "conv": lambda segments: causal_conv(v[:, :, 0], weight, segments=segments),
        "attention": lambda segments: (sliding_window_attention(q, k, v, segments=segments), None),
    }
    for op in ops.values():
        (out, state), (expected, other) = op(room), op(plain)
        assert torch.equal(out, expected)
        if state is not None:
            assert torch.equal(state[:3], other)
            assert not state[3:].any()


def test_whoever_asks_for_unknown_lengths_is_told():
    known = Segments([3, 4, 0, 0], room=5)
    tables = {build: known.table(build) for build in BUILDERS}
    segments = Segments.unknown(4, 7, 6, known.cu_seqlens, tables, room=5)
    assert len(segments.lengths) == 4
    assert segments.lengths
    assert (segments.num_tokens, segments.longest, segments.room) == (7, 6, 5)
    assert segments.cu_seqlens is known.cu_seqlens
    assert segments.builders == BUILDERS
    for build, table in tables.items():
        assert segments.table(build) is table
    questions = [
        lambda: segments.lengths[0],
        lambda: segments.lengths[1:],
        lambda: list(segments.lengths),
        lambda: [0, *segments.lengths],
        lambda: operator.add([0], segments.lengths),
        lambda: operator.add(segments.lengths, [0]),
        lambda: max(segments.lengths),
        lambda: sum(segments.lengths),
        lambda: 3 in segments.lengths,
        lambda: segments.lengths == [3, 4, 0, 0],
        lambda: segments.lengths.index(4),
        lambda: Segments(segments.lengths),
        lambda: np.array(segments.lengths),
        lambda: segments.table(lambda lengths, device: len(lengths)),
        lambda: segments.chunks(64),
        lambda: segments.taps(3),
    ]
    for ask in questions:
        with pytest.raises(UnknownLengths, match="lengths of documents differ from batch to batch"):
            ask()


def test_the_longest_sequence_is_known_on_the_host():
    assert Segments([3, 7, 0]).longest == 7
    assert Segments([]).longest == 0
    placed = Segments.placed([3, 7, 0], Segments([3, 7, 0]).cu_seqlens, {}, room=9)
    assert (placed.longest, placed.room) == (7, 9)

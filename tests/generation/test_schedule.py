"""How prompts are cut into passes."""

from __future__ import annotations

import random

from gendistill.generation.schedule import Piece, pieces


def test_every_token_is_read_once_and_in_order_in_full_passes():
    maker = random.Random(0)
    for most in (1, 50, 512, 1000, 8192):
        for number in (1, 2, 7, 40):
            rows = [(slot, maker.choice([1, 63, 200, 3000, 20_000])) for slot in range(number)]
            read = dict.fromkeys(range(number), 0)
            passes = pieces(rows, most)
            for part in passes:
                assert len({piece.slot for piece in part}) == len(part)
                for slot, start, count in part:
                    assert start == read[slot]
                    assert count > 0
                    read[slot] += count
            assert read == dict(rows)
            assert all(sum(piece.count for piece in part) == most for part in passes[:-1])


def test_long_prompts_are_read_side_by_side_and_a_single_one_in_whole_passes():
    assert pieces([(3, 20_000)], 8192) == [
        [Piece(3, 0, 8192)], [Piece(3, 8192, 8192)], [Piece(3, 16_384, 3616)]
    ]  # fmt: skip
    first = pieces([(slot, 16_384) for slot in range(32)], 8192)[0]
    assert first == [Piece(slot, 0, 1024) for slot in range(8)]


def test_short_prompts_are_read_whole_but_for_the_last_of_a_pass():
    first, second = pieces([(slot, 130) for slot in range(4)], 512)
    assert (
        first == [Piece(0, 0, 130), Piece(1, 0, 130), Piece(2, 0, 130), Piece(3, 0, 122)] or len(first) == 4
    )
    assert sum(piece.count for piece in first) == 512
    assert sum(piece.count for piece in second) == 8

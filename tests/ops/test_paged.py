"""Paged attention is attention: whatever the chunks and the order of pages, tokens see what they saw in training."""

import pytest
import torch

from gendistill.ops.paged import PAGE, Pages, paged_attend

LENGTHS = [150, 1, 64, 65, 7]


@pytest.mark.parametrize("chunk", [1000, 64, 37, 1])
@pytest.mark.parametrize("window", [None, 1, 20, 100])
def test_prefill_in_chunks_equals_one_pass(paged_cases, chunk, window):
    inputs = paged_cases.draw(LENGTHS)
    store = paged_cases.Keeper(inputs, LENGTHS, heads=(4, 2), window=window)
    store.prefill(chunk)
    expected = paged_cases.whole(inputs, LENGTHS, heads=(4, 2), window=window)
    torch.testing.assert_close(store.out, expected)


@pytest.mark.parametrize(("H", "KV", "norm"), [(4, 4, True), (6, 2, False), (3, 1, True)])
@pytest.mark.parametrize("window", [None, 20, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prefill_then_decode_equals_one_pass(paged_cases, H, KV, norm, window, dtype):
    inputs = paged_cases.draw(LENGTHS, H=H, KV=KV, norm=norm, dtype=dtype)
    store = paged_cases.Keeper(inputs, LENGTHS, heads=(H, KV), window=window)
    store.prefill(33, until=[100, 1, 60, 0, 5])
    store.decode(dead=2)
    expected = paged_cases.whole(inputs, LENGTHS, heads=(H, KV), window=window)
    torch.testing.assert_close(store.out, expected)


def test_rows_that_decode_share_a_call_with_rows_that_prefill(paged_cases):
    lengths = [70, 130, 40]
    inputs = paged_cases.draw(lengths)
    store = paged_cases.Keeper(inputs, lengths, heads=(4, 2))
    store.advance([0], [65])
    store.advance([2, 0, 1], [30, 1, 127])
    store.advance([1, 0], [1, 1])
    store.advance([0, 1, 2], [3, 2, 10])
    torch.testing.assert_close(store.out, paged_cases.whole(inputs, lengths, heads=(4, 2)))


@pytest.mark.parametrize("single", [True, False])
def test_only_given_cells_are_written_and_only_own_cells_are_read(paged_cases, single):
    lengths = [100, 30]
    inputs = paged_cases.draw(lengths)
    store = paged_cases.Keeper(inputs, lengths, heads=(4, 2))
    store.prefill(1000, until=[99, 29])
    before = store.keys.clone(), store.values.clone()
    cells = store.pages([0, -1, 1], [1, 1, 1], single=single).cells
    store.advance([0, -1, 1] if single else [0, 1], [1, 1, 1] if single else [1, 1], single=single)
    for old, new in zip(before, (store.keys, store.values), strict=True):
        changed = ~torch.isclose(old, new, equal_nan=True).flatten(0, 1).flatten(1).all(-1)
        assert set(changed.nonzero().flatten().tolist()) == {*(cells if single else cells[[0, 2]]).tolist()}


def test_pages_that_no_window_reaches_may_be_given_away(paged_cases):
    lengths, window = [300], 40
    inputs = paged_cases.draw(lengths)
    store = paged_cases.Keeper(inputs, lengths, heads=(4, 2), window=window)
    for number in (200, 60):
        store.advance([0], [number])
        # the next token sees itself and 39 before it
        gone = (store.done[0] - (window - 1)) // PAGE
        store.keys[store.table[0, :gone].long()] = float("nan")
        store.values[store.table[0, :gone].long()] = float("inf")
        store.table[0, :gone] = 0
    store.decode()
    torch.testing.assert_close(store.out, paged_cases.whole(inputs, lengths, heads=(4, 2), window=window))


def test_a_call_without_tokens_returns_none(paged_cases):
    inputs = paged_cases.draw([3])
    store = paged_cases.Keeper(inputs, [3], heads=(4, 2))
    assert store.call(inputs.rows(slice(0)), empty()).shape == (0, 64)


def empty():
    int32 = torch.int32
    return Pages(
        torch.zeros(0, 1, dtype=int32), torch.zeros(0, dtype=int32), torch.zeros(1, dtype=int32),
        torch.zeros(0, dtype=torch.int64), False,
    )  # fmt: skip


WRONG = {
    "heads": ({"heads": (4, 3)}, r"H a multiple of KV, got \(4, 3\)"),
    "window": ({"window": 0}, "at least 1"),
    "one weight": ({"k_weight": None}, "both or not at all"),
    "keys": ({"keys": torch.zeros(2, 32, 2, 16)}, r"\[pages, 64, 2, D\].*got \[2, 32, 2, 16\]"),
    "values": ({"values": torch.zeros(3, PAGE, 2, 16)}, r"values must be \[2, 64, 2, 16\]"),
    "qkv": ({"qkv": torch.zeros(3, 100)}, r"qkv must be \[N, 128\].*got \[3, 100\]"),
    "cos": ({"cos": torch.zeros(3, 8)}, r"cos must be \[3, 16\]"),
    "dtype": (
        {"keys": torch.zeros(2, PAGE, 2, 16, dtype=torch.float64)},
        "keys must be float32, got float64",
    ),
    "strided": ({"keys": torch.zeros(2, PAGE, 16, 2).mT}, "keys must be contiguous"),
    "table": ({"table": torch.zeros(2, 3, dtype=torch.int32)}, r"table must be \[3, P\]"),
    "starts": ({"starts": torch.zeros(3, dtype=torch.int32)}, r"starts must be \[4\]"),
    "cells": ({"cells": torch.zeros(3, dtype=torch.int32)}, "cells must be int64, got int32"),
    "single": (
        {
            "table": torch.zeros(2, 1, dtype=torch.int32),
            "lengths": torch.ones(2, dtype=torch.int32),
            "starts": torch.tensor([0, 1, 3], dtype=torch.int32),
        },
        "there are 3 for 2 sequences",
    ),
    "gradient": ({"qkv": torch.zeros(3, 128, requires_grad=True)}, "torch.no_grad"),
    "impl": ({"impl": "fastest"}, "fastest"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    changes, words = WRONG[name]
    settings = {
        "qkv": torch.zeros(3, 128),
        "q_weight": torch.zeros(16),
        "k_weight": torch.zeros(16),
        "cos": torch.zeros(3, 16),
        "sin": torch.zeros(3, 16),
        "keys": torch.zeros(2, PAGE, 2, 16),
        "values": torch.zeros(2, PAGE, 2, 16),
        "heads": (4, 2),
    }
    pages = {
        "table": torch.zeros(3, 1, dtype=torch.int32),
        "lengths": torch.ones(3, dtype=torch.int32),
        "starts": torch.arange(4, dtype=torch.int32),
        "cells": torch.arange(3),
        "single": True,
    }
    paged_attend(**settings, pages=Pages(**pages))
    for key, value in changes.items():
        (pages if key in pages else settings)[key] = value
    with pytest.raises(ValueError, match=words):
        paged_attend(**settings, pages=Pages(**pages))

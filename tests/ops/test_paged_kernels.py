"""The Triton kernels of paged attention, interpreted on the CPU, against the reference in float64."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill.ops import resolve
from gendistill.ops.paged import paged_attend
from gendistill_kernels.paged import decode
from gendistill_kernels.paged.decode import Shares
from gendistill_kernels.runtime.lookup import Config, forced

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]
# float16 rounds the output, and the weights of values
LIMITS = {torch.float32: 3e-6, torch.float16: 3e-3}
LENGTHS = [150, 1, 64, 65, 7]
# heads, channels, whether heads are normalised, window, dtype
CASES = [
    ((4, 2), 16, True, None, torch.float32),
    ((4, 2), 16, True, 100, torch.float16),
    ((3, 1), 12, False, 20, torch.float32),
    ((2, 2), 32, True, 1, torch.float32),
    ((8, 1), 20, True, 70, torch.float32),
    ((6, 2), 16, False, None, torch.float16),
]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch, cases):
    monkeypatch.setattr(cases, "DEVICE", "cpu")


def distance(x, y):
    return ((x.double() - y).norm() / (y.norm() + 1e-12)).item()


def keeper(paged_cases, lengths, heads, D, *, norm=True, window=None, dtype=torch.float32):
    """Return a keeper that runs the kernels, and what training's op finds in float64."""
    inputs = paged_cases.draw(lengths, H=heads[0], KV=heads[1], D=D, norm=norm, dtype=dtype)
    store = paged_cases.Keeper(inputs, lengths, heads=heads, window=window, impl="triton")
    exact = paged_cases.Inputs(*(None if part is None else part.double() for part in inputs))
    return store, paged_cases.whole(exact, lengths, heads=heads, window=window)


@pytest.mark.parametrize(("heads", "D", "norm", "window", "dtype"), CASES)
def test_prefill_in_chunks_matches_float64(paged_cases, heads, D, norm, window, dtype):
    store, expected = keeper(paged_cases, LENGTHS, heads, D, norm=norm, window=window, dtype=dtype)
    store.prefill(90)
    assert distance(store.out, expected) < LIMITS[dtype]


@pytest.mark.parametrize(("heads", "D", "norm", "window", "dtype"), CASES)
def test_decode_matches_float64(paged_cases, heads, D, norm, window, dtype):
    lengths = [140, 3, 65, 2]
    store, expected = keeper(paged_cases, lengths, heads, D, norm=norm, window=window, dtype=dtype)
    store.prefill(1000, until=[139, 1, 63, 0])
    store.decode(dead=1)
    assert distance(store.out, expected) < LIMITS[dtype]


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("block", [16, 64])
def test_prefill_may_take_tiles_of_any_size(paged_cases, block, warps):
    store, expected = keeper(paged_cases, [70, 5, 30], (4, 2), 16)
    with forced("paged_prefill", Config(block, warps)):
        store.prefill(80)
    assert distance(store.out, expected) < LIMITS[torch.float32]


@pytest.mark.parametrize(
    ("least", "most", "programs", "block", "window"),
    [
        (1, 64, 1000, 64, None),
        (1, 64, 1000, 16, 130),
        (2, 64, 24, 32, None),
        (2, 64, 24, 64, 200),
        # more pages than so many programs can take at two each
        (1, 2, 1, 64, None),
        (4, 64, 1, 64, None),
        (4, 64, 1, 16, 130),
    ],
)
def test_decode_may_be_shared_out_in_any_way(paged_cases, monkeypatch, window, block, least, most, programs):
    monkeypatch.setattr(decode, "_LEAST", least)
    monkeypatch.setattr(decode, "_LONG", most)
    monkeypatch.setattr(decode, "_EXTRA", 3)
    lengths = [449, 3, 258]
    store, expected = keeper(paged_cases, lengths, (4, 2), 16, window=window)
    store.impl = "reference"
    store.prefill(2000, until=[448, 2, 257])
    store.impl = "triton"
    with forced("paged_decode", Config(block, 4, programs=programs)), forced("paged_join", Config(32, 1)):
        store.decode(dead=1)
    for row, start in enumerate(store.starts):
        place = start + lengths[row] - 1
        assert distance(store.out[place], expected[place]) < LIMITS[torch.float32]
    assert distance(store.out, expected) < LIMITS[torch.float32]


def test_shares_keep_the_gpu_busy_and_are_no_more_than_that():
    # one long sequence takes all programs, pages permitting
    assert Shares.of(1, 8, 2048, 528) == (66, 66)
    assert Shares.of(1, 8, 64, 528) == (32, 66)
    assert Shares.of(1, 1, 2048, 528) == (256, 528)
    # many short ones need no second launch; a long one among them is cut
    assert Shares.of(256, 8, 16, 528) == (1, 1)
    assert Shares.of(256, 8, 512, 528) == (8, 1)


@pytest.mark.parametrize("single", [True, False])
def test_pages_hold_what_the_reference_puts_there(paged_cases, single):
    found = []
    for impl in ("reference", "triton"):
        inputs = paged_cases.draw([100, 30], dtype=torch.float32)
        store = paged_cases.Keeper(inputs, [100, 30], heads=(4, 2), impl=impl)
        store.prefill(1000, until=[99, 29])
        store.advance([0, 1], [1, 1], single=single)
        found.append((store.keys, store.values))
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs.isnan(), ours.isnan())
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_pages_that_no_window_reaches_may_be_given_away(paged_cases):
    window = 40
    store, expected = keeper(paged_cases, [262], (4, 2), 16, window=window)
    for number in (200, 60):
        store.advance([0], [number])
        gone = (store.done[0] - (window - 1)) // 64
        store.table[0, :gone] = 0
    store.decode()
    assert distance(store.out, expected) < LIMITS[torch.float32]


def test_what_no_kernel_takes_is_refused(paged_cases):
    assert resolve("auto", op="paged", device=torch.device("cpu")) == "reference"
    assert resolve("triton", op="paged", device=torch.device("cpu")) == "triton"
    inputs = paged_cases.draw([3])
    store = paged_cases.Keeper(inputs, [3], heads=(4, 2), impl="triton")
    with pytest.raises(ValueError, match=r'got float64 and 16; use impl="reference"'):
        store.advance([0], [3])


def test_a_call_without_tokens_returns_none(paged_cases):
    inputs = paged_cases.draw([3], dtype=torch.float32)
    store = paged_cases.Keeper(inputs, [3], heads=(4, 2), impl="triton")
    pages = store.pages([0], [0])
    out = paged_attend(
        *inputs.rows(slice(0)), store.keys, store.values, heads=(4, 2), pages=pages, impl="triton"
    )
    assert out.shape == (0, 64)

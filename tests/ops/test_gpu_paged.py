"""Paged attention on a GPU: real sizes against float64, CUDA graphs, bits, and no waiting for the device.

``pytest -s`` prints the errors that were measured.
"""

from __future__ import annotations

import pytest
import torch

from gendistill.ops.paged import PAGE, Pages, paged_attend

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

from gendistill_kernels.paged.decode import Shares
from gendistill_kernels.paged.rows import TABLE
from gendistill_kernels.runtime.lookup import Config, forced

pytestmark = pytest.mark.gpu
# heads, channels, window
SHAPES = [
    ((16, 8), 128, None),
    ((14, 2), 64, None),
    ((8, 4), 256, None),
    ((9, 3), 64, 200),
    ((16, 8), 128, 1000),
]
# of the reference's error in the same dtype, which rounds the same tensors
MORE = 1.5
# of float32, whose products are exact here and in the reference
FLOAT32 = 4e-6


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def run(paged_cases, impl, lengths, heads, D, window, dtype):
    """Prefill in chunks, take the last tokens in single steps, and return error and what was found."""
    inputs = paged_cases.draw(lengths, H=heads[0], KV=heads[1], D=D, dtype=dtype, device="cuda")
    exact = paged_cases.Inputs(*(part.double() for part in inputs))
    expected = paged_cases.whole(exact, lengths, heads=heads, window=window)
    store = paged_cases.Keeper(inputs, lengths, heads=heads, window=window, impl=impl)
    store.prefill(700, until=[max(0, length - 3) for length in lengths])
    store.decode(dead=2)
    return error(store.out, expected), store.out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "D", "window"), SHAPES)
def test_prefill_and_decode_match_float64(paged_cases, heads, D, window, dtype):
    lengths = [1500, 1, 64, 777, 200, 0, 5]
    off, out = run(paged_cases, "triton", lengths, heads, D, window, dtype)
    usual, _ = run(paged_cases, "reference", lengths, heads, D, window, dtype)
    print(f"\n{heads} {D} {window} {dtype}: {off:.1e}, reference {usual:.1e}")
    assert off < max(MORE * usual, FLOAT32)
    _, again = run(paged_cases, "triton", lengths, heads, D, window, dtype)
    assert torch.equal(out, again)


class Rows:
    """Rows that decode, all their tensors fixed: what a CUDA graph replays.

    Args:
        lengths: Of the sequences before the first step; 0 for none.
        more: Tokens that they may grow by.
    """

    def __init__(self, lengths, *, more=8, heads=(16, 8), D=128, dtype=torch.bfloat16, window=None):
        torch.manual_seed(0)
        self.heads, self.window, number = heads, window, len(lengths)
        width = -(-(max(lengths) + more) // PAGE)
        self.table = (1 + torch.randperm(number * width, device="cuda")).view(number, width).int()
        self.memory = torch.randn(2, 1 + number * width, PAGE, heads[1], D, device="cuda").to(dtype)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.live = self.lengths > 0
        self.starts = torch.arange(number + 1, dtype=torch.int32, device="cuda")
        self.cells = torch.zeros(number, dtype=torch.int64, device="cuda")
        self.qkv = torch.zeros(number, (heads[0] + 2 * heads[1]) * D, dtype=dtype, device="cuda")
        self.gains = torch.rand(2, D, device="cuda") + 0.5
        self.angles = torch.zeros(2, number, D, device="cuda")

    def advance(self, step):
        """Grow all sequences by a token."""
        generator = torch.Generator("cuda").manual_seed(step)
        self.lengths += self.live
        last = (self.lengths - 1).clamp(min=0).long()
        page = self.table.long().gather(1, (last // PAGE)[:, None])[:, 0]
        self.cells.copy_(torch.where(self.live, page * PAGE + last % PAGE, 0))
        self.qkv.copy_(torch.randn(self.qkv.shape, generator=generator, device="cuda"))
        angle = torch.rand(self.angles.shape[1:], generator=generator, device="cuda")
        self.angles.copy_(torch.stack([angle.cos(), angle.sin()]))

    def attend(self, impl="triton", memory=None):
        pages = Pages(self.table, self.lengths, self.starts, self.cells, True)
        memory = self.memory if memory is None else memory
        return paged_attend(
            self.qkv, *self.gains, *self.angles, *memory, heads=self.heads, window=self.window, pages=pages, impl=impl
        )  # fmt: skip


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("lengths", [[5000, 0, 62, 1, 1023], [9000], [100] * 40])
def test_a_graph_follows_sequences_that_grow(lengths, window):
    rows = Rows(lengths, window=window)
    rows.advance(0)
    rows.attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rows.attend()
    for step in range(1, 5):
        rows.advance(step)
        memory = rows.memory.clone()
        graph.replay()
        assert torch.equal(out, rows.attend(memory=memory))
        # the bin holds whatever row without a sequence came last
        assert torch.equal(rows.memory[:, 1:], memory[:, 1:])
        expected = rows.attend("reference", memory.clone())
        assert error(out, expected.double()) < 1e-2
        assert not out[~rows.live].any()


def test_a_call_waits_for_nothing():
    rows = Rows([5000, 0, 62])
    rows.advance(0)
    pages = Pages(rows.table, rows.lengths, rows.starts, rows.cells, False)
    more = {"heads": rows.heads, "pages": pages, "impl": "triton"}
    for turn in range(2):
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            rows.attend()
            paged_attend(rows.qkv, *rows.gains, *rows.angles, *rows.memory, **more)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_of_more_than_4_gib_is_reached():
    rows = Rows([300, 70], dtype=torch.bfloat16)
    rows.advance(0)
    few = rows.attend()
    pages = 1 + (1 << 32) // (PAGE * 8 * 128 * 2)
    large = torch.empty(2, pages, PAGE, 8, 128, dtype=torch.bfloat16, device="cuda")
    moved = pages - rows.memory.shape[1]
    large[:, moved:] = rows.memory
    rows.table += moved
    rows.cells += moved * PAGE
    assert torch.equal(rows.attend(memory=large), few)
    assert torch.equal(large[:, moved + 1 :], rows.memory[:, 1:])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_very_long_sequence_is_shared_out(rows):
    """As many programs as there are at 128K; the reference gathers what it needs."""
    found = Rows([131_000] * rows)
    found.advance(0)
    config = TABLE.lookup(found.qkv.device, "paged_decode", 2)
    assert Shares.of(rows, 8, found.table.shape[1], config.programs).number > 16
    out, expected = found.attend(), found.attend("reference")
    assert error(out, expected.double()) < 1e-2


@pytest.mark.parametrize("programs", [1, 100, 100_000])
@pytest.mark.parametrize(("block", "stages"), [(64, 3), (32, 2), (16, 4)])
def test_any_share_gives_the_same_to_rounding(block, stages, programs):
    rows = Rows([3000, 0, 62, 1, 1023])
    rows.advance(0)
    expected = rows.attend()
    with forced("paged_decode", Config(block, 4, stages=stages, programs=programs)):
        assert error(rows.attend(), expected.double()) < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_that_decodes_is_a_prefill_of_one_token(dtype):
    rows = Rows([3000, 62, 1, 1023], dtype=dtype)
    rows.advance(0)
    pages = Pages(rows.table, rows.lengths, rows.starts, rows.cells, False)
    found = paged_attend(
        rows.qkv, *rows.gains, *rows.angles, *rows.memory, heads=rows.heads, pages=pages, impl="triton"
    )
    assert error(rows.attend(), found.double()) < (4e-3 if dtype == torch.bfloat16 else FLOAT32)

"""The Triton kernels of a decoder layer, interpreted on the CPU, against float64 autograd of the reference."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill.ops import Segments, sliding_window_attention
from gendistill.ops.reference import block as reference
from gendistill_kernels.block import attention
from gendistill_kernels.block.attention import attend_backward, attend_forward
from gendistill_kernels.block.glu import swiglu_backward, swiglu_forward
from gendistill_kernels.block.layout import Tiles
from gendistill_kernels.block.norm import rms_norm_backward, rms_norm_forward
from gendistill_kernels.block.rope import rotate_backward, rotate_forward
from gendistill_kernels.runtime.lookup import Config, forced

pytestmark = pytest.mark.interpret
LIMIT = 3e-6
EPS = 1e-6


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fill new tensors with NaN, so that nothing is right that was not written."""
    empty, like = torch.empty, torch.empty_like

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    def poisoned_like(*args, **kwargs):
        return like(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", poisoned_like)


def distance(x, y):
    return ((x.double() - y).norm() / (y.norm() + 1e-12)).item()


def exact(*parts):
    return [None if part is None else part.detach().double().requires_grad_() for part in parts]


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(7, 20), (1, 128), (65, 33), (3, 576)])
def test_norm_and_its_gradients_match_float64(rows, width, added):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, width), torch.rand(width) + 0.5
    more = torch.randn(rows, width) if added else None
    total, y, rstd = rms_norm_forward(x, more, weight, eps=EPS, dtype=torch.float32)
    grad_total, grad_y = torch.randn_like(x), torch.randn_like(x)
    found = rms_norm_backward(
        grad_y, grad_total, total, weight, rstd, added=torch.float32 if added else None, want_weight=True
    )
    x64, weight64, more64 = exact(x, weight, more)
    total64, y64 = reference.rms_norm(x64, weight64, more64, eps=EPS, dtype=torch.float64)
    assert distance(y, y64.detach()) < LIMIT
    assert distance(total, total64.detach()) < LIMIT
    ((total64 * grad_total.double()).sum() + (y64 * grad_y.double()).sum()).backward()
    assert distance(found[0], x64.grad) < LIMIT
    assert distance(found[2], weight64.grad) < LIMIT
    assert (found[1] is None) == (not added)
    if added:
        assert distance(found[1], more64.grad) < LIMIT


def test_norm_programs_may_take_several_tiles_and_what_is_not_wanted_is_not_computed():
    x, weight = torch.randn(50, 16), torch.rand(16)
    total, y, rstd = rms_norm_forward(x, None, weight, eps=EPS, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert total is x
    one = rms_norm_backward(y, None, total, weight, rstd, added=torch.bfloat16, want_weight=True)
    with forced("block_norm_backward", Config(32, 1, programs=3)):
        other = rms_norm_backward(y, None, total, weight, rstd, added=torch.bfloat16, want_weight=True)
    assert one[1].dtype == torch.bfloat16
    assert distance(other[0], one[0].double()) < LIMIT
    # the interpreter cuts bfloat16 off instead of rounding it
    assert distance(one[1], one[0].double()) < 8e-3
    assert distance(one[2], other[2].double()) < LIMIT
    assert rms_norm_backward(y, None, total, weight, rstd, added=None, want_weight=False)[1:] == (None, None)


@pytest.mark.parametrize("width", [1, 20, 130])
def test_swiglu_and_its_gradient_match_float64(width):
    both, grad = torch.randn(5, 2 * width), torch.randn(5, width)
    out = swiglu_forward(both)
    (both64,) = exact(both)
    out64 = reference.swiglu(both64)
    assert distance(out, out64.detach()) < LIMIT
    (out64 * grad.double()).sum().backward()
    kept = grad.clone()
    found, hidden = swiglu_backward(kept, both, want_hidden=True)
    assert distance(found, both64.grad) < LIMIT
    assert hidden is kept
    assert distance(hidden, out64.detach()) < LIMIT
    kept = grad.clone()
    found, hidden = swiglu_backward(kept, both, want_hidden=False)
    assert hidden is None
    assert torch.equal(kept, grad)
    assert distance(found, both64.grad) < LIMIT


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("rows", "heads", "channels"), [(7, (4, 2), 16), (65, (2, 2), 12), (1, (3, 1), 64)])
def test_turned_heads_and_their_gradients_match_float64(rows, heads, channels, norm):
    torch.manual_seed(rows)
    number = heads[0] + 2 * heads[1]
    qkv = torch.randn(rows, number * channels)
    weights = [torch.rand(channels) + 0.5 if norm else None for _ in range(2)]
    angles = torch.rand(rows, channels // 2).repeat(1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "eps": EPS}
    q, k = rotate_forward(qkv, *weights, cos, sin, **sizes)
    qkv64, *weights64 = exact(qkv, *weights)
    parts = qkv64.unflatten(-1, (number, -1)).split([heads[0], heads[1], heads[1]], dim=1)
    turned = [
        reference.turn(part, weight, cos.double(), sin.double(), eps=EPS)
        for part, weight in zip(parts, weights64, strict=False)
    ]
    for found, expected in zip((q, k), turned, strict=True):
        assert distance(found, expected.detach()) < LIMIT
    grads = [torch.randn_like(part).float() for part in (*turned, parts[2])]
    sum(
        (part * grad.double()).sum() for part, grad in zip((*turned, parts[2]), grads, strict=True)
    ).backward()
    for programs in (2, 1000):
        with forced("block_rope_backward", Config(64, 1, programs=programs)):
            found = rotate_backward(*grads, qkv, *weights, cos, sin, eps=EPS, want_weights=norm)
        assert distance(found[0], qkv64.grad) < LIMIT
        for one, weight in zip(found[1:], weights64, strict=True):
            assert (one is None) == (weight is None)
            if weight is not None:
                assert distance(one, weight.grad) < LIMIT


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "channels"), [((4, 2), 16), ((3, 3), 20)])
def test_attention_to_packed_documents_matches_float64(heads, channels, window):
    torch.manual_seed(0)
    lengths = [300, 1, 0, 77]
    tokens, (H, KV) = sum(lengths), heads
    q, k = torch.randn(tokens, H, channels), torch.randn(tokens, KV, channels)
    v = torch.randn(tokens, KV + 2, channels)[:, 2:]
    tiles = Tiles.of(lengths, "cpu")
    out, lse = attend_forward(q, k, v, tiles, window=window)
    q64, k64, v64 = (part.double()[None].requires_grad_() for part in (q, k, v))
    segments = Segments(lengths)
    expected = sliding_window_attention(q64, k64, v64, window=window, segments=segments)[0]
    assert distance(out, expected.detach()) < LIMIT
    grad = torch.randn_like(out)
    grads = attend_backward(grad, q, k, v, out, lse, tiles, window=window)
    (expected * grad.double()).sum().backward()
    for found, exact in zip(grads, (q64, k64, v64), strict=True):
        assert distance(found, exact.grad[0]) < 3 * LIMIT
    # attention to ones, unnormalised, is the sum whose logarithm is kept
    scores = torch.einsum("nhd,mhd->hnm", q64[0], k64[0].repeat_interleave(H // KV, 1)) * channels**-0.5
    place = torch.arange(tokens)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (place[:, None] >= place) & (document[:, None] == document)
    if window is not None:
        seen &= place[:, None] - place < window
    assert distance(lse, scores.detach().masked_fill(~seen, float("-inf")).logsumexp(-1)) < LIMIT


def test_tiles_cover_every_query_once_and_long_ones_come_first():
    tiles = Tiles.of([150, 0, 5, 64], "cpu").places.tolist()
    assert sorted(tiles) == [[0, 0, 150], [64, 0, 150], [128, 0, 150], [150, 150, 155], [155, 155, 219]]
    assert tiles[0] == [128, 0, 150]
    assert Tiles.of([], "cpu").places.shape == (0, 3)


def test_more_tiles_than_a_grid_has_rows_are_launched(monkeypatch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(attention, "_forward", Recorded())
    tiles = Tiles.of([1] * 70_000, "cpu")
    q, k, v = torch.ones(70_000, 2, 16), torch.ones(70_000, 1, 16), torch.ones(70_000, 1, 16)
    attend_forward(q, k, v, tiles, window=None)
    # all but the first size of a grid are 65,535 at most
    assert all(size <= 65_535 for grid in grids for size in grid[1:])
    assert grids == [(140_000,)]

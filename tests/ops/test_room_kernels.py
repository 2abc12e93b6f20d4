"""Kernels with dead tiles, interpreted on the CPU: bits of every result are those without.

But for the gradients of a convolution's taps and bias: they are added up in shares of its tiles.
"""

from __future__ import annotations

import os

import pytest
import torch

from gendistill.ops import Segments, causal_conv, chunk_kda

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill.ops.block import attend
from gendistill_kernels.block.attention import attend_backward, attend_forward
from gendistill_kernels.block.layout import Tiles as AttentionTiles
from gendistill_kernels.conv.causal import conv_backward, conv_forward
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta.chunk import chunk_forward
from gendistill_kernels.delta.layout import Chunks
from gendistill_kernels.delta.rule import Rule

# all new memory is NaN: what no program writes must not be in any sum
pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]
DOCUMENTS = [1, 50, 0, 66, 23]
LENGTHS = [*DOCUMENTS, 0, 0]
TOKENS = sum(LENGTHS)
ROOM = 9


def assert_same(found, expected):
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None), number
        if one is not None:
            assert torch.isfinite(other).all(), number
            assert torch.equal(one, other), number


# decay per channel or head; rule; heads of q, k and v; every other case starts from a state
RULES = {
    "KDA, grouped heads, decay out of range": ("channel", Rule("none", sigmoid=False), (2, 2, 1)),
    "KDA, softplus": ("channel", Rule("softplus"), (2, 2, 2)),
    "GDN, grouped heads": ("scalar", Rule("softplus"), (1, 1, 2)),
    "strengths per channel": ("channel", Rule("bounded", erase="channel", write="channel"), (2, 2, 2)),
    "erase per head, write per channel": ("channel", Rule("softplus", write="channel"), (2, 2, 2)),
    "no erase, not normalised": ("scalar", Rule("bounded", erase="none", norm=False), (2, 2, 2)),
}


@pytest.mark.parametrize("name", RULES)
def test_dead_chunks_change_no_bit_of_the_delta_rule(cases, monkeypatch, name):
    per, rule, heads = RULES[name]
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    x = cases.draw(rule, 1, TOKENS, K=16, heads=heads, decay_per=per, dtype=torch.float32)
    if rule.gate == "none":
        # out of range as a chunk, and as a block of 16 tokens
        decay = x.decay.clone()
        decay[:, 5:60] = -4.0
        decay[:, 80:82, 1] = -300.0
        x = x._replace(decay=decay)
    plain = Chunks.of(LENGTHS, "cpu")
    filled = plain.filled(ROOM, len(LENGTHS))
    assert len(plain.starts) < len(filled.starts) == ROOM
    state = torch.randn(len(LENGTHS), 2, 16, 16) if [*RULES].index(name) % 2 else None
    grads = cases.upstream(x, len(LENGTHS))
    found, expected = (cases.run(x, rule, state, grads, chunks) for chunks in (filled, plain))
    assert found.keys() == expected.keys()
    assert_same([*found.values()], [*expected.values()])
    saved = cases.saved_tensors(x, rule, chunk_forward(x, rule, chunks=filled, save=True)[2], filled)
    # else the test would prove nothing
    assert saved["h"][len(plain.starts) :].isnan().all()
    assert saved["h"][: len(plain.starts)].isfinite().all()
    if rule.gate == "none":
        assert saved["marks"].unique().tolist() == [0, 1, 2]


def test_dead_chunks_and_sequences_that_are_scanned_in_spans_get_on(cases, monkeypatch):
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 1)
    rule = Rule("softplus")
    x = cases.draw(rule, 1, TOKENS, H=1, K=16, dtype=torch.float32)
    plain = Chunks.of(LENGTHS, "cpu")
    assert plain.spans is not None
    grads = cases.upstream(x, len(LENGTHS))
    found, expected = (
        cases.run(x, rule, None, grads, chunks) for chunks in (plain.filled(ROOM, len(LENGTHS)), plain)
    )
    assert_same([*found.values()], [*expected.values()])


def test_dead_tiles_change_no_bit_of_the_convolution():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, TOKENS, 5), torch.randn(5, 4), torch.randn(5)
    state = torch.randn(len(LENGTHS), 5, 3)
    d_out, d_last = torch.randn_like(x), torch.randn(len(LENGTHS), 5, 3)
    plain = Tiles.of(LENGTHS, "cpu")
    filled = plain.filled(ROOM, len(LENGTHS))
    assert len(plain.owners) < len(filled.owners) == ROOM + len(LENGTHS)
    results, summed = [], []
    for tiles in (filled, plain):
        shared = {"activation": "silu", "state": state, "tiles": tiles}
        out, last = conv_forward(x, weight, bias, **shared)
        grads = conv_backward(d_out, d_last, x, weight, bias, **shared)
        results.append([out, last, grads.x, grads.state])
        summed.append([grads.weight, grads.bias])
    assert_same(*results)
    torch.testing.assert_close(*summed)


@pytest.mark.parametrize("window", [None, 20])
def test_dead_tiles_change_no_bit_of_attention(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(TOKENS, 4, 16), torch.randn(TOKENS, 2, 16), torch.randn(TOKENS, 2, 16)
    grad = torch.randn_like(q)
    plain = AttentionTiles.of(LENGTHS, "cpu")
    filled = plain.filled(ROOM, len(LENGTHS))
    assert len(plain.places) < len(filled.places) == ROOM
    results = []
    for tiles in (filled, plain):
        out, lse = attend_forward(q, k, v, tiles, window=window)
        results.append([out, lse, *attend_backward(grad, q, k, v, out, lse, tiles, window=window)])
    assert_same(*results)


def check(op, inputs):
    """Compare an op on the documents with it on them and empty ones with room, and on these unknown to the host."""
    room = Segments(LENGTHS, room=ROOM)
    results = []
    for segments in (Segments(DOCUMENTS), room, None):
        if segments is None:
            tables = {build: room.table(build) for build in room.builders}
            segments = Segments.unknown(len(LENGTHS), TOKENS, TOKENS, room.cu_seqlens, tables, room=ROOM)
        leaves = [part.detach().clone().requires_grad_() for part in inputs]
        out = op(*leaves, segments)
        torch.manual_seed(1)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))])
    plain, *others = results
    for other in others:
        assert_same(other, plain)


def test_ops_see_no_difference_between_documents_with_room_and_without():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, TOKENS, 1, 16), torch.randn(1, TOKENS, 1, 16), torch.randn(1, TOKENS, 2, 16)
    beta = torch.rand(1, TOKENS, 2)

    def kda(q, k, v, decay, beta, segments):
        return chunk_kda(q, k, v, decay, beta, segments=segments, impl="triton").out

    weight = torch.randn(5, 4)

    def conv(x, segments):
        return causal_conv(x, weight, activation="silu", segments=segments, impl="triton").out

    angles = torch.rand(TOKENS, 8).repeat(1, 2) * 6

    def attention(qkv, segments):
        positions = angles.cos(), angles.sin()
        return attend(qkv, None, None, *positions, heads=(2, 1), segments=segments, impl="triton")

    check(kda, [q, k, v, -3 * torch.rand(1, TOKENS, 2, 16), beta])
    check(conv, [torch.randn(1, TOKENS, 5)])
    check(attention, [torch.randn(TOKENS, 4 * 16)])

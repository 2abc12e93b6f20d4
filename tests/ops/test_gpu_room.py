"""Compiled kernels with dead tiles: bits of every result are those without, with NaN in all new memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from gendistill_kernels.block.attention import attend_backward, attend_forward
from gendistill_kernels.block.layout import Tiles as AttentionTiles
from gendistill_kernels.conv.causal import conv_backward, conv_forward
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta.layout import Chunks
from gendistill_kernels.delta.rule import Rule

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
DEVICE = "cuda"
LENGTHS = [1, 500, 0, 64, 129, 7, 300, *[0] * 9]
TOKENS = sum(LENGTHS)
RULES = {
    "KDA": ("channel", Rule("softplus")),
    "KDA, given decay": ("channel", Rule("none", sigmoid=False)),
    "KDA, bounded": ("channel", Rule("bounded")),
    "GDN": ("scalar", Rule("softplus")),
    "GDN-2": ("channel", Rule("bounded", erase="channel", write="channel")),
    "no erase": ("scalar", Rule("softplus", erase="none")),
}


def assert_same(found, expected):
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one is not None:
            assert torch.isfinite(other).all(), number
            assert torch.equal(one, other), number


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("name", RULES)
def test_dead_chunks_change_no_bit_of_the_delta_rule(cases, name, channels):
    per, rule = RULES[name]
    x = cases.draw(rule, 1, TOKENS, 4, channels, heads=(2, 2, 2), decay_per=per)
    if rule.gate == "none":
        decay = x.decay.clone()
        decay[:, 20:200] = -4.0
        decay[:, 600:602, 1] = -300.0
        x = x._replace(decay=decay)
    plain = Chunks.of(LENGTHS, DEVICE)
    grads = cases.upstream(x, len(LENGTHS))
    found, expected = (
        cases.run(x, rule, None, grads, chunks) for chunks in (plain.filled(32, len(LENGTHS)), plain)
    )
    assert_same(found.values(), expected.values())


def test_dead_tiles_change_no_bit_of_convolution_and_attention(cases):
    torch.manual_seed(0)
    x, d_out = (cases.normal(1, TOKENS, 300, dtype=torch.bfloat16) for _ in range(2))
    weight, d_last = cases.normal(300, 4), cases.normal(len(LENGTHS), 300, 3)
    plain, results, weights = Tiles.of(LENGTHS, DEVICE), [], []
    for tiles in (plain.filled(32, len(LENGTHS)), plain):
        grads = conv_backward(d_out, d_last, x, weight, activation="silu", tiles=tiles)
        results.append([*conv_forward(x, weight, activation="silu", tiles=tiles), grads.x])
        weights.append(grads.weight)
    assert_same(*results)
    # added up in shares of the tiles
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-3)
    q, k, v = (cases.normal(TOKENS, heads, 128, dtype=torch.bfloat16) for heads in (4, 2, 2))
    plain, results = AttentionTiles.of(LENGTHS, DEVICE), []
    for tiles in (plain.filled(32, len(LENGTHS)), plain):
        out, lse = attend_forward(q, k, v, tiles, window=None)
        results.append([out, lse, *attend_backward(q, q, k, v, out, lse, tiles, window=None)])
    assert_same(*results)

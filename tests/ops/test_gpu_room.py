"""Compiled kernels with dead tiles: bits of every result are those without, with NaN in all new memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from gendistill.ops import Segments, chunk_kda
from gendistill_kernels.block.attention import attend_backward, attend_forward
from gendistill_kernels.block.layout import Tiles as AttentionTiles
from gendistill_kernels.conv.causal import conv_backward, conv_forward
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta.chunk import chunk_forward
from gendistill_kernels.delta.layout import CHUNK, Chunks, InferenceChunks
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


# what prompts of a pass may be: heads of q, of k and v, and channels
SHAPES = {"16 heads of 128": (16, 8, 128), "14 heads of 64": (14, 2, 64)}


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_spans_without_gradients_match_float64_alone_and_with_room(cases, name, has_state):
    H, KV, D = SHAPES[name]
    rule, lengths = Rule("softplus"), [2500, 0, 1, 2304, 0, 0]
    x = cases.draw(rule, 1, sum(lengths), H, D, heads=(H, KV, KV))
    state = cases.normal(len(lengths), H, D, D) if has_state else None
    room = sum(lengths) // CHUNK + len(lengths)
    plain, filled = (
        Segments(lengths, device=DEVICE, room=tiles).table(InferenceChunks.of) for tiles in (0, room)
    )
    assert len(filled.spans) > len(plain.spans) == len(lengths) + 3
    found, other = (chunk_forward(x, rule, state=state, chunks=chunks)[:2] for chunks in (filled, plain))
    assert_same(found, other)
    wide = (part if part is None else part.double() for part in x)
    expected = cases.exact_packed(type(x)(*wide), rule, None if state is None else state.double(), lengths)
    for one, answer in zip(found, expected, strict=True):
        assert cases.error(one, answer) < 6e-3
    # bits of what is beside others are those of what is alone
    alone = x._replace(
        **{part: getattr(x, part)[:, :2500].contiguous() for part in ("q", "k", "v", "decay", "beta")}
    )
    own = None if state is None else state[:1]
    for chunks in (InferenceChunks.of([2500], DEVICE), None):
        out, last, _ = chunk_forward(alone, rule, state=own, chunks=chunks)
        assert_same([found[0][:, :2500], found[1][:1]], [out, last])


@pytest.mark.parametrize("name", SHAPES)
def test_a_graph_of_a_pass_fits_prompts_of_other_lengths(cases, name):
    H, KV, D = SHAPES[name]
    tokens, number = 4608, 8
    x = cases.draw(Rule("softplus"), 1, tokens, H, D, heads=(H, KV, KV))
    state = cases.normal(number, H, D, D)

    def call(segments):
        gates = {"gate": "softplus", "a_log": x.A_log, "dt_bias": x.dt_bias}
        return chunk_kda(
            x.q, x.k, x.v, x.decay, x.beta, **gates, state=state, segments=segments, impl="triton"
        )

    def with_room(lengths):
        lengths = [*lengths, tokens - sum(lengths), *[0] * (number - len(lengths) - 1)]
        made = Segments(lengths, device=DEVICE, room=tokens // CHUNK + number)
        made.table(InferenceChunks.of)
        return made

    static = with_room([4608]).static()
    call(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(static)
    for lengths in ([4608], [2304, 2304], [2305, 1, 0], [100] * 5, [1, 4000]):
        given = with_room(lengths)
        torch._foreach_copy_(static.tensors, given.tensors)
        for part in found:
            part.fill_(float("nan"))
        graph.replay()
        expected = call(Segments(given.lengths, device=DEVICE))
        assert_same(found, expected)

"""Attention to the last and the first tokens: against a loop over queries, and with a state of fixed size."""

from __future__ import annotations

import math

import pytest
import torch

from gendistill.anatomy.family import geometry_of
from gendistill.anatomy.sink import SINK, SinkSettings
from gendistill.mixers import SequenceInfo, SinkAttention, SinkState
from gendistill.mixers.base import rotate
from gendistill.testing import tiny_student, tiny_teacher

SHAPES = [(5, 2), (1, 3), (4, 0), (1, 0), (3, 9), (64, 4)]
LONG = 23


def layer_of(window, sinks, **settings):
    torch.manual_seed(0)
    layer = SinkAttention(24, 4, 2, 8, window=window, sinks=sinks, qkv_bias=True, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(8)
    return layer


def angles(length, start=0):
    angle = torch.arange(start, start + length)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
    return angle.cos()[None].double(), angle.sin()[None].double()


def oracle(layer, x, positions):
    """Attend query by query and head by head; ``x`` ``[T, hidden]`` is one sequence."""
    cos, sin = positions
    q, k, v = (proj(x).unflatten(-1, (-1, 8))[None] for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rotate(q, cos, sin)[0], rotate(k, cos, sin)[0]
    rows = []
    for t in range(len(x)):
        sees = sorted({*range(min(layer.sinks, t + 1)), *range(max(0, t - layer.window + 1), t + 1)})
        heads = []
        for head in range(4):
            scores = k[sees, head // 2] @ q[t, head] / math.sqrt(8)
            heads.append(scores.softmax(0) @ v[0, sees, head // 2])
        rows.append(torch.cat(heads))
    return layer.o_proj(torch.stack(rows)) if rows else x.new_zeros(0, 24)


@pytest.fixture(params=[512, 7], ids=["one block", "blocks of 7"])
def block(request, monkeypatch):
    """Cut queries into blocks, as long rows are."""
    monkeypatch.setattr("gendistill.mixers.sink.BLOCK", request.param)
    from gendistill.mixers.sink import _blocks

    _blocks.cache_clear()


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("window", "sinks"), SHAPES)
def test_every_query_sees_the_last_and_the_first_tokens(window, sinks):
    layer = layer_of(window, sinks)
    x, positions = torch.randn(2, LONG, 24, dtype=torch.float64), angles(LONG)
    x.requires_grad_()
    expected = torch.stack([oracle(layer, row, positions) for row in x])
    found = layer(x, position_embeddings=positions)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(found)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *layer.parameters()])
    grads = torch.autograd.grad((found * weights).sum(), [x, *layer.parameters()])
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("window", "sinks"), SHAPES)
@torch.no_grad()
def test_padding_and_packing_change_nothing(window, sinks):
    layer, lengths, width = layer_of(window, sinks), [5, 0, 19, 1], 19
    x = torch.randn(4, width, 24, dtype=torch.float64)
    for side in ("left", "right"):
        mask = torch.zeros(4, width)
        for row, length in enumerate(lengths):
            mask[row, slice(width - length, width) if side == "left" else slice(0, length)] = 1
        positions = angles(width)
        out, state = layer(x, sequences=SequenceInfo.from_mask(mask), position_embeddings=positions)
        for row, length in enumerate(lengths):
            cells = mask[row].bool()
            own = tuple(part[:, cells] for part in positions)
            torch.testing.assert_close(out[row, cells], oracle(layer, x[row, cells], own), rtol=0, atol=1e-10)
            assert (out[row, ~cells] == 0).all()
            _, alone = layer(x[row : row + 1, cells], position_embeddings=own)
            for part, single in zip(state[:3], alone[:3], strict=True):
                torch.testing.assert_close(part[row], single[0], rtol=0, atol=1e-10)
            assert state.seen[row] == length
    ends = torch.tensor([0, 5, 5, 24, 25, 38])
    flat, positions = x.flatten(0, 1)[None, :38], angles(38)
    out, state = layer(flat, sequences=SequenceInfo.from_cu_seqlens(ends), position_embeddings=positions)
    for number, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        own = tuple(part[:, start:end] for part in positions)
        torch.testing.assert_close(
            out[0, start:end], oracle(layer, flat[0, start:end], own), rtol=0, atol=1e-10
        )
        _, alone = layer(flat[:, start:end], position_embeddings=own)
        for part, single in zip(state[:3], alone[:3], strict=True):
            torch.testing.assert_close(part[number], single[0], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("split", [1, 2, 3, 8, 22])
@pytest.mark.parametrize(("window", "sinks"), SHAPES)
@torch.no_grad()
def test_state_of_fixed_size_carries_any_split(window, sinks, split):
    layer, x, positions = layer_of(window, sinks), torch.randn(2, LONG, 24, dtype=torch.float64), angles(LONG)
    whole, last = layer(x, position_embeddings=positions)
    shapes = {name: part.shape for name, part in SINK.state(geometry(), SinkSettings(window, sinks)).items()}
    state, parts, start = None, [], 0
    for piece in x.split(split, dim=1):
        own = tuple(part[:, start : start + piece.shape[1]] for part in positions)
        out, state = layer(piece, state=state, position_embeddings=own)
        parts.append(out)
        start += piece.shape[1]
        assert {name: getattr(state, name).shape[1:] for name in shapes} == shapes
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    for part, expected in zip(state[:3], last[:3], strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_padded_turns_continue_a_state():
    """Rows of different lengths in every turn, one of them empty."""
    layer, turns = layer_of(5, 2), [[4, 9, 0], [6, 0, 3], [1, 1, 1], [0, 12, 2]]
    texts = [torch.randn(sum(row), 24, dtype=torch.float64) for row in zip(*turns, strict=True)]
    state, seen, found = None, [0, 0, 0], [[], [], []]
    for lengths in turns:
        width = max(lengths)
        x, mask = torch.randn(3, width, 24, dtype=torch.float64), torch.zeros(3, width)
        cos, sin = torch.zeros(3, width, 8).double(), torch.zeros(3, width, 8).double()
        for row, length in enumerate(lengths):
            cells = slice(width - length, width)
            mask[row, cells] = 1
            x[row, cells] = texts[row][seen[row] : seen[row] + length]
            cos[row, cells], sin[row, cells] = (part[0] for part in angles(length, seen[row]))
            seen[row] += length
        out, state = layer(
            x, sequences=SequenceInfo.from_mask(mask), state=state, position_embeddings=(cos, sin)
        )
        for row, length in enumerate(lengths):
            found[row].append(out[row, width - length :])
    for row, text in enumerate(texts):
        expected = oracle(layer, text, angles(len(text)))
        torch.testing.assert_close(torch.cat(found[row]), expected, rtol=0, atol=1e-10)


def geometry():
    return geometry_of({**tiny_teacher("llama").config.to_dict(), "num_attention_heads": 4})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_window_as_long_as_the_text_is_the_teacher(family):
    """Weights, biases, norms and positions are the attention's own: nothing was lost and nothing invented."""
    teacher = tiny_teacher(family)
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(1))
    for window, sinks, same in ((19, 0, True), (15, 4, True), (12, 4, False), (15, 3, False)):
        student = tiny_student(
            family, "sinks alone", mixer_configs={"sink": {"window": window, "sinks": sinks}}
        )
        student.load_state_dict(teacher.state_dict())
        found, expected = student(ids, use_cache=False).logits, teacher(ids).logits
        assert torch.allclose(found, expected, rtol=0, atol=1e-4) == same


def test_names_of_the_state_are_those_of_its_spec():
    assert tuple(SINK.state(geometry(), SinkSettings())) == SinkState._fields[:3]


def products(layer, length):
    """Count the operations of a call; of attention only the plain kernel's are counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, length, 32))
    assert counter.get_flop_counts()["Global"][torch.ops.aten.bmm] > 0
    return counter.get_total_flops()


def test_a_long_context_costs_a_window_per_query():
    """Neither a mask nor scores of all pairs: twice the text is twice the operations."""
    layer = SinkAttention(32, 4, 2, 8, window=64, sinks=4)
    assert products(layer, 4096) < 2.2 * products(layer, 2048)


def test_a_short_text_does_not_pay_for_a_wide_window():
    """Cells of a past that never was are not multiplied with."""
    narrow, wide = (SinkAttention(32, 4, 2, 8, window=window, sinks=4) for window in (96, 4096))
    assert products(wide, 96) == products(narrow, 96)

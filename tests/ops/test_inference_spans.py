"""Sequences without gradients, which are cut into more spans: tables of these, and kernels interpreted on the CPU."""

from __future__ import annotations

import os
import random

import pytest
import torch

from gendistill.ops import Segments, chunk_kda
from gendistill_kernels.delta import layout
from gendistill_kernels.delta.layout import CHUNK, PARTS, SPAN, UNCUT, Chunks, InferenceChunks
from gendistill_kernels.delta.rule import Rule

# the longest that is not cut
LIMIT = UNCUT * CHUNK


def spans_of(lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """Return of every sequence its spans: first token from its own first, tokens, and kind."""
    table = InferenceChunks.of(lengths, "cpu")
    if table.spans is None:
        return [[(0, length, 1)] for length in lengths]
    assert table.first_spans is not None
    rows = sorted(table.spans.tolist())
    assert [row[0] for row in rows] == list(range(len(rows)))
    firsts, found, start, chunks = table.first_spans.tolist(), [], 0, 0
    for sequence, length in enumerate(lengths):
        own = rows[firsts[sequence] : firsts[sequence + 1]]
        assert all(row[5] == sequence for row in own)
        found.append([(row[1] - start, row[2], row[4]) for row in own])
        for row in own:
            assert row[3] == chunks
            chunks += -(-row[2] // CHUNK)
        start += length
    assert len(rows) == firsts[-1]
    return found


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (0, [0]),
        (1, [1]),
        (2048, [2048]),
        (LIMIT - 1, [LIMIT - 1]),
        (LIMIT, [LIMIT]),
        (LIMIT + 1, [640, 640, 640, LIMIT + 1 - 3 * 640]),
        (4096, [1024] * 4),
        (4097, [1088] * 3 + [4097 - 3 * 1088]),
        (8192, [2048] * 4),
        (32_768, [8192] * 4),
        (40_000, [8192] * 4 + [40_000 - 4 * 8192]),
    ],
)
def test_a_sequence_is_cut_by_its_own_length_alone(length, sizes):
    alone = spans_of([length])
    assert [size for _, size, _ in alone[0]] == sizes
    kinds = [kind for *_, kind in alone[0]]
    assert kinds == ([1] if len(sizes) == 1 else [3, *[0] * (len(sizes) - 2), 2])
    starts = [start for start, *_ in alone[0]]
    assert starts == [sum(sizes[:number]) for number in range(len(sizes))]
    for others in ([5, 0], [9000], [4096, 70, 2305]):
        assert spans_of([*others, length, *others])[len(others)] == alone[0]


def test_rows_that_are_not_packed_are_cut_as_packed_sequences_are():
    for length in (100, LIMIT, LIMIT + 1, 4096, 40_000):
        packed = InferenceChunks.of([length] * 3, "cpu")
        rows = InferenceChunks.of_rows(3, length, torch.device("cpu"))
        for one, other in zip(packed[3:], rows[3:], strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_training_cuts_where_it_did():
    lengths = [4096, SPAN * CHUNK, 100]
    assert Chunks.of(lengths, "cpu").spans is None
    found = Chunks.of([*lengths, SPAN * CHUNK + 1], "cpu").spans
    assert found is not None
    assert len(found) == 5
    room = Segments([4096, 0, 0], room=80)
    assert room.table(Chunks.of).spans is None
    assert room.table(InferenceChunks.of).spans is not None
    assert room.builders == (Chunks.of, InferenceChunks.of)


@pytest.mark.parametrize(("tokens", "number"), [(2048, 8), (4096, 4), (8192, 16), (40_000, 8)])
def test_tables_with_room_are_of_one_shape(tokens, number):
    """That of the most spans that there can be, dead ones included, or of none."""
    rng = random.Random(0)
    tiles = tokens // CHUNK + number
    drawn = [[tokens, *[0] * (number - 1)]]
    # as many as possible that are just long enough to be cut
    cut = min(number - 2, tokens // (LIMIT + 1))
    drawn.append([*[LIMIT + 1] * cut, tokens - cut * (LIMIT + 1), *[0] * (number - cut - 1)])
    for _ in range(20):
        ends = sorted(rng.choices(range(tokens + 1), k=number - 2))
        drawn.append([b - a for a, b in zip([0, *ends], [*ends, tokens], strict=True)] + [0])
    shapes, live = set(), []
    for lengths in drawn:
        table = Segments(lengths, room=tiles).table(InferenceChunks.of)
        assert isinstance(table, InferenceChunks)
        shapes.add(tuple(None if part is None else part.shape for part in table))
        if table.spans is None:
            continue
        rows = table.spans.tolist()
        alive = [row for row in rows if row[4] or row[2]]
        live.append(len(alive))
        assert rows[: len(alive)] == alive
        assert sorted(row[0] for row in rows) == list(range(len(rows)))
        assert all(row[1:] == [0] * 5 for row in rows[len(alive) :])
        assert sum(row[2] for row in alive) == tokens
        assert table.first_spans.tolist()[-1] == len(alive)
    assert len(shapes) == 1
    assert (table.spans is None) == (tiles <= UNCUT)
    assert (tokens > LIMIT) == (max(live, default=0) > min(live, default=0))


@pytest.mark.parametrize(("bound", "spans"), [(None, True), (LIMIT + 1, True), (LIMIT, False), (2048, False)])
def test_sequences_that_are_bound_to_be_short_are_not_cut(bound, spans):
    lengths = [2048] * 4 + [0] * 4
    table = Segments(lengths, room=8192 // CHUNK + 8, bound=bound).table(InferenceChunks.of)
    assert isinstance(table, InferenceChunks)
    assert (table.spans is not None) == spans
    with pytest.raises(ValueError, match="no sequence may have more than 2047 tokens, got 2048"):
        Segments(lengths, room=8192 // CHUNK + 8, bound=2047)


def test_a_graph_s_copy_and_what_is_sent_to_a_gpu_are_of_the_same_kind():
    from gendistill.data.batch import Batch
    from gendistill.data.feed import Packed

    segments = Segments([4096, 100, 0], room=70)
    table, builders = segments.table(InferenceChunks.of), [InferenceChunks.of]
    grid = torch.zeros(1, 4196, dtype=torch.int64)
    packed = Packed([Batch(grid, grid, grid, segments, 0, 4196, (1, 2))], builders)
    (batch,) = packed.unpack(packed.buffer)
    for other in (segments.static(), batch.segments):
        copied = other.table(InferenceChunks.of)
        assert type(copied) is InferenceChunks
        assert other.fixed == segments.fixed
        for one, part in zip(copied, table, strict=True):
            assert torch.equal(one, part)
            assert one.data_ptr() != part.data_ptr()


def test_calls_without_gradients_ask_for_their_own_table(monkeypatch):
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    from gendistill.ops.contracts import delta_rule

    asked, segments = [], Segments([3, 4])

    class Kernels:
        def chunk_forward(self, x, rule, *, state, chunks, save):
            asked.append((type(chunks), save))
            return x.v, x.v, None

    def differentiable(*arguments):
        asked.append((type(segments.tables[Chunks.of]), arguments[-1]))
        return arguments[:3]

    monkeypatch.setattr(delta_rule, "chunk_kernels", Kernels)
    monkeypatch.setattr(delta_rule, "_check_device", lambda q: None)
    monkeypatch.setattr(delta_rule, "_chunk", differentiable)
    q, beta = torch.randn(1, 7, 1, 16), torch.rand(1, 7, 1)
    chunk_kda(q, q, q, -q.abs(), beta, segments=segments, impl="triton")
    assert asked == [(InferenceChunks, False)]
    assert segments.builders == (InferenceChunks.of,)
    leaf = q.clone().requires_grad_()
    with torch.no_grad():
        chunk_kda(leaf, q, q, -q.abs(), beta, segments=segments, impl="triton")
    assert asked[1] == (InferenceChunks, False)
    chunk_kda(leaf, q, q, -q.abs(), beta, segments=segments, impl="triton")
    assert asked[2] == (Chunks, True)


# ----- interpreted -----

interpreted = [
    pytest.mark.interpret,
    # all new memory is NaN: what no program writes must not be read
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off: make interpret"
    ),
]


def interpret(test):
    for mark in interpreted:
        test = mark(test)
    return test


def forward(x, rule, state, chunks):
    from gendistill_kernels.delta.chunk import chunk_forward

    out, last, saved = chunk_forward(x, rule, state=state, chunks=chunks)
    assert saved is None
    return out, last


@pytest.fixture
def short(monkeypatch):
    """Sequences of more than two chunks are cut, into up to four spans."""
    monkeypatch.setattr(layout, "UNCUT", 2)


def uncut(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(layout, "UNCUT", SPAN)
        return call()


# rule, decay per channel or head, heads of q, k and v, channels of keys and values
CASES = {
    "KDA": (Rule("softplus"), "channel", (2, 2, 2), 16, 16),
    "KDA, grouped heads": (Rule("softplus"), "channel", (2, 1, 1), 16, 32),
    "KDA, bounded, 24 and 20 channels": (Rule("bounded"), "channel", (2, 2, 2), 24, 20),
    "GDN": (Rule("softplus"), "scalar", (1, 1, 2), 16, 16),
    "strengths per channel": (
        Rule("softplus", erase="channel", write="channel"),
        "channel",
        (2, 2, 2),
        16,
        16,
    ),
    "no erase": (Rule("bounded", erase="none"), "scalar", (2, 2, 2), 16, 16),
}
# two chunks, three, none, some with a part of one, and one long enough for spans of two
LENGTHS = [128, 129, 0, 192, 1, 257, 70]


@interpret
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_spans_are_as_sequences_that_are_not_cut(cases, monkeypatch, short, name, has_state):
    rule, per, heads, K, V = CASES[name]
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    x = cases.draw(rule, 1, sum(LENGTHS), 2, K, V, heads=heads, decay_per=per, dtype=torch.float32)
    state = cases.normal(len(LENGTHS), 2, K, V) if has_state else None
    table = InferenceChunks.of(LENGTHS, "cpu")
    assert [len(spans) for spans in spans_of(LENGTHS)] == [1, 3, 1, 3, 1, 3, 1]
    found = forward(x, rule, state, table)
    whole = uncut(monkeypatch, lambda: forward(x, rule, state, InferenceChunks.of(LENGTHS, "cpu")))
    wide = (part if part is None else part.double() for part in x)
    expected = cases.exact_packed(type(x)(*wide), rule, None if state is None else state.double(), LENGTHS)
    for one, other, answer in zip(found, whole, expected, strict=True):
        assert cases.error(one, other.double()) < 2e-5
        # the products of a chunk run in float16
        assert cases.error(one, answer) < 6e-3
    # bits of what is beside others are those of what is alone
    start = 0
    for number, length in enumerate(LENGTHS):
        here = slice(start, start + length)
        start += length
        if not length:
            assert torch.equal(found[1][number], torch.zeros(2, K, V) if state is None else state[number])
            continue
        alone = x._replace(
            **{
                name: getattr(x, name)[:, here].contiguous()
                for name in ("q", "k", "v", "decay", "beta", "erase", "write")
                if getattr(x, name) is not None
            }
        )
        own = None if state is None else state[number : number + 1]
        for chunks in (InferenceChunks.of([length], "cpu"), None):
            out, last = forward(alone, rule, own, chunks)
            assert torch.equal(found[0][:, here], out)
            assert torch.equal(found[1][number], last[0])


@interpret
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("lengths", [[129, 1, 0, 257, 0, 0], [70, 0, 128, 3, 0, 0], [500, 0, 0]])
def test_dead_spans_and_chunks_change_no_bit(cases, monkeypatch, short, lengths, has_state):
    rule, room = Rule("softplus"), 12
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    x = cases.draw(rule, 1, sum(lengths), 2, 16, dtype=torch.float32)
    state = cases.normal(len(lengths), 2, 16, 16) if has_state else None
    plain, filled = (Segments(lengths, room=tiles).table(InferenceChunks.of) for tiles in (0, room))
    # the second has no spans without room
    assert (plain.spans is None) == (max(lengths) <= 128)
    assert len(filled.spans) == len(lengths) + room
    for one, other in zip(forward(x, rule, state, filled), forward(x, rule, state, plain), strict=True):
        assert torch.isfinite(other).all()
        assert torch.equal(one, other)
    # those of training change nothing if they are dead, either
    from gendistill_kernels.delta.chunk import chunk_forward

    saving = [chunk_forward(x, rule, state=state, chunks=chunks, save=True)[:2] for chunks in (plain, filled)]
    assert all(torch.equal(one, other) for one, other in zip(*saving, strict=True))


@interpret
@pytest.mark.parametrize("channels", [64, 128])
def test_heads_of_64_and_128_channels(cases, monkeypatch, short, channels):
    rule, lengths = Rule("softplus"), [130, 65]
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    x = cases.draw(rule, 1, sum(lengths), 2, channels, heads=(2, 1, 1), dtype=torch.float32)
    state = cases.normal(2, 2, channels, channels)
    found = forward(x, rule, state, InferenceChunks.of(lengths, "cpu"))
    whole = uncut(monkeypatch, lambda: forward(x, rule, state, InferenceChunks.of(lengths, "cpu")))
    for one, other in zip(found, whole, strict=True):
        assert cases.error(one, other.double()) < 2e-5


@interpret
def test_the_op_at_the_real_limits(cases, monkeypatch):
    """Prompts with room, as the engine reads them; gradients cut none of these lengths."""
    torch.manual_seed(0)
    lengths = [LIMIT, LIMIT + 1, 4096, 1, 0, 0]
    tokens = sum(lengths)
    q, k, v, decay = (torch.randn(1, tokens, 1, 16) for _ in range(4))
    beta, a_log, bias = torch.randn(1, tokens, 1), torch.rand(1), torch.randn(16) - 4
    state = torch.randn(len(lengths), 1, 16, 16)

    def call(q, segments):
        gates = {"gate": "softplus", "a_log": a_log, "dt_bias": bias}
        return chunk_kda(q, k, v, decay, beta, **gates, state=state, segments=segments, impl="triton")

    tiles = tokens // CHUNK + len(lengths)
    segments = Segments(lengths, room=tiles)
    found = call(q, segments)
    assert segments.builders == (InferenceChunks.of,)
    table = segments.table(InferenceChunks.of)
    assert table.first_spans.tolist() == [
        0,
        1,
        1 + PARTS,
        1 + 2 * PARTS,
        2 + 2 * PARTS,
        3 + 2 * PARTS,
        4 + 2 * PARTS,
    ]
    assert len(table.spans) > table.first_spans[-1]
    other = call(q.clone().requires_grad_(), Segments(lengths))
    for one, expected in zip(found, other, strict=True):
        assert cases.error(one, expected.detach().double()) < 2e-5
    # as it was not cut: bits are those with gradients
    first = slice(0, LIMIT)
    assert torch.equal(found[0][:, first], other[0][:, first])
    assert not torch.equal(found[0], other[0])

"""The Triton delta-rule kernels, interpreted on the CPU, against float64 autograd of the reference."""

from __future__ import annotations

import math
import os

import pytest
import torch

from gendistill.ops import bounded_log_decay, l2norm, softplus_log_decay
from gendistill.ops.reference.delta_rule import recurrent_delta_rule

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill_kernels.delta.chunk import chunk_backward, chunk_forward
from gendistill_kernels.delta.layout import Chunks
from gendistill_kernels.delta.rule import Inputs, Rule
from gendistill_kernels.runtime import hardware

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]
# the products of a chunk run in float16: ten bits of mantissa
TOLERANCE = 6e-3
# sums over all tokens, in which most of the gradient cancels
SUMMED = {"A_log": 2e-2, "dt_bias": 2e-2}


def make(
    B=1, T=70, H=2, K=16, V=16, HQ=None, HK=None, HV=None, *, rule: Rule, dtype=torch.float32, seed=0
) -> Inputs:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, T, n or H, c).to(dtype) for n, c in ((HQ, K), (HK, K), (HV, V)))
    decay, beta = torch.randn(B, T, H, K).to(dtype), torch.randn(B, T, H).to(dtype)
    if rule.gate == "none":
        decay = -0.3 * decay.abs()
    if not rule.sigmoid:
        beta = beta.sigmoid()
    if rule.gate == "none":
        return Inputs(q, k, v, decay, beta)
    return Inputs(q, k, v, decay, beta, torch.rand(H) * 0.6 - 0.3, torch.randn(H * K) - 2)


def reference(x: Inputs, rule: Rule, state=None):
    """Compose the op from the reference ops, in the dtype of the inputs."""
    q, k = (l2norm(part) if rule.norm else part for part in (x.q, x.k))
    beta = x.beta.sigmoid() if rule.sigmoid else x.beta
    decay = x.decay
    if rule.gate == "bounded":
        decay = bounded_log_decay(x.decay, x.A_log, x.dt_bias, lower_bound=rule.lower_bound)
    if rule.gate == "softplus":
        decay = softplus_log_decay(x.decay, x.A_log, x.dt_bias)
    return recurrent_delta_rule(
        q, k, x.v, log_decay=decay, erase=beta, write=beta, state=state, scale=rule.scale
    )


def distance(x, y):
    return ((x.double() - y).square().mean().sqrt() / (y.square().mean().sqrt() + 1e-12)).item()


CASES = {
    "softplus": (Rule("softplus"), {}, False),
    "bounded with a state": (Rule("bounded"), {"dtype": torch.float16}, True),
    "fewer key and value heads": (Rule("bounded"), {"H": 4, "HK": 2, "HV": 1, "T": 65}, True),
    "fewer query heads": (Rule("bounded"), {"B": 2, "H": 2, "HQ": 1, "HK": 1, "T": 33}, False),
    "given decay and beta": (Rule("none", sigmoid=False), {"K": 16, "V": 32, "T": 64}, True),
    "channels that fill no tile": (Rule("bounded", scale=0.5), {"K": 24, "V": 20, "T": 17}, True),
    "not normalised": (Rule("bounded", norm=False, scale=0.1), {"T": 1}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_output_state_and_every_gradient_match_the_reference(name):
    rule, sizes, with_state = CASES[name]
    x = make(**sizes, rule=rule)
    if not rule.norm:
        x = x._replace(q=x.q / 4, k=x.k / 4)
    shape = (x.q.shape[0], x.beta.shape[2], x.k.shape[3], x.v.shape[3])
    state = torch.randn(shape) if with_state else None
    out, last, saved = chunk_forward(x, rule, state=state, save=True)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last) if with_state else None
    found = chunk_backward(d_out, d_last, x, rule, out, saved, want_state=with_state)

    exact = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    start = state.double().requires_grad_() if with_state else None
    expected, final = reference(exact, rule, start)
    assert distance(out, expected.detach()) < TOLERANCE
    assert distance(last, final.detach()) < TOLERANCE
    loss = (expected * d_out.double()).sum()
    if with_state:
        loss = loss + (final * d_last.double()).sum()
    names = [name for name, part in zip(Inputs._fields, exact, strict=True) if part is not None]
    leaves = [getattr(exact, name) for name in names] + ([start] if with_state else [])
    for field, gradient in zip(
        [*names, "state"][: len(leaves)], torch.autograd.grad(loss, leaves), strict=True
    ):
        assert distance(getattr(found, field), gradient) < SUMMED.get(field, TOLERANCE), field


def test_packed_documents_are_as_if_alone():
    rule, lengths = Rule("bounded"), [0, 1, 66, 0, 3]
    x = make(T=sum(lengths), rule=rule)
    state = torch.randn(len(lengths), 2, 16, 16)
    chunks = Chunks.of(lengths, "cpu")
    out, last, saved = chunk_forward(x, rule, state=state, chunks=chunks, save=True)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = chunk_backward(d_out, d_last, x, rule, out, saved, chunks=chunks, want_state=True)
    first, totals = 0, [0.0, 0.0]
    for number, length in enumerate(lengths):
        here = slice(first, first + length)
        first += length
        if length == 0:
            assert torch.equal(last[number], state[number])
            assert torch.equal(found.state[number], d_last[number])
            continue
        alone = x._replace(**{name: getattr(x, name)[:, here].contiguous() for name in Inputs._fields[:5]})
        single, final, kept = chunk_forward(alone, rule, state=state[number : number + 1], save=True)
        assert torch.equal(out[:, here], single)
        assert torch.equal(last[number], final[0])
        part = chunk_backward(
            d_out[:, here].contiguous(),
            d_last[number : number + 1],
            alone,
            rule,
            single,
            kept,
            want_state=True,
        )
        for name in Inputs._fields[:5]:
            assert torch.equal(getattr(found, name)[:, here], getattr(part, name)), name
        assert torch.equal(found.state[number], part.state[0])
        totals = [total + grad for total, grad in zip(totals, (part.A_log, part.dt_bias), strict=True)]
    torch.testing.assert_close(found.A_log, totals[0])
    torch.testing.assert_close(found.dt_bias, totals[1])


def test_a_sequence_may_be_cut_where_chunks_end():
    rule = Rule("softplus")
    x = make(T=100, rule=rule)
    out, last, _ = chunk_forward(x, rule)
    halves = [
        x._replace(**{name: getattr(x, name)[:, part].contiguous() for name in Inputs._fields[:5]})
        for part in (slice(0, 64), slice(64, 100))
    ]
    one, state, _ = chunk_forward(halves[0], rule)
    two, final, _ = chunk_forward(halves[1], rule, state=state)
    assert torch.equal(out, torch.cat([one, two], 1))
    assert torch.equal(last, final)


@pytest.mark.parametrize(("decay", "mark"), [(-1.0, 0), (-4.0, 1), (-1e3, 2)])
def test_the_past_does_not_depend_on_the_future(cases, decay, mark):
    """Nor on how far the later tokens' decay takes the chunk out of range."""
    rule = Rule("none", sigmoid=False)
    x = make(T=70, rule=rule)
    out, _, saved = chunk_forward(x, rule, save=True)
    later = {name: getattr(x, name).clone() for name in Inputs._fields[:5]}
    for name, value in (("q", 9.0), ("k", -9.0), ("v", 1e4), ("decay", decay), ("beta", 1.0)):
        later[name][:, 21:] = value
    again, _, kept = chunk_forward(x._replace(**later), rule, save=True)
    assert torch.equal(again[:, :21], out[:, :21])
    assert (cases.saved_tensors(x, rule, saved)["marks"] == 0).all()
    assert (cases.saved_tensors(x, rule, kept)["marks"][0] == mark).all()


@pytest.mark.parametrize("which", ["one channel", "some tokens", "every other head"])
def test_chunks_partly_out_of_range_match_the_reference(cases, which):
    """Rows in range, rows in range of their block of 16 tokens, and rows of which a single token is out of it."""
    rule = Rule("none", sigmoid=False)
    x = make(T=200, H=4, rule=rule, seed=3)
    decay = x.decay.clone()
    if which == "one channel":
        decay[..., 5] = -3.0
        decay[:, 128:, 1, 7] = -10.0
    elif which == "some tokens":
        decay[:, 40:43] = -60.0
        decay[:, 100] = -200.0
        decay[:, 150:] = -4.0
    else:
        decay[:, :, ::2] = -5.0
        decay[:, :, 2] = -11.0
    x = x._replace(decay=decay)
    out, last, saved = chunk_forward(x, rule, save=True)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = chunk_backward(d_out, d_last, x, rule, out, saved)
    assert cases.saved_tensors(x, rule, saved)["marks"].unique().tolist() == [0, 1, 2]
    exact = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    expected, final = reference(exact, rule)
    loss = (expected * d_out.double()).sum() + (final * d_last.double()).sum()
    gradients = torch.autograd.grad(loss, exact[:5])
    assert distance(out, expected.detach()) < TOLERANCE
    assert distance(last, final.detach()) < TOLERANCE
    for field, gradient in zip(Inputs._fields, gradients, strict=False):
        assert distance(getattr(found, field), gradient) < TOLERANCE, field


def test_the_longest_sequences_and_spans_are_scanned_first(monkeypatch):
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 1)
    chunks = Chunks.of([3, 0, 130, 64], "cpu")
    # number, first token, tokens, first chunk, kind, sequence
    assert chunks.sequences.tolist() == [
        [2, 3, 130, 1, 1, 2],
        [3, 133, 64, 4, 1, 3],
        [0, 0, 3, 0, 1, 0],
        [1, 3, 0, 1, 1, 1],
    ]
    assert chunks.spans.tolist() == [
        [2, 3, 64, 1, 3, 2],
        [3, 67, 64, 2, 0, 2],
        [5, 133, 64, 4, 1, 3],
        [0, 0, 3, 0, 1, 0],
        [4, 131, 2, 3, 2, 2],
        [1, 3, 0, 1, 1, 1],
    ]
    assert chunks.first_spans.tolist() == [0, 1, 2, 5, 6]


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_long_sequences_in_spans_are_as_in_one(cases, monkeypatch, packed, has_state):
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 1)
    rule, lengths = Rule("bounded"), [70, 0, 150, 30] if packed else [140, 140]
    x = make(B=1 if packed else 2, T=sum(lengths) if packed else 140, rule=rule)
    state = torch.randn(len(lengths), 2, 16, 16) if has_state else None
    chunks = Chunks.of(lengths, "cpu") if packed else None
    out, last, saved = chunk_forward(x, rule, state=state, chunks=chunks, save=True)
    unsaved = chunk_forward(x, rule, state=state, chunks=chunks)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = chunk_backward(d_out, d_last, x, rule, out, saved, chunks=chunks, want_state=has_state)
    matrices = cases.saved_tensors(x, rule, saved, chunks)["matrices"]
    assert matrices.shape[0] == (7 if packed else 6)
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 100)
    chunks = Chunks.of(lengths, "cpu") if packed else None
    whole, end, kept = chunk_forward(x, rule, state=state, chunks=chunks, save=True)
    expected = chunk_backward(d_out, d_last, x, rule, whole, kept, chunks=chunks, want_state=has_state)
    assert "matrices" not in cases.saved_tensors(x, rule, kept, chunks)
    assert (found.state is not None) == has_state
    pairs = [(out, whole), (last, end), (unsaved[0], whole), (unsaved[1], end)]
    pairs += zip(found, expected, strict=True)
    assert all(distance(one, other.double()) < 1e-5 for one, other in pairs if one is not None)


@pytest.mark.parametrize("layout", ["parts of one tensor", "heads before tokens"])
def test_how_q_k_and_v_lie_in_memory_changes_nothing(monkeypatch, layout):
    """Parts of one projection are not copied."""
    rule = Rule("bounded")
    x = make(B=2, T=70, H=4, HQ=2, HK=2, HV=2, V=32, rule=rule)
    if layout == "parts of one tensor":
        flat = torch.cat([part.flatten(2) for part in (x.q, x.k, x.v)], 2)
        parts = flat.split([part.shape[2] * part.shape[3] for part in (x.q, x.k, x.v)], 2)
        views = [
            part.unflatten(2, whole.shape[2:]) for part, whole in zip(parts, (x.q, x.k, x.v), strict=True)
        ]
        monkeypatch.setattr(torch.Tensor, "contiguous", None)
    else:
        views = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (x.q, x.k, x.v)]
    y = x._replace(q=views[0], k=views[1], v=views[2])
    assert not y.q.is_contiguous()
    assert not y.v.is_contiguous()
    found = []
    for inputs in (x, y):
        out, last, saved = chunk_forward(inputs, rule, save=True)
        torch.manual_seed(1)
        found.append([out, last, *chunk_backward(torch.randn_like(out), None, inputs, rule, out, saved)])
    assert all(one is other or torch.equal(one, other) for one, other in zip(*found, strict=True))


LOPSIDED = {
    "one token, then steps that change nothing": (Rule("none", sigmoid=False), 0.0),
    "strengths of nearly nothing": (Rule("softplus"), 0.0),
    "no erase, small gradients of the output": (Rule("none", sigmoid=False, erase="none"), 1e-12),
}


@pytest.mark.parametrize("name", LOPSIDED)
def test_gradients_of_states_may_be_much_larger_than_those_of_pairs(name):
    """Pairs of tokens and states share a power of two by which a chunk's gradients are divided."""
    rule, size = LOPSIDED[name]
    x = make(T=64, H=1, rule=rule)
    decay, beta = 0.1 * x.decay, x.beta.clone()
    if name.startswith("one token"):
        decay[:, 1:], beta[:, 1:] = 0.0, 0.0
    elif name.startswith("strengths"):
        decay, beta[:, 1:] = x.decay, -30.0
    x = x._replace(decay=decay, beta=beta)
    out, last, saved = chunk_forward(x, rule, save=True)
    d_out, d_last = size * torch.randn_like(out), torch.randn_like(last)
    d_out[:, 0] = torch.randn_like(d_out[:, 0]) if size == 0 else d_out[:, 0]
    found = chunk_backward(d_out, d_last, x, rule, out, saved)
    exact = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    q, k = (l2norm(part) for part in exact[:2])
    beta = exact.beta.sigmoid() if rule.sigmoid else exact.beta
    decay = exact.decay
    if rule.gate == "softplus":
        decay = softplus_log_decay(decay, exact.A_log, exact.dt_bias)
    erase = None if rule.erase == "none" else beta
    expected, final = recurrent_delta_rule(q, k, exact.v, log_decay=decay, erase=erase, write=beta)
    loss = (expected * d_out.double()).sum() + (final * d_last.double()).sum()
    for field in ("k", "v", "decay"):
        gradient = torch.autograd.grad(loss, getattr(exact, field), retain_graph=True)[0]
        assert distance(getattr(found, field), gradient) < TOLERANCE, field


@pytest.mark.parametrize("gate", ["bounded", "none"])
def test_float16_inputs_are_differentiated_in_float16(cases, monkeypatch, gate):
    """As on a GPU; interpreted, other tests take float32, which the range of 2^-12 does not need."""
    monkeypatch.setattr(hardware, "INTERPRETED", False)
    rule = Rule(gate, sigmoid=gate != "none")
    x = make(T=140, H=2, rule=rule, dtype=torch.float16)
    decay = x.decay.clone()
    decay[:, :64] /= 16
    x = x._replace(decay=decay if gate == "none" else x.decay)
    out, last, saved = chunk_forward(x, rule, save=True)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = chunk_backward(d_out, d_last, x, rule, out, saved)
    assert (cases.saved_tensors(x, rule, saved)["marks"] == 0).any() == (gate == "none")
    exact = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    expected, final = reference(exact, rule)
    loss = (expected * d_out.double()).sum() + (final * d_last.double()).sum()
    leaves = {name: part for name, part in exact._asdict().items() if part is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert distance(out, expected.detach()) < 1.5e-3
    for field, gradient in zip(leaves, gradients, strict=True):
        assert distance(getattr(found, field), gradient) < SUMMED.get(field, 2e-3), field


EXTREME = {
    "no decay": (0.0, 0.5),
    "even decay": (-1.0, 0.5),
    "strong decay": (-20.0, 0.5),
    "instant forgetting": (-1000.0, 0.5),
    "full strength": (-0.01, 1.0),
    "full strength without decay": (0.0, 1.0),
    "no strength": (-0.01, 0.0),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("keys", ["random", "equal", "alternating"])
def test_every_result_is_right_with_extreme_gates(cases, name, keys):
    """With equal keys and full strength the inverse of a chunk's triangular system is at its worst."""
    rule = Rule("none", sigmoid=False)
    x = make(T=70, H=1, rule=rule)
    decay, beta = EXTREME[name]
    x = x._replace(decay=torch.full_like(x.decay, decay), beta=torch.full_like(x.beta, beta))
    if keys != "random":
        k = x.k[:, :1].expand_as(x.k).clone()
        if keys == "alternating":
            k[:, ::2] *= -1
        x = x._replace(k=k)
    grads = torch.randn_like(x.v), torch.randn(1, 1, 16, 16)
    found, expected = cases.run(x, rule, None, grads), cases.differentiate(x, rule, None, grads)
    for field, part in expected.items():
        # float32 forwards, through at most two chunks; backwards products of float16, whose rounding is 5e-4. The
        # interpreter's exponentials are numpy's, whose last digit depends on the processor: 1.06e-5 with AVX512
        limit = 2e-5 if field in ("out", "last") else 1e-3
        assert cases.error(found[field], part, floor=1e-5) < limit, field


@pytest.mark.parametrize("size", [1e-24, 1e-14, 1e20])
@pytest.mark.parametrize("decay", [-97, -197, -201, -790, -810])
def test_gradients_of_any_size_come_through_chunks_at_the_edge_of_range(cases, decay, size):
    """Of a chunk that decays by ``2**decay``, with gradients of this size."""
    rule = Rule("none", sigmoid=False)
    x = make(T=128, H=1, rule=rule)
    x = x._replace(decay=torch.full_like(x.decay, decay * math.log(2) / 64))
    out, last, saved = chunk_forward(x, rule, save=True)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = chunk_backward(size * d_out, size * d_last, x, rule, out, saved)
    exact = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    expected, final = reference(exact, rule)
    loss = (expected * d_out.double()).sum() + (final * d_last.double()).sum()
    gradients = torch.autograd.grad(loss, exact[:5])
    wild = cases.saved_tensors(x, rule, saved)["marks"]
    assert (wild == (decay < -200) + (decay < 4 * -200)).all()
    for field, gradient in zip(Inputs._fields, gradients, strict=False):
        assert distance(getattr(found, field).double() / size, gradient) < TOLERANCE, field

"""The Triton kernels compiled for a GPU, against float64 autograd of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from gendistill.ops import (
    Segments,
    bounded_log_decay,
    l2norm,
    softplus_log_decay,
)
from gendistill.ops.reference.delta_rule import recurrent_delta_rule

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

from gendistill.ops import chunk_kda
from gendistill_kernels.delta.chunk import chunk_backward, chunk_forward
from gendistill_kernels.delta.layout import Chunks
from gendistill_kernels.delta.rule import Inputs, Rule

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
# relative rms error; rounding the output alone costs 1.7e-3 in bfloat16 and 2.1e-4 in float16
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 2.5e-3, torch.float32: 2e-3}
# of the family's other rules, on an H100: up to 6.7e-3 in bfloat16 (beta where it only erases: a sum over key channels
# in which much cancels), and up to 3.9e-3 in float16 (a given decay), when score gradients were bfloat16 there, too
FAMILY_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 5e-3}
# sums over all tokens, in which most of the gradient cancels
SUMMED = {"A_log": 5e-2, "dt_bias": 2e-2}
TENSORS = Inputs._fields


def make(
    B=2,
    T=200,
    H=3,
    K=128,
    V=128,
    HQ=None,
    HK=None,
    HV=None,
    *,
    rule=None,
    dtype=torch.bfloat16,
    seed=0,
    decay_per="channel",
) -> Inputs:
    torch.manual_seed(seed)
    rule = rule or Rule("bounded")

    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    q, k, v = (normal(B, T, n or H, c).to(dtype) for n, c in ((HQ, K), (HK, K), (HV, V)))
    if not rule.norm:
        q, k = q / 12, k / 12
    wide = (K,) if decay_per == "channel" else ()
    decay, beta = normal(B, T, H, *wide).to(dtype), normal(B, T, H).to(dtype)
    x = Inputs(q, k, v, decay, beta)
    if rule.gate == "none":
        x = x._replace(decay=-0.3 * decay.abs())
    else:
        rates = torch.rand(H, device="cuda") * (2.7 if rule.gate == "softplus" else 1.0)
        x = x._replace(A_log=rates, dt_bias=normal(H * (K if wide else 1)) - 4)
    strengths = {
        "beta": beta if "scalar" in (rule.erase, rule.write) else None,
        "erase": normal(B, T, H, K).to(dtype) if rule.erase == "channel" else None,
        "write": normal(B, T, H, V).to(dtype) if rule.write == "channel" else None,
    }
    if not rule.sigmoid:
        strengths = {name: part if part is None else part.sigmoid() for name, part in strengths.items()}
    return x._replace(**strengths)


def exact(x: Inputs, rule: Rule, state=None):
    q, k = (l2norm(part) if rule.norm else part for part in (x.q, x.k))
    beta, erase, write = (
        part if part is None or not rule.sigmoid else part.sigmoid() for part in (x.beta, x.erase, x.write)
    )
    # a decay per head is one of a single channel
    decay = x.decay if x.decay.ndim == 4 else x.decay[..., None]
    if rule.gate == "bounded":
        decay = bounded_log_decay(decay, x.A_log, x.dt_bias, lower_bound=rule.lower_bound)
    if rule.gate == "softplus":
        decay = softplus_log_decay(decay, x.A_log, x.dt_bias)
    settings = {
        "log_decay": decay if x.decay.ndim == 4 else decay[..., 0],
        "erase": {"none": None, "scalar": beta, "channel": erase}[rule.erase],
        "write": beta if rule.write == "scalar" else write,
    }
    return recurrent_delta_rule(q, k, x.v, **settings, state=state, scale=rule.scale)


def distance(found, expected):
    difference = (found.double() - expected).square().mean().sqrt()
    return (difference / expected.square().mean().sqrt().clamp_min(1e-12)).item()


def cut(x: Inputs, part: slice) -> Inputs:
    return x._replace(**{name: getattr(x, name)[:, part].contiguous() for name in TENSORS[:5]})


CASES = {
    "softplus": (Rule("softplus"), {}, True),
    "bounded": (Rule("bounded"), {}, False),
    "given gates": (Rule("none", sigmoid=False), {"T": 64}, True),
    "not normalised": (Rule("bounded", norm=False, scale=0.1), {"T": 65}, True),
    "float16": (Rule("softplus"), {"dtype": torch.float16, "T": 127}, True),
    "float16, 3 of 9 heads": (
        Rule("bounded"),
        {"dtype": torch.float16, "H": 9, "HK": 3, "HV": 3, "K": 64, "V": 64},
        True,
    ),
    "float16, 96 channels": (Rule("bounded"), {"dtype": torch.float16, "K": 96, "V": 96, "T": 63}, True),
    "float16, 256 channels": (Rule("bounded"), {"dtype": torch.float16, "K": 256, "V": 256, "H": 2}, True),
    "float16, more values": (Rule("softplus"), {"dtype": torch.float16, "K": 64, "V": 128}, True),
    "float32": (Rule("bounded"), {"dtype": torch.float32, "T": 100}, True),
    "64 channels, 3 of 9 heads": (Rule("bounded"), {"H": 9, "HK": 3, "HV": 3, "K": 64, "V": 64}, True),
    "64 channels, 2 of 14 heads": (Rule("softplus"), {"H": 14, "HK": 2, "HV": 2, "K": 64, "V": 64}, False),
    "fewer query heads": (Rule("softplus"), {"H": 4, "HQ": 2, "HK": 2, "HV": 4}, True),
    "96 channels": (Rule("bounded"), {"K": 96, "V": 96, "T": 63}, True),
    "100 channels": (Rule("bounded"), {"K": 100, "V": 100, "T": 17}, True),
    "256 channels": (Rule("bounded"), {"K": 256, "V": 256, "H": 2}, True),
    "more values": (Rule("softplus"), {"K": 64, "V": 128}, True),
    "fewer values": (Rule("softplus"), {"K": 128, "V": 64}, True),
    "one token": (Rule("bounded"), {"T": 1}, True),
    "many tokens": (Rule("bounded"), {"B": 1, "T": 4096, "H": 1}, True),
}
FAMILY = [*itertools.product(("channel", "scalar"), ("none", "scalar", "channel"), ("scalar", "channel"))]
FAMILY.remove(("channel", "scalar", "scalar"))
for decay_per, erase, write in FAMILY:
    words = {"erase": erase, "write": write}
    CASES |= {
        f"{decay_per}, {erase}, {write}: {name}": (
            Rule(gate, **words, **more),
            {**sizes, "decay_per": decay_per},
            start,
        )
        for name, gate, more, sizes, start in (
            ("softplus", "softplus", {}, {}, True),
            ("given gates, float16", "none", {"sigmoid": False}, {"dtype": torch.float16, "T": 65}, False),
            ("1 of 3 heads of 64", "bounded", {}, {"HK": 1, "HV": 1, "K": 64, "V": 64}, True),
            ("fewer values", "bounded", {"norm": False, "scale": 0.1}, {"K": 100, "V": 40, "T": 63}, True),
        )
    }


@pytest.mark.parametrize("name", CASES)
def test_output_state_and_every_gradient_match_float64(name):
    rule, sizes, with_state = CASES[name]
    x = make(**sizes, rule=rule)
    is_kda = x.decay.ndim == 4 and (rule.erase, rule.write) == ("scalar", "scalar")
    tolerance = (TOLERANCE if is_kda else FAMILY_TOLERANCE)[x.q.dtype]
    shape = (x.q.shape[0], x.decay.shape[2], x.k.shape[3], x.v.shape[3])
    state = torch.randn(shape, device="cuda") if with_state else None
    out, last, saved = chunk_forward(x, rule, state=state, save=True)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last) if with_state else None
    found = chunk_backward(d_out, d_last, x, rule, out, saved, want_state=with_state)

    wide = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    start = state.double().requires_grad_() if with_state else None
    expected, final = exact(wide, rule, start)
    assert distance(out, expected.detach()) < tolerance
    assert distance(last, final.detach()) < tolerance
    loss = (expected * d_out.double()).sum()
    if with_state:
        loss = loss + (final * d_last.double()).sum()
    names = [name for name, part in zip(TENSORS, wide, strict=True) if part is not None]
    leaves = [getattr(wide, name) for name in names] + ([start] if with_state else [])
    gradients = torch.autograd.grad(loss, leaves)
    for field, gradient in zip([*names, "state"][: len(leaves)], gradients, strict=True):
        assert distance(getattr(found, field), gradient) < SUMMED.get(field, tolerance), field


def run(x, rule, segments=None, state=None):
    gates = {"gate": rule.gate, "a_log": x.A_log, "dt_bias": x.dt_bias}
    return chunk_kda(*x[:5], **gates, segments=segments, state=state, impl="triton")


KDA, GDN = ("channel", "scalar", "scalar"), ("scalar", "scalar", "scalar")
GDN_2, LINEAR = ("channel", "channel", "channel"), ("channel", "none", "scalar")
# interpreted, with right bfloat16 products: up to 5.7e-3 (beta), 6.8e-4 and 1.4e-3
LAYOUT_TOLERANCE = {**TOLERANCE, torch.bfloat16: 8e-3}
LAYOUTS = {
    f"{name}, {layout}{', ' + word if word else ''}": (layout, words, dtype, gate)
    for name, words, gate in (
        ("KDA", KDA, "bounded"),
        ("GDN", GDN, "softplus"),
        ("GDN-2", GDN_2, "softplus"),
        ("linear attention", LINEAR, "none"),
    )
    for layout, word, dtype in (
        ("packed", "", torch.bfloat16),
        ("cut", "", torch.bfloat16),
        ("packed and cut", "", torch.bfloat16),
        ("packed and cut", "float16", torch.float16),
        ("packed and cut", "float32", torch.float32),
    )
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_and_cut_sequences_match_float64(cases, monkeypatch, name):
    """Two heads of q read one of k and v, whose gradients are summed over them."""
    layout, (decay_per, erase, write), dtype, gate = LAYOUTS[name]
    rule = Rule(gate, sigmoid=gate != "none", erase=erase, write=write)
    if "cut" in layout:
        # a sequence of 200 tokens, which are four chunks, is cut in two
        monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 2)
    lengths = [0, 15, 200, 1, 65] if "packed" in layout else None
    x = cases.draw(
        rule, B=1, T=sum(lengths or [330]), H=2, K=64, heads=(2, 1, 1), decay_per=decay_per, dtype=dtype
    )
    number = len(lengths or [330])
    state, grads = cases.normal(number, 2, 64, 64), cases.upstream(x, number)
    chunks = None if lengths is None else Chunks.of(lengths, "cuda")
    found = cases.run(x, rule, state, grads, chunks)
    expected = cases.differentiate(x, rule, state, grads, lengths)
    assert found.keys() == expected.keys()
    for key, part in expected.items():
        assert cases.error(found[key], part) < SUMMED.get(key.removeprefix("d "), LAYOUT_TOLERANCE[dtype]), (
            key
        )


def test_packed_documents_are_bitwise_as_if_alone():
    rule, lengths = Rule("bounded"), [0, 15, 1, 64, 0, 200, 1, 65]
    leaves = make(B=1, T=sum(lengths), rule=rule)
    x = Inputs(*(None if part is None else part.requires_grad_() for part in leaves))
    state = torch.randn(len(lengths), 3, 128, 128, device="cuda", requires_grad=True)
    out, last = run(x, rule, Segments(lengths, device="cuda"), state)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = torch.autograd.grad((out, last), (*x[:5], state), (d_out, d_last))
    first = 0
    for number, length in enumerate(lengths):
        here = slice(first, first + length)
        first += length
        if not length:
            assert torch.equal(last[number], state[number])
            assert torch.equal(found[5][number], d_last[number])
            continue
        alone = cut(x, here)
        own = state[number : number + 1]
        single, final = run(alone, rule, None, own)
        assert torch.equal(out[:, here], single)
        assert torch.equal(last[number], final[0])
        part = torch.autograd.grad(
            (single, final), (*alone[:5], own), (d_out[:, here].contiguous(), d_last[number : number + 1])
        )
        for whole, mine in zip(found[:5], part[:5], strict=True):
            assert torch.equal(whole[:, here], mine)
        assert torch.equal(found[5][number], part[5][0])


def test_a_row_does_not_depend_on_its_batch_and_repeats_are_bitwise_equal():
    rule = Rule("softplus")
    x = make(B=3, T=300, rule=rule)
    out, last = run(x, rule)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(run(x, rule), (out, last), strict=True))
    alone = x._replace(**{name: getattr(x, name)[1:2].contiguous() for name in TENSORS[:5]})
    assert torch.equal(run(alone, rule).out, out[1:2])
    saved = chunk_forward(x, rule, save=True)
    d_out = torch.randn_like(out)
    first = chunk_backward(d_out, None, x, rule, saved[0], saved[2])
    for _ in range(10):
        again = chunk_backward(d_out, None, x, rule, saved[0], saved[2])
        assert all(torch.equal(a, b) for a, b in zip(first[:7], again[:7], strict=True))


@pytest.mark.parametrize("kv", [2, 1])
def test_grouped_heads_packed_and_cut_repeat_bitwise(cases, monkeypatch, kv):
    """Gradients of shared keys and values are summed over heads, those of the gate over chunks of all sequences."""
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 2)
    rule, lengths = Rule("softplus"), [300, 0, 1, 65]
    x = cases.draw(rule, B=1, T=sum(lengths), H=4, K=64, heads=(4, kv, kv))
    state, grads = cases.normal(4, 4, 64, 64), cases.upstream(x, 4)
    chunks = Chunks.of(lengths, "cuda")
    cases.check_repeats(lambda: cases.run(x, rule, state, grads, chunks).values())


@pytest.mark.parametrize("span", [1, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["none", "bounded"])
def test_the_past_is_bitwise_independent_of_the_future(monkeypatch, gate, dtype, span):
    """Cut into spans of one chunk, too, whose summaries are made before what is before them is known."""
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", span)
    rule = Rule(gate, sigmoid=gate == "bounded")
    x = make(T=200, rule=rule, dtype=dtype)
    out = chunk_forward(x, rule)[0]
    for place in (1, 21, 64, 130):
        later = {name: getattr(x, name).clone() for name in TENSORS[:5]}
        for name, value in (("q", 9.0), ("k", -9.0), ("v", 1e4), ("decay", -1e3), ("beta", 1.0)):
            later[name][:, place:] = value
        again = chunk_forward(x._replace(**later), rule)[0]
        assert torch.equal(again[:, :place], out[:, :place])
        assert not torch.equal(again[:, place:], out[:, place:])


def test_a_sequence_may_be_cut_where_chunks_end():
    rule = Rule("softplus")
    x = make(B=1, T=300, rule=rule)
    out, last, _ = chunk_forward(x, rule)
    one, state, _ = chunk_forward(cut(x, slice(0, 128)), rule)
    two, final, _ = chunk_forward(cut(x, slice(128, 300)), rule, state=state)
    assert torch.equal(out, torch.cat([one, two], 1))
    assert torch.equal(last, final)
    one, state, _ = chunk_forward(cut(x, slice(0, 100)), rule)
    two, final, _ = chunk_forward(cut(x, slice(100, 300)), rule, state=state)
    assert distance(torch.cat([one, two], 1), out.double()) < TOLERANCE[torch.bfloat16]
    assert distance(final, last.double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_a_long_sequence_in_spans_is_as_in_one(cases, monkeypatch, packed, has_state):
    rule, lengths = Rule("softplus"), [500, 0, 40, 200] if packed else [370, 370]
    x = make(B=1 if packed else 2, T=sum(lengths) if packed else 370, rule=rule)
    state = torch.randn(len(lengths), 3, 128, 128, device="cuda") if has_state else None
    results = []
    for chunks_of_a_segment in (2, 128):
        monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", chunks_of_a_segment)
        chunks = Chunks.of(lengths, "cuda") if packed else None
        out, last, saved = chunk_forward(x, rule, state=state, chunks=chunks, save=True)
        torch.manual_seed(1)
        d_out, d_last = torch.randn_like(out), torch.randn_like(last)
        found = chunk_backward(d_out, d_last, x, rule, out, saved, chunks=chunks, want_state=has_state)
        results.append((out, last, *chunk_forward(x, rule, state=state, chunks=chunks)[:2], *found))
        assert ("matrices" in cases.saved_tensors(x, rule, saved, chunks)) == (chunks_of_a_segment == 2)
    names = ("out", "last", "out unsaved", "last unsaved", *TENSORS, "state")
    for name, one, other in zip(names, *results, strict=True):
        assert one is None or distance(one, other.double()) < 2e-3 * (5 if name == "A_log" else 1), name


@pytest.mark.parametrize("log_decay", [0.0, -20.0, -1000.0])
@pytest.mark.parametrize(("decay_per", "erase", "write"), FAMILY)
def test_the_family_stays_finite_and_right_with_strong_decay_and_none(decay_per, erase, write, log_decay):
    rule = Rule("none", sigmoid=False, erase=erase, write=write)
    x = make(T=150, H=2, rule=rule, decay_per=decay_per)
    x = x._replace(decay=torch.full_like(x.decay, log_decay))
    out, last, saved = chunk_forward(x, rule, save=True)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = chunk_backward(d_out, d_last, x, rule, out, saved)
    again = chunk_backward(d_out, d_last, x, rule, out, saved)
    wide = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    expected, final = exact(wide, rule)
    assert distance(out, expected.detach()) < 2 * TOLERANCE[torch.bfloat16]
    assert distance(last, final.detach()) < 2 * TOLERANCE[torch.bfloat16]
    assert all(torch.isfinite(part).all() for part in found if part is not None)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True) if a is not None)
    gradients = torch.autograd.grad((expected, final), wide[:3], (d_out.double(), d_last.double()))
    for name, gradient in zip(TENSORS, gradients, strict=False):
        assert distance(getattr(found, name), gradient) < 2 * TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize(("decay_per", "erase", "write"), FAMILY)
def test_the_past_of_the_family_is_bitwise_independent_of_the_future(decay_per, erase, write):
    rule = Rule("none", sigmoid=False, erase=erase, write=write)
    x = make(T=100, rule=rule, decay_per=decay_per)
    out = chunk_forward(x, rule)[0]
    for place in (1, 21, 64):
        later = {name: part.clone() for name, part in x._asdict().items() if part is not None}
        for name, part in later.items():
            part[:, place:] = {"q": 9.0, "k": -9.0, "v": 1e4, "decay": -1e3}.get(name, 1.0)
        assert torch.equal(chunk_forward(x._replace(**later), rule)[0][:, :place], out[:, :place])


EXTREME = {
    "no decay": (0.0, 0.5),
    "almost no decay": (-1e-6, 0.9),
    "even decay": (-1.0, 0.5),
    "fastest bounded": (-5.0, 0.5),
    "instant forgetting": (-1000.0, 0.5),
    "full strength": (-0.01, 1.0),
    "full strength without decay": (0.0, 1.0),
    "no strength": (-0.01, 0.0),
}


@pytest.mark.parametrize("keys", ["random", "equal", "alternating"])
@pytest.mark.parametrize("name", EXTREME)
def test_every_result_is_right_with_extreme_gates(cases, name, keys):
    """With equal keys and full strength the inverse of a chunk's triangular system is at its worst."""
    rule = Rule("none", sigmoid=False)
    x = make(T=150, H=2, rule=rule)
    decay, beta = EXTREME[name]
    x = x._replace(decay=torch.full_like(x.decay, decay), beta=torch.full_like(x.beta, beta))
    grads = cases.upstream(x)
    usual = expected = cases.differentiate(x, rule, None, grads)
    if keys != "random":
        k = x.k[:, :1].expand_as(x.k).clone()
        if keys == "alternating":
            k[:, ::2] *= -1
        x = x._replace(k=k)
        expected = cases.differentiate(x, rule, None, grads)
    found = cases.run(x, rule, None, grads)
    # With one direction for all keys a write undoes the one before it, and the answers are up to 20 times smaller. What
    # is rounded on the way to them is not, so the error is beside the answers of random keys: it is no larger then.
    for field, part in expected.items():
        floor = max(cases.rms(usual[field]), 1e-5)
        assert cases.error(found[field], part, floor) < 2 * TOLERANCE[torch.bfloat16], field
    # beside the right answer itself; where nothing is written there is none
    assert cases.error(found["out"], expected["out"], 1e-5) < TOLERANCE[torch.bfloat16] * (
        2 if keys == "random" else 8
    )


def test_some_channels_forget_at_once_and_gates_may_be_wild():
    for rule, spread in ((Rule("softplus"), 8.0), (Rule("bounded"), 8.0)):
        x = make(T=200, rule=rule)
        x = x._replace(decay=x.decay * spread)
        x.decay[..., ::10] = 1000.0
        out, _, saved = chunk_forward(x, rule, save=True)
        found = chunk_backward(torch.randn_like(out), None, x, rule, out, saved)
        expected = exact(Inputs(*(None if part is None else part.double() for part in x)), rule).out
        assert distance(out, expected) < 2 * TOLERANCE[torch.bfloat16]
        assert all(torch.isfinite(part).all() for part in found if part is not None)

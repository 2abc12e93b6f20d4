"""The delta-rule kernels in every case of decay, erase and write, interpreted, against float64 autograd."""

from __future__ import annotations

import itertools
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

pytestmark = pytest.mark.interpret
# the products of a chunk run in float16: ten bits of mantissa
TOLERANCE = 6e-3
# sums over all tokens, in which most of the gradient cancels
SUMMED = {"A_log": 2e-2, "dt_bias": 2e-2}
FAMILY = [*itertools.product(("channel", "scalar"), ("none", "scalar", "channel"), ("scalar", "channel"))]
TOKENWISE = ("q", "k", "v", "decay", "beta", "erase", "write")


def make(
    decay, rule, *, B=1, T=70, H=2, K=16, V=16, HQ=None, HK=None, HV=None, dtype=torch.float32, seed=0
) -> Inputs:
    torch.manual_seed(seed)

    def gate(*shape):
        x = torch.randn(B, T, H, *shape).to(dtype)
        return x if rule.sigmoid else x.sigmoid()

    q, k, v = (torch.randn(B, T, n or H, c).to(dtype) for n, c in ((HQ, K), (HK, K), (HV, V)))
    if not rule.norm:
        q, k = q / 4, k / 4
    x = Inputs(
        q,
        k,
        v,
        torch.randn(B, T, H, *([K] if decay == "channel" else [])).to(dtype),
        gate() if "scalar" in (rule.erase, rule.write) else None,
        erase=gate(K) if rule.erase == "channel" else None,
        write=gate(V) if rule.write == "channel" else None,
    )
    if rule.gate == "none":
        return x._replace(decay=-0.3 * x.decay.abs())
    biases = torch.randn(H * K if decay == "channel" else H) - 2
    return x._replace(A_log=torch.rand(H) * 0.6 - 0.3, dt_bias=biases)


def reference(x: Inputs, rule: Rule, state=None):
    """Compose the op from the reference ops, in the dtype of the inputs."""
    q, k = (l2norm(part) if rule.norm else part for part in (x.q, x.k))
    beta, erase, write = (
        part if part is None or not rule.sigmoid else part.sigmoid() for part in (x.beta, x.erase, x.write)
    )
    decay = x.decay
    if rule.gate != "none":
        # a gate of one channel is a gate per head
        wide = decay if decay.ndim == 4 else decay[..., None]
        if rule.gate == "bounded":
            wide = bounded_log_decay(wide, x.A_log, x.dt_bias, lower_bound=rule.lower_bound)
        else:
            wide = softplus_log_decay(wide, x.A_log, x.dt_bias)
        decay = wide if decay.ndim == 4 else wide[..., 0]
    erase = {"none": None, "scalar": beta, "channel": erase}[rule.erase]
    write = beta if rule.write == "scalar" else write
    return recurrent_delta_rule(
        q, k, x.v, log_decay=decay, erase=erase, write=write, state=state, scale=rule.scale
    )


def distance(x, y):
    return ((x.double() - y).square().mean().sqrt() / (y.square().mean().sqrt() + 1e-12)).item()


def check(x: Inputs, rule: Rule, *, with_state: bool, chunks=None, lengths=None):
    """Compare output, final state and every gradient with the reference's, document by document."""
    number = x.q.shape[0] if lengths is None else len(lengths)
    state = torch.randn(number, x.decay.shape[2], x.k.shape[3], x.v.shape[3]) if with_state else None
    out, last, saved = chunk_forward(x, rule, state=state, chunks=chunks, save=True)
    plain = chunk_forward(x, rule, state=state, chunks=chunks)
    assert torch.equal(plain[0], out)
    assert torch.equal(plain[1], last)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last) if with_state else None
    found = chunk_backward(d_out, d_last, x, rule, out, saved, chunks=chunks, want_state=with_state)

    exact = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    start = state.double().requires_grad_() if with_state else None
    if lengths is None:
        expected, final = reference(exact, rule, start)
    else:
        parts, first = [], 0
        for row, length in enumerate(lengths):
            here = {
                name: getattr(exact, name)[:, first : first + length]
                for name in TOKENWISE
                if getattr(exact, name) is not None
            }
            own = None if start is None else start[row : row + 1]
            parts.append(reference(exact._replace(**here), rule, own))
            first += length
        expected = torch.cat([part.out for part in parts], 1)
        final = torch.cat([part.state for part in parts])
    assert distance(out, expected.detach()) < TOLERANCE
    assert distance(last, final.detach()) < TOLERANCE
    loss = (expected * d_out.double()).sum()
    if with_state:
        loss = loss + (final * d_last.double()).sum()
    leaves = {name: part for name, part in exact._asdict().items() if part is not None}
    if with_state:
        leaves["state"] = start
    assert {name for name, part in found._asdict().items() if part is not None} == set(leaves)
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        mine = getattr(found, name)
        assert mine.shape == gradient.shape, name
        # of one token without a past, some are zero
        nothing = gradient.abs().max() < 1e-9 and mine.abs().max() < 1e-6
        assert distance(mine, gradient) < SUMMED.get(name, TOLERANCE) or nothing, name


SETTINGS = {
    "given gates": (dict(gate="none", sigmoid=False), {}, True),
    "bounded, fewer key and value heads": (dict(gate="bounded"), {"H": 4, "HK": 2, "HV": 1, "T": 65}, True),
    "softplus, fewer values": (dict(gate="softplus", scale=0.5), {"K": 64, "V": 20, "T": 66}, False),
    "not normalised, one token": (dict(gate="bounded", norm=False, scale=0.1), {"T": 1, "V": 32}, True),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_output_state_and_every_gradient_match_the_reference(decay, erase, write, settings):
    words, sizes, with_state = SETTINGS[settings]
    rule = Rule(**words, erase=erase, write=write)
    check(make(decay, rule, **sizes), rule, with_state=with_state)


@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_packed_documents_match_the_reference(decay, erase, write):
    rule, lengths = Rule("softplus", erase=erase, write=write), [0, 1, 66, 3]
    x = make(decay, rule, T=sum(lengths), H=1)
    check(x, rule, with_state=True, chunks=Chunks.of(lengths, "cpu"), lengths=lengths)


@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_long_sequences_in_spans_match_the_reference(monkeypatch, decay, erase, write):
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 1)
    rule = Rule("bounded", erase=erase, write=write)
    check(make(decay, rule, T=130, H=1), rule, with_state=True)


# a whole power of two: with float32 inputs the backward pass of channel decay still rounds its logarithms to float16
STRONG = -29 * math.log(2)


@pytest.mark.parametrize("log_decay", [STRONG, 0.0, "both", -1000.0])
@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_strong_decay_and_none_match_the_reference(decay, erase, write, log_decay):
    rule = Rule("none", sigmoid=False, erase=erase, write=write)
    x = make(decay, rule, T=68, H=1)
    given = torch.zeros_like(x.decay)
    if log_decay == "both":
        given[:, ::5] = STRONG
    else:
        given += log_decay
    x = x._replace(decay=given)
    out, last, saved = chunk_forward(x, rule, save=True)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = chunk_backward(d_out, d_last, x, rule, out, saved)
    exact = Inputs(*(None if part is None else part.double().requires_grad_() for part in x))
    expected, final = reference(exact, rule)
    assert distance(out, expected.detach()) < TOLERANCE
    assert distance(last, final.detach()) < TOLERANCE
    leaves = {name: part for name, part in exact._asdict().items() if part is not None}
    loss = (expected * d_out.double()).sum() + (final * d_last.double()).sum()
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        mine = getattr(found, name)
        assert torch.isfinite(mine).all(), name
        # where all is forgotten at once nothing depends on how fast
        forgotten = name in ("decay", "erase") or (name == "beta" and erase == "scalar" != write)
        small = forgotten and gradient.abs().max() < 1e-6 and mine.abs().max() < 1e-3
        assert distance(mine, gradient) < TOLERANCE or small, name


@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_the_past_does_not_depend_on_the_future(decay, erase, write):
    rule = Rule("none", sigmoid=False, erase=erase, write=write)
    x = make(decay, rule, T=40, H=1)
    later = {name: getattr(x, name).clone() for name in TOKENWISE if getattr(x, name) is not None}
    for name, part in later.items():
        part[:, 21:] = {"q": 9.0, "k": -9.0, "v": 1e4, "decay": -1e3}.get(name, 1.0)
    assert torch.equal(chunk_forward(x._replace(**later), rule)[0][:, :21], chunk_forward(x, rule)[0][:, :21])


WRONG = {
    "no erase tensor": ({"erase": "channel"}, {}, "erase must be"),
    "no write tensor": ({"write": "channel"}, {}, "write must be"),
    "no beta": ({}, {"beta": None}, "beta must be"),
    "a tensor that nothing reads": ({}, {"write": torch.zeros(1, 3, 2, 16)}, "leave it out"),
    "another word": ({"erase": "key"}, {}, "must be one of none, scalar, channel"),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_do_not_fit_the_rule_are_refused(name):
    words, change, message = WRONG[name]
    x = make("channel", Rule(), T=3)._replace(**change)
    with pytest.raises(ValueError, match=message):
        chunk_forward(x, Rule(**words))

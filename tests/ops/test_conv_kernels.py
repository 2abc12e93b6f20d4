"""The Triton convolution kernels, interpreted on the CPU, against float64 autograd of the reference."""

from __future__ import annotations

import os

import pytest
import torch

from gendistill.ops.conv import causal_conv as op
from gendistill.ops.reference.conv import causal_conv
from gendistill.ops.types import Segments

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill_kernels.conv.causal import conv_backward, conv_forward
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.runtime.lookup import Config, forced

pytestmark = pytest.mark.interpret
EXACT = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fill new tensors with NaN, so that nothing is right that was not written."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)


def make(B=1, T=65, C=20, W=4, *, bias=True, state=True, N=None, dtype=torch.float32):
    torch.manual_seed(B + T + C + W)
    inputs = {"x": torch.randn(B, T, C).to(dtype), "weight": torch.randn(C, W)}
    inputs["bias"] = torch.randn(C) if bias else None
    inputs["state"] = torch.randn(N or B, C, W - 1).to(dtype) if state else None
    return inputs


def distance(x, y):
    return ((x.double() - y).square().mean().sqrt() / (y.square().mean().sqrt() + 1e-12)).item()


def check(inputs, activation, *, grad_state=True, lengths=None):
    """Compare outputs and every gradient with float64 autograd."""
    tiles = None if lengths is None else Tiles.of(lengths, "cpu")
    out, last = conv_forward(**inputs, activation=activation, tiles=tiles)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last) if grad_state else None
    found = conv_backward(d_out, d_last, **inputs, activation=activation, tiles=tiles)

    exact = {name: None if part is None else part.double().requires_grad_() for name, part in inputs.items()}
    segments = None if lengths is None else Segments(lengths)
    expected, final = causal_conv(**exact, activation=activation, segments=segments)
    limit = EXACT[out.dtype]
    assert out.dtype == last.dtype == inputs["x"].dtype
    assert distance(out, expected.detach()) < limit
    assert torch.equal(last.double(), final.detach())
    loss = (expected * d_out.double()).sum()
    if d_last is not None:
        loss = loss + (final * d_last.double()).sum()
    leaves = {name: part for name, part in exact.items() if part is not None}
    for name, gradient in zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True):
        assert getattr(found, name).dtype == inputs[name].dtype
        assert distance(getattr(found, name), gradient) < limit, name
    assert all(part is None for name, part in found._asdict().items() if name not in leaves)


CASES = {
    "one token": ("silu", {"T": 1}),
    "two tokens": ("identity", {"T": 2, "B": 2}),
    "as many tokens as the state": ("silu", {"T": 3}),
    "one tile less a token": ("silu", {"T": 63, "W": 2}),
    "one tile": ("identity", {"T": 64, "W": 3, "bias": False}),
    "one tile and a token": ("silu", {"T": 65, "B": 2}),
    "no state": ("silu", {"T": 65, "state": False, "bias": False}),
    "two taps": ("identity", {"T": 65, "W": 2}),
    "two blocks of channels": ("silu", {"T": 5, "C": 150}),
    "one channel": ("identity", {"T": 7, "C": 1}),
    "sixteen bits": ("silu", {"T": 66, "dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("name", CASES)
def test_output_state_and_every_gradient_match_the_reference(name):
    activation, sizes = CASES[name]
    inputs = make(**sizes)
    check(inputs, activation, grad_state=inputs["state"] is not None)


def test_state_and_its_gradient_need_not_come_together():
    check(make(T=2, state=False), "silu", grad_state=True)
    check(make(T=2), "identity", grad_state=False)


def test_no_token_leaves_the_state_alone():
    inputs = make(B=2, T=0)
    out, last = conv_forward(**inputs)
    assert out.shape == (2, 0, 20)
    assert torch.equal(last, inputs["state"])
    d_last = torch.randn_like(last)
    found = conv_backward(torch.randn_like(out), d_last, **inputs)
    assert torch.equal(found.state, d_last)
    assert not found.weight.any()
    assert not found.bias.any()


def test_programs_may_take_several_tiles():
    with forced("conv_backward", Config(256, 2, programs=2)):
        check(make(T=130, C=4), "silu")


def test_packed_documents_match_the_reference():
    check(make(T=70, N=5), "silu", lengths=[0, 1, 66, 0, 3])
    check(make(T=5, N=3, W=3, state=False), "identity", lengths=[2, 0, 3])


def test_packed_documents_are_as_if_alone():
    lengths = [0, 1, 66, 0, 3]
    inputs = make(T=sum(lengths), N=len(lengths))
    shared = {"activation": "silu", "bias": inputs["bias"]}
    tiles = Tiles.of(lengths, "cpu")
    out, last = conv_forward(**inputs, activation="silu", tiles=tiles)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = conv_backward(d_out, d_last, **inputs, activation="silu", tiles=tiles)
    d_weight, d_bias, first = 0.0, 0.0, 0
    for number, length in enumerate(lengths):
        here, one = slice(first, first + length), slice(number, number + 1)
        first += length
        alone = {"x": inputs["x"][:, here], "weight": inputs["weight"], "state": inputs["state"][one]}
        single, final = conv_forward(**alone, **shared)
        part = conv_backward(d_out[:, here], d_last[one], **alone, **shared)
        assert torch.equal(out[:, here], single)
        assert torch.equal(last[one], final)
        assert torch.equal(found.x[:, here], part.x)
        assert torch.equal(found.state[one], part.state)
        d_weight, d_bias = d_weight + part.weight, d_bias + part.bias
    torch.testing.assert_close(found.weight, d_weight)
    torch.testing.assert_close(found.bias, d_bias)


@pytest.mark.parametrize("split", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_may_be_cut_anywhere(split, dtype):
    inputs = make(T=66, dtype=dtype)
    out, last = conv_forward(**inputs, activation="silu")
    one, state = conv_forward(**{**inputs, "x": inputs["x"][:, :split]}, activation="silu")
    two, final = conv_forward(**{**inputs, "x": inputs["x"][:, split:], "state": state}, activation="silu")
    assert torch.equal(out, torch.cat([one, two], 1))
    assert torch.equal(last, final)


def test_tokens_of_a_wider_tensor_need_no_copy():
    inputs = make(B=2, T=66)
    d_out, d_last = torch.randn(2, 66, 20), torch.randn(2, 20, 3)
    wide, wide_grad = (torch.full((2, *sizes), float("nan")) for sizes in ((68, 31), (70, 24)))
    wide[:, 1:67, 4:24], wide_grad[:, 1:67, 4:24] = inputs["x"], d_out
    views = {**inputs, "x": wide[:, 1:67, 4:24]}
    for apart, together in zip(conv_forward(**views), conv_forward(**inputs), strict=True):
        assert torch.equal(apart, together)
    found = conv_backward(wide_grad[:, 1:67, 4:24], d_last, **views)
    for apart, together in zip(found, conv_backward(d_out, d_last, **inputs), strict=True):
        assert torch.equal(apart, together)


def test_the_op_takes_tokens_of_a_wider_tensor_and_differentiates_them():
    inputs = make(B=2, T=40, C=12)
    wide = torch.randn(2, 40, 30)
    found = {}
    for impl in ("triton", "reference"):
        x = wide.clone().requires_grad_()
        weight = inputs["weight"].clone().requires_grad_()
        out, state = op(
            x[..., 7:19], weight, inputs["bias"], activation="silu", state=inputs["state"], impl=impl
        )
        (out.square().sum() + state.sum()).backward()
        found[impl] = [out.detach(), state.detach(), x.grad, weight.grad]
    for ours, right in zip(found["triton"], found["reference"], strict=True):
        assert distance(ours, right.double()) < EXACT[torch.float32]


def test_the_past_does_not_depend_on_the_future():
    inputs = make(T=66)
    out, _ = conv_forward(**inputs)
    later = inputs["x"].clone()
    later[:, 21:] = 1e4
    assert torch.equal(conv_forward(**{**inputs, "x": later})[0][:, :21], out[:, :21])


def test_refusals_name_the_rule():
    inputs = make(T=4)
    with pytest.raises(ValueError, match="side by side"):
        conv_forward(**{**inputs, "x": torch.zeros(1, 20, 4).transpose(1, 2)})
    with pytest.raises(ValueError, match="state must have shape"):
        conv_forward(**{**inputs, "state": torch.zeros(2, 20, 3)})
    with pytest.raises(ValueError, match="one row"):
        conv_forward(**make(B=2, T=4, state=False), tiles=Tiles.of([4], "cpu"))
    with pytest.raises(ValueError, match="identity or silu"):
        conv_forward(**inputs, activation="gelu")

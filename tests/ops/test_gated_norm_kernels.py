"""The Triton gated norm, interpreted on the CPU, against float64 autograd of torch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill_kernels.norm.gated import gated_norm_backward, gated_norm_forward
from gendistill_kernels.runtime.lookup import Config, forced

pytestmark = pytest.mark.interpret
EXACT = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fill new tensors with NaN, so that nothing is right that was not written."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)


def make(T=7, H=3, V=20, *, norm=True, gate=True, dtype=torch.float32):
    torch.manual_seed(T + H + V)
    o = torch.randn(2, T, H, V).to(dtype)
    weight = torch.rand(V) + 0.5 if norm else None
    return o, weight, torch.randn(2, T, H * V).to(dtype) if gate else None


def reference(o, weight, gate, activation, eps):
    if weight is not None:
        o = F.rms_norm(o, weight.shape, weight, eps)
    out = o.flatten(-2)
    return out if gate is None else out * ACTIVATIONS[activation](gate)


def distance(x, y):
    return ((x.double() - y).square().mean().sqrt() / (y.square().mean().sqrt() + 1e-12)).item()


def check(inputs, activation, eps=1e-6):
    """Compare the output and every gradient with float64 autograd."""
    out = gated_norm_forward(*inputs, activation=activation, eps=eps)
    d_out = torch.randn_like(out)
    found = gated_norm_backward(d_out, *inputs, activation=activation, eps=eps)
    exact = [None if part is None else part.double().requires_grad_() for part in inputs]
    expected = reference(*exact, activation, eps)
    limit = EXACT[out.dtype]
    assert out.dtype == inputs[0].dtype
    assert out.shape == expected.shape
    assert distance(out, expected.detach()) < limit
    leaves = {name: part for name, part in zip(found._fields, exact, strict=True) if part is not None}
    gradients = torch.autograd.grad((expected * d_out.double()).sum(), leaves.values())
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert getattr(found, name).shape == leaf.shape
        assert distance(getattr(found, name), gradient) < limit, name
    assert all(part is None for name, part in found._asdict().items() if name not in leaves)


CASES = {
    "silu": ("silu", {}),
    "sigmoid": ("sigmoid", {"T": 65, "H": 2}),
    "no gate": ("none", {"gate": False}),
    "no norm": ("silu", {"norm": False, "V": 33}),
    "neither": ("none", {"norm": False, "gate": False}),
    "one row": ("silu", {"T": 1, "H": 1, "V": 128}),
    "three channels": ("sigmoid", {"T": 3, "V": 3}),
    "wide heads": ("silu", {"T": 5, "V": 256}),
    "sixteen bits": ("silu", {"T": 63, "V": 64, "dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_match_torch(name):
    activation, sizes = CASES[name]
    check(make(**sizes), activation)


def test_programs_may_take_several_tiles():
    with forced("norm_backward", Config(64, 4, programs=2)):
        check(make(), "silu")


def test_small_rows_are_governed_by_epsilon():
    o, weight, gate = make()
    check((o * 1e-4, weight, gate), "silu", eps=1e-5)
    check((o * 0, weight, gate), "silu")


def test_strided_inputs_are_read_as_they_are():
    o, weight, gate = make()
    views = (
        o.transpose(1, 2).contiguous().transpose(1, 2),
        weight,
        torch.cat([gate, gate], -1)[..., : gate.shape[-1]],
    )
    d_out = torch.randn_like(gate)
    assert torch.equal(gated_norm_forward(*views), gated_norm_forward(o, weight, gate))
    for apart, together in zip(
        gated_norm_backward(d_out, *views), gated_norm_backward(d_out, o, weight, gate), strict=True
    ):
        assert torch.equal(apart, together)


def test_rows_are_independent():
    o, weight, gate = make(T=65, H=2)
    out = gated_norm_forward(o, weight, gate)
    assert torch.equal(out[:, 40:41], gated_norm_forward(o[:, 40:41], weight, gate[:, 40:41]))


def test_nothing_in_nothing_out():
    o, weight, gate = make(T=0)
    out = gated_norm_forward(o, weight, gate)
    found = gated_norm_backward(out, o, weight, gate)
    assert out.shape == gate.shape
    assert not found.weight.any()


def test_refusals_name_the_rule():
    o, weight, gate = make()
    with pytest.raises(ValueError, match="gate belongs"):
        gated_norm_forward(o, weight, None)
    with pytest.raises(ValueError, match="one size"):
        gated_norm_forward(o, weight, gate[..., 1:])

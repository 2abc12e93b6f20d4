"""The kernels of a layer around the chunked rule, and its decoding in one launch, on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gendistill.ops import (
    Segments,
    bounded_log_decay,
    causal_conv,
    gated_rms_norm,
    l2norm,
)
from gendistill.ops.reference.delta_rule import recurrent_delta_rule
from gendistill.ops.select import Impl

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

from gendistill_kernels.delta.decode import decode_step
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Rule

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
# of one rounding; float16 has three bits more
ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_convolution_matches_float64(cases, packed, activation, dtype):
    torch.manual_seed(0)
    lengths = [0, 1, 130, 2, 67] if packed else None
    segments = Segments(lengths, device="cuda") if packed else None
    shape = (1, 200, 320) if packed else (2, 200, 320)
    x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(320, 4, device="cuda"), torch.randn(320, device="cuda"))
    state = torch.randn(5 if packed else 2, 320, 3, device="cuda", dtype=dtype)
    leaves = [part.requires_grad_() for part in (x, weight, bias, state)]
    settings = {"activation": activation, "segments": segments}
    out, last = causal_conv(x, weight, bias, state=state, impl=Impl.TRITON, **settings)
    d_out, d_last = torch.randn_like(out), torch.randn_like(last)
    found = torch.autograd.grad((out, last), leaves, (d_out, d_last))
    wide = [part.detach().double().requires_grad_() for part in leaves]
    expected, end = causal_conv(*wide[:3], state=wide[3], **settings)
    gradients = torch.autograd.grad((expected, end), wide, (d_out.double(), d_last.double()))
    assert cases.error(out, expected.detach()) < ROUNDED[dtype]
    assert torch.equal(last.double(), end.detach())
    for mine, theirs in zip(found, gradients, strict=True):
        assert cases.error(mine, theirs) < ROUNDED[dtype]


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("activation", ["silu", "sigmoid", "none"])
@pytest.mark.parametrize("normed", [False, True])
def test_gated_norm_matches_float64(cases, activation, normed, dtype):
    torch.manual_seed(0)
    out = torch.randn(2, 300, 9, 64, device="cuda", dtype=dtype)
    weight = torch.randn(64, device="cuda") if normed else None
    gate = None
    if activation != "none":
        gate = torch.randn(2, 300, 576, device="cuda", dtype=dtype)
    leaves = [None if part is None else part.requires_grad_() for part in (out, weight, gate)]
    found = gated_rms_norm(*leaves, activation=activation, impl=Impl.TRITON)
    wide = [None if part is None else part.detach().double().requires_grad_() for part in leaves]
    expected = gated_rms_norm(*wide, activation=activation)
    assert cases.error(found, expected.detach()) < ROUNDED[dtype]
    d_out = torch.randn_like(found)
    mine = torch.autograd.grad(found, [part for part in leaves if part is not None], d_out)
    theirs = torch.autograd.grad(expected, [part for part in wide if part is not None], d_out.double())
    for one, other in zip(mine, theirs, strict=True):
        assert cases.error(one, other) < ROUNDED[dtype]


@pytest.mark.parametrize("packed", [False, True])
def test_convolution_and_norm_repeat_bitwise(cases, packed):
    """Gradients of weights are summed over programs."""
    torch.manual_seed(0)
    segments = Segments([0, 1, 130, 2, 67], device="cuda") if packed else None
    shape = (1, 200) if packed else (2, 200)
    leaves = [cases.normal(*shape, 576, dtype=torch.bfloat16), cases.normal(576, 4), cases.normal(576)]
    leaves += [cases.normal(5 if packed else 2, 576, 3, dtype=torch.bfloat16)]
    leaves += [cases.normal(64), cases.normal(*shape, 576, dtype=torch.bfloat16)]
    x, weight, bias, state, gain, gate = (part.requires_grad_() for part in leaves)
    d_out, d_last = cases.normal(*shape, 576, dtype=torch.bfloat16), torch.randn_like(state)

    def step():
        mixed, last = causal_conv(
            x, weight, bias, state=state, activation="silu", segments=segments, impl=Impl.TRITON
        )
        out = gated_rms_norm(mixed.unflatten(-1, (9, 64)), gain, gate, impl=Impl.TRITON)
        return [out.detach(), last.detach(), *torch.autograd.grad((out, last), leaves, (d_out, d_last))]

    cases.check_repeats(step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_past_of_the_convolution_is_bitwise_independent_of_the_future(cases, dtype):
    torch.manual_seed(0)
    x, weight, bias = cases.normal(2, 200, 320, dtype=dtype), cases.normal(320, 4), cases.normal(320)
    out, _ = causal_conv(x, weight, bias, activation="silu", impl=Impl.TRITON)
    for place in (1, 3, 64, 130):
        later = x.clone()
        later[:, place:] = 1e4
        again, _ = causal_conv(later, weight, bias, activation="silu", impl=Impl.TRITON)
        assert torch.equal(again[:, :place], out[:, :place])
        assert not torch.equal(again[:, place], out[:, place])


class Decoding:
    """Hold the inputs of a step, and the states before it; what a layer keeps in float32 is float32."""

    def __init__(self, H, kv, K, V, T, dtype):
        torch.manual_seed(0)
        N, C = 3, (H + kv) * K + kv * V

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, device="cuda").to(dtype)

        self.sizes, self.heads = (H * K, kv * K, kv * V), Heads(H, kv, kv)
        self.qkv, self.decay, self.beta = normal(N, T, C), normal(N, T, H, K), normal(N, T, H)
        self.memory, self.past = normal(N, H, K, V, dtype=torch.float32), normal(N, C, 3)
        self.weight, self.bias = normal(C, 4), normal(C)
        self.A_log = normal(H, dtype=torch.float32) * 0.3
        self.dt_bias = normal(H * K, dtype=torch.float32) - 2
        self.gain, self.gate = normal(V), normal(N, T, H * V)

    def step(self):
        """Take the step from copies of the states; output and states."""
        memory, past = self.memory.clone(), self.past.clone()
        out = decode_step(
            self.qkv,
            self.decay,
            self.beta,
            memory,
            rule=Rule("bounded"),
            heads=self.heads,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            convolution=Convolution(self.weight, past, self.bias, "silu"),
            finish=Finish(self.gain, 1e-6, self.gate, "silu"),
        )
        return out, memory, past

    def exact(self):
        """Take it in float64."""
        x = {name: part.double() for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        mixed, past = causal_conv(x["qkv"], x["weight"], x["bias"], activation="silu", state=x["past"])
        q, k, v = (
            part.unflatten(-1, (number, -1))
            for part, number in zip(mixed.split(self.sizes, -1), self.heads, strict=True)
        )
        log_decay = bounded_log_decay(x["decay"], x["A_log"], x["dt_bias"], lower_bound=-5.0)
        strength = x["beta"].sigmoid()
        out, memory = recurrent_delta_rule(
            l2norm(q), l2norm(k), v, log_decay=log_decay, erase=strength, write=strength, state=x["memory"]
        )
        out = F.rms_norm(out, (v.shape[-1],), x["gain"], 1e-6) * F.silu(x["gate"]).view_as(out)
        return out, memory, past


SHAPES = [(16, 16, 128, 128), (9, 3, 64, 64), (14, 2, 64, 64), (9, 3, 128, 128), (2, 1, 256, 256)]
STEPS = [(*shape, T, torch.float32) for shape in SHAPES for T in (1, 4)]
# grouped heads as Qwen3 has them, and values wider than keys
STEPS += [
    (*shape, T, dtype)
    for shape in ((16, 8, 128, 128), (4, 2, 64, 128))
    for T in (1, 4, 8)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("H", "kv", "K", "V", "T", "dtype"), STEPS)
def test_decoding_matches_float64(cases, H, kv, K, V, T, dtype):
    layer = Decoding(H, kv, K, V, T, dtype)
    (out, memory, past), (expected, final, end) = layer.step(), layer.exact()
    assert torch.equal(past.double(), end)
    # inside all is float32: of the inputs' dtype only the output is rounded
    assert cases.error(memory, final) < 2e-6
    assert cases.error(out, expected) < (2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("T", [1, 4])
def test_decoding_repeats_bitwise(cases, T):
    cases.check_repeats(Decoding(16, 8, 128, 128, T, torch.bfloat16).step)

"""The kernels' ops as torch sees them, and the KDA layer that uses them, interpreted, beside the reference."""

from __future__ import annotations

import contextlib
import os
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gendistill.mixers import KDA
from gendistill.mixers.base import MixerState, SequenceInfo
from gendistill.ops import Segments, chunk_kda, decode_delta_rule

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill.ops.contracts import conv, delta_rule, norm
from gendistill.ops.eager import is_eager
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta import chunk
from gendistill_kernels.delta.layout import Chunks

pytestmark = pytest.mark.interpret
# the products of a chunk run in float16
TOLERANCE = 5e-3
LAYERS = {
    "plain": {"num_heads": 2},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "conv_activation": "silu", "output_norm": True},
    "softplus": {"num_heads": 2, "gate": "softplus", "decay_init": "mamba", "output_gate": "sigmoid"},
    "bare": {"num_heads": 2, "conv_size": 0, "output_gate": "none", "rope": True},
}


def pair(name):
    torch.manual_seed(0)
    settings = {"head_dim": 16, **LAYERS[name]}
    layers = [KDA(32, impl=impl, **settings) for impl in ("reference", "triton")]
    for parameter in layers[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


def angles(length):
    turned = torch.arange(length)[:, None] * torch.logspace(0, -2, 8).repeat(2)
    return turned.cos()[None], turned.sin()[None]


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("padded", [False, True])
def test_layer_and_every_gradient_match_the_reference(name, padded):
    x = torch.randn(2, 20, 32)
    sequences = None
    if padded:
        mask = torch.ones(2, 20)
        mask[1, :7] = 0
        sequences = SequenceInfo.from_mask(mask)
    results = []
    for layer in pair(name):
        given = x.clone().requires_grad_()
        out, state = layer(given, sequences=sequences, position_embeddings=angles(20))
        out.square().sum().backward()
        gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
        results.append((out.detach(), state.recurrent.detach(), given.grad, gradients))
    for found, expected in zip(results[1][:3], results[0][:3], strict=True):
        assert distance(found, expected) < TOLERANCE
    for key, expected in results[0][3].items():
        assert distance(results[1][3][key], expected) < 2e-2, key


@pytest.mark.parametrize("name", ["plain", "grouped", "softplus", "bare"])
def test_layer_decodes_as_the_reference(name):
    x = torch.randn(2, 12, 32)
    cos, sin = angles(12)
    results = []
    with torch.no_grad():
        for layer in pair(name):
            parts, state = [], None
            for start, end in ((0, 8), (8, 9), (9, 12)):
                before = state
                kept = None if state is None else state.recurrent.clone()
                here = (cos[:, start:end], sin[:, start:end])
                out, state = layer(x[:, start:end], state=state, position_embeddings=here)
                parts.append(out)
                if before is not None:
                    assert torch.equal(before.recurrent, kept), "a state that is not owned changed"
            results.append((torch.cat(parts, 1), state.recurrent))
    for found, expected in zip(results[1], results[0], strict=True):
        assert distance(found, expected) < TOLERANCE


def test_a_cache_s_state_changes_in_place():
    layer = pair("plain")[1]
    with torch.no_grad():
        _, state = layer(torch.randn(1, 5, 32))
        owned = state._replace(owned=True)
        _, after = layer(torch.randn(1, 1, 32), state=owned)
    assert after.recurrent is owned.recurrent
    assert after.conv is owned.conv


def test_a_second_backward_pass_gives_the_same_gradient():
    layer = pair("plain")[1]
    x = torch.randn(1, 9, 32, requires_grad=True)
    loss = layer(x)[0].square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)


def inputs(H=2, K=16, T=9):
    torch.manual_seed(0)
    q, k, v, decay = (torch.randn(1, T, H, K, requires_grad=True) for _ in range(4))
    beta = torch.randn(1, T, H, requires_grad=True)
    a_log, dt_bias = torch.zeros(H, requires_grad=True), torch.zeros(H * K, requires_grad=True)
    return q, k, v, decay, beta, a_log, dt_bias


def call_kda(parts, **settings):
    q, k, v, decay, beta, a_log, dt_bias = parts
    gates = {"gate": "bounded", "a_log": a_log, "dt_bias": dt_bias}
    return chunk_kda(q, k, v, decay, beta, **gates, **settings, impl="triton")


class Watch(TorchDispatchMode):
    """Write down which of our ops torch sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "gendistill":
            self.seen.append(function._opname)
        return function(*arguments, **(keywords or {}))


def test_a_dispatch_mode_sees_the_ops_and_gets_the_same_result():
    parts = inputs()
    results = []
    for mode in (contextlib.nullcontext(), Watch()):
        with mode:
            out, state = call_kda(parts)
            loss = out.square().sum() + state.square().sum()
            results.append((out, state, *torch.autograd.grad(loss, parts)))
    assert mode.seen == ["delta_rule_forward", "delta_rule_backward_scan", "delta_rule_backward_local"]
    for eager, registered in zip(*results, strict=True):
        assert torch.equal(eager, registered)


def test_a_fake_tensor_never_reaches_a_kernel():
    with FakeTensorMode() as mode:
        parts = [mode.from_tensor(part) for part in inputs()]
        heads = [mode.from_tensor(torch.randn(1, 1, 32)) for _ in range(3)]
        decay, beta, state = (
            mode.from_tensor(torch.randn(1, *sizes)) for sizes in ((1, 2, 16), (1, 2), (2, 16, 16))
        )
    assert isinstance(call_kda(parts).out, FakeTensor)
    gates = {"gate": "bounded", "a_log": parts[5], "dt_bias": parts[6]}
    with torch.no_grad():
        out = decode_delta_rule(*heads, decay, beta, state, **gates, impl="triton")
    assert isinstance(out, FakeTensor)
    real = torch.zeros(1)
    assert is_eager((real, [real], "a"))
    assert not is_eager((real, [real, heads[0]], "a"))


def test_a_layer_decodes_from_states_however_they_lie_in_memory():
    layer = KDA(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, impl="triton")
    layer.reset_parameters(torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    x, state = torch.randn(2, 1, 32), MixerState(torch.randn(2, 128, 3), torch.randn(2, 4, 16, 16))
    turned = MixerState(*(part.mT.contiguous().mT for part in state[:2]))
    with torch.no_grad():
        (expected, after), (found, other) = (layer(x, state=each) for each in (state, turned))
        one = MixerState(state.conv[:1], state.recurrent[:1])
        with pytest.raises(ValueError, match=r"state must be \[2, 4, 16, 16\], got \[1, 4, 16, 16\]"):
            layer(x, state=one)
    assert torch.equal(found, expected)
    assert torch.equal(other.recurrent, after.recurrent)
    assert torch.equal(other.conv, after.conv)


@pytest.mark.parametrize("name", ["plain", "grouped", "softplus"])
@pytest.mark.parametrize("length", [1, 3])
def test_a_layer_leaves_rows_without_a_sequence_alone(name, length):
    """Whichever implementation it has, where it decodes: the reference, too, if it is told of such rows."""
    lives, given = torch.tensor([True, False, True]), torch.randn(3, length, 32)
    given[1] = torch.nan
    for layer in pair(name):
        with torch.no_grad():
            _, begun = layer(torch.randn(3, 5, 32))
            expected, after = layer(given[lives], state=MixerState(*(part[lives] for part in begun[:2])))
            begun.recurrent[1, 0] = torch.nan
            told = begun._replace(owned=True, lives=lives)
            kept = [part.clone() for part in begun[:2]]
            found, state = layer(given, state=told)
        assert state.lives is None
        assert not found[1].any()
        assert distance(found[lives], expected) < TOLERANCE
        for part, one, other in zip(state[:2], after[:2], kept, strict=True):
            assert distance(part[lives], one) < TOLERANCE
            torch.testing.assert_close(part[1], other[1], rtol=0, atol=0, equal_nan=True)


def test_decoding_with_gradients_is_refused_whichever_argument_has_one():
    heads = [torch.randn(1, 1, 32) for _ in range(3)]
    gates = {"gate": "bounded", "a_log": torch.zeros(2), "dt_bias": torch.zeros(32)}

    def call(qkv):
        given = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2), torch.zeros(1, 2, 16, 16)
        return decode_delta_rule(*qkv, *given, **gates, impl="triton")

    assert not call(heads).requires_grad
    heads[2].requires_grad_()
    # what torch says of a registered op that has no derivative
    with pytest.raises(RuntimeError, match="autograd"):
        call(heads).sum().backward()


@pytest.mark.parametrize("wanted", ["out", "state"])
def test_an_output_without_a_gradient_counts_as_one_of_zeros(wanted):
    parts = inputs()
    result = call_kda(parts, state=torch.randn(1, 2, 16, 16, requires_grad=True))
    other = result.state if wanted == "out" else result.out
    loss = getattr(result, wanted).square().sum()
    found = torch.autograd.grad(loss, parts, retain_graph=True)
    expected = torch.autograd.grad(loss + 0 * other.sum(), parts)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("registered", [False, True])
def test_a_derivative_of_the_gradient_is_refused(registered):
    """Also where the forward pass went through the registered op and the backward pass sees no mode any more."""
    parts = inputs()
    with Watch() if registered else contextlib.nullcontext():
        out = call_kda(parts).out
    first = torch.autograd.grad(out.square().sum(), parts[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"differentiate twice|no autograd formula"):
        first.sum().backward()


def test_compiled_ops_take_any_number_of_tokens():
    """Without compiling anew: what the ops hand on is sized by symbols."""

    def run(*parts):
        return call_kda(parts).out

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, dynamic=True, fullgraph=True, backend=counter)
    # not a single chunk, which is a case of its own: of the numbers one and zero the compiler makes constants
    counts = []
    for tokens in (70, 130, 200):
        parts = inputs(T=tokens)
        results = []
        for call in (run, compiled):
            out = call(*parts)
            results.append((out, *torch.autograd.grad(out.square().sum(), parts)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("registered", [False, True])
def test_half_of_what_was_saved_is_freed_on_the_way(monkeypatch, registered):
    kept, alive = [], []
    scan, local = chunk._backward_scan, chunk._backward_local

    def watched_scan(grad_out, grad_state, x, plan, early, late, chunks, **settings):
        kept.append(weakref.ref(early))
        return scan(grad_out, grad_state, x, plan, early, late, chunks, **settings)

    def watched_local(*arguments):
        alive.extend(part() is not None for part in kept)
        return local(*arguments)

    monkeypatch.setattr(chunk, "_backward_scan", watched_scan)
    monkeypatch.setattr(chunk, "_backward_local", watched_local)
    with Watch() if registered else contextlib.nullcontext():
        call_kda(inputs()).out.sum().backward()
    assert alive == [False]


def test_a_state_that_decoding_changes_is_known_to_have_changed():
    N, H, K = 1, 2, 16
    state, window = torch.randn(N, H, K, K), torch.randn(N, 3 * H * K, 3)
    saved = (
        (state * torch.ones((), requires_grad=True)).sum(),
        (window * torch.ones((), requires_grad=True)).sum(),
    )
    with torch.no_grad():
        decode_delta_rule(
            *(*[torch.randn(N, 1, H * K)] * 3, torch.randn(N, 1, H, K), torch.randn(N, 1, H), state),
            **{"gate": "bounded", "a_log": torch.zeros(H), "dt_bias": torch.zeros(H * K)},
            conv_weight=[torch.randn(H * K, 4)] * 3,
            conv_state=window,
            conv_activation="silu",
            impl="triton",
        )
    for part in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            part.backward()


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("packed", [False, True])
def test_ops_keep_torch_s_contracts(packed):
    lengths = [4, 0, 5]
    tables = [None] * 5
    tiles = [None] * 3
    number = 1
    if packed:
        segments = Segments(lengths)
        tables = list(segments.table(Chunks.of))
        tiles = list(segments.table(Tiles.of))
        number = 3
    state = torch.randn(number, 2, 16, 16, requires_grad=True)
    rule = ("bounded", -5.0, True, True, None, "scalar", "scalar")
    arguments = (*inputs(), None, None, state, *tables, *rule)
    for save in (False, True):
        if save or not packed:
            torch.library.opcheck(delta_rule.delta_rule_forward, (*arguments, save), test_utils=CHECKS)
    with torch.no_grad():
        out, last, saved = delta_rule.delta_rule_forward(*arguments, True)
    given = [*arguments[:9]]
    scan = (torch.randn_like(out), torch.randn_like(last), given, tables, saved, True, *rule)
    torch.library.opcheck(delta_rule.delta_rule_backward_scan, scan, test_utils=CHECKS)
    with torch.no_grad():
        scanned, _ = delta_rule.delta_rule_backward_scan(*scan)
    local = (scan[0], given, tables, out, saved[1], scanned, *rule)
    torch.library.opcheck(delta_rule.delta_rule_backward_local, local, test_utils=CHECKS)
    x, weight, bias = torch.randn(1, 9, 24), torch.randn(24, 4), torch.randn(24)
    past = torch.randn(number, 24, 3)
    torch.library.opcheck(conv.conv_forward, (x, weight, bias, past, *tiles, "silu"), test_utils=CHECKS)
    gate = torch.randn(1, 9, 32)
    torch.library.opcheck(
        norm.gated_norm_forward,
        (torch.randn(1, 9, 2, 16), torch.randn(16), gate, "silu", 1e-6),
        test_utils=CHECKS,
    )


@pytest.mark.parametrize("lives", [None, torch.tensor([True, False])])
@pytest.mark.parametrize("taps", [0, 4])
def test_decoding_keeps_torch_s_contracts_and_compiles_whole(taps, lives):
    N, H, K = 2, 2, 16
    qkv = [torch.randn(N, 1, H * K) for _ in range(3)]
    weights, biases = ([torch.randn(H * K, *width) for _ in range(3 if taps else 0)] for width in ((4,), ()))
    states = torch.randn(N, H, K, K), torch.randn(N, 3 * H * K, 3) if taps else None
    decay, beta, gate = torch.randn(N, 1, H, K), torch.randn(N, 1, H), torch.randn(N, 1, H * K)
    settings = (torch.rand(K), gate, lives, "bounded", -5.0, None, "silu", "silu", 1e-6)

    def arguments():
        memory, past = (None if part is None else part.clone() for part in states)
        return qkv, decay, beta, memory, torch.zeros(H), torch.zeros(H * K), weights, biases, past, *settings

    torch.library.opcheck(delta_rule.delta_rule_decode, arguments(), test_utils=CHECKS)
    results = []
    for step in (delta_rule._decode, delta_rule.delta_rule_decode):
        given = arguments()
        if step is delta_rule.delta_rule_decode:
            step = torch.compile(
                lambda *parts: delta_rule.delta_rule_decode(*parts), fullgraph=True, backend="aot_eager"
            )
        with torch.no_grad():
            out = step(*given)
        results.append([out, given[3], *([] if given[8] is None else [given[8]])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(results[0][1], states[0])


def test_no_token_leaves_the_state_alone():
    q, k, v, decay, beta, a_log, dt_bias = inputs(T=0)
    state = torch.randn(1, 2, 16, 16)
    gates = {"gate": "bounded", "a_log": a_log, "dt_bias": dt_bias}
    out, last = chunk_kda(q, k, v, decay, beta, state=state, **gates, impl="triton")
    assert out.shape == (1, 0, 2, 16)
    assert torch.equal(last, state)


@pytest.mark.parametrize("name", ["grouped", "bare"])
def test_a_layer_compiles_whole(name):
    layer = pair(name)[1]
    x = torch.randn(1, 70, 32, requires_grad=True)
    here = angles(70)

    def step(given):
        return layer(given, position_embeddings=here)[0]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = function(x)
        results.append((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))
    for eager, compiled in zip(*results, strict=True):
        # matrix products round differently there, and the kernels' float16 products enlarge that
        assert distance(compiled, eager) < 3e-3


def test_a_layer_compiles_whole_with_packed_documents():
    """Where they end is read on the host, before the step that is compiled."""
    layer = pair("grouped")[1]
    x = torch.randn(1, 20, 32, requires_grad=True)
    sequences = SequenceInfo.from_cu_seqlens(torch.tensor([0, 3, 3, 20]))

    def step(given):
        out, state = layer(given, sequences=sequences)
        return out, state.recurrent, state.conv

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        parts = function(x)
        loss = sum(part.square().sum() for part in parts)
        results.append(
            [*(part.detach() for part in parts), *torch.autograd.grad(loss, [x, *layer.parameters()])]
        )
    for eager, compiled in zip(*results, strict=True):
        assert distance(compiled, eager) < 3e-3
    apart = layer(x[:, 3:])[0]
    assert distance(results[1][0][:, 3:], apart.detach()) < 3e-3

"""The public op of the delta-rule family, on the reference and, interpreted, on the Triton kernels."""

from __future__ import annotations

import itertools
import os
import shutil

import pytest
import torch

from gendistill.ops import (
    Impl,
    Segments,
    chunk_delta_rule,
    chunk_gdn,
    chunk_kda,
    l2norm,
    recurrent_delta_rule,
    recurrent_gdn,
    recurrent_kda,
)
from gendistill.ops.contracts.delta_rule import delta_rule_forward
from gendistill.ops.reference import delta_rule as reference

FAMILY = [*itertools.product(("channel", "scalar"), ("none", "scalar", "channel"), ("scalar", "channel"))]


def make(decay, erase, write, *, gate="softplus", T=21, H=2, K=16, V=20, dtype=torch.float64):
    """Draw arguments of the op by name; all tensors need gradients."""
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(1, T, H, *shape, dtype=dtype)

    wide = [K] if decay == "channel" else []
    parts = {"q": draw(K), "k": draw(K), "v": draw(V), "decay": draw(*wide)}
    strengths = {"erase": draw(K) if erase == "channel" else None}
    strengths["write"] = draw(V) if write == "channel" else None
    strengths["beta"] = draw() if "scalar" in (erase, write) else None
    if gate == "none":
        parts |= {"q": l2norm(parts["q"]), "k": l2norm(parts["k"]), "decay": -parts["decay"].abs()}
        strengths = {name: None if part is None else part.sigmoid() for name, part in strengths.items()}
    else:
        parts |= {
            "a_log": torch.randn(H, dtype=dtype) / 3,
            "dt_bias": torch.randn(H * K if wide else H, dtype=dtype),
        }
    parts |= {name: part for name, part in strengths.items() if part is not None}
    parts = {name: part.requires_grad_() for name, part in parts.items()}
    return {**parts, **({"erase": None} if erase == "none" else {}), "gate": gate}


def distance(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_the_op_is_the_recurrence(decay, erase, write):
    x = make(decay, erase, write, gate="none")
    out, state = chunk_delta_rule(**x)
    expected = reference.recurrent_delta_rule(
        x["q"],
        x["k"],
        x["v"],
        log_decay=x["decay"],
        erase=None if erase == "none" else x["erase"] if erase == "channel" else x["beta"],
        write=x["write"] if write == "channel" else x["beta"],
    )
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(state, expected.state)


@pytest.mark.parametrize("gate", ["none", "softplus", "bounded"])
@pytest.mark.parametrize(
    ("decay", "names"), [("channel", (chunk_kda, recurrent_kda)), ("scalar", (chunk_gdn, recurrent_gdn))]
)
def test_named_cases_only_fix_arguments(decay, names, gate):
    x = make(decay, "scalar", "scalar", gate=gate)
    parts = [x.pop(name) for name in ("q", "k", "v", "decay", "beta")]
    for named, rule in zip(names, (chunk_delta_rule, recurrent_delta_rule), strict=True):
        for found, expected in zip(named(*parts, **x), rule(*parts, **x), strict=True):
            assert torch.equal(found, expected)
    other = make("scalar" if decay == "channel" else "channel", "scalar", "scalar", gate="none")["decay"]
    with pytest.raises(ValueError, match=f"{names[0].__name__} takes a decay of .* or use chunk_"):
        names[0](*parts[:3], other, parts[4])


@pytest.mark.parametrize("gate", ["none", "softplus", "bounded"])
@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_chunks_are_as_token_by_token(decay, erase, write, gate):
    x = make(decay, erase, write, gate=gate)
    for found, expected in zip(chunk_delta_rule(**x), recurrent_delta_rule(**x), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_decay_is_a_decay_of_zero():
    x = make("scalar", "scalar", "scalar", gate="none")
    zero = {**x, "decay": torch.zeros_like(x["decay"])}
    for rule in (chunk_delta_rule, recurrent_delta_rule):
        for found, expected in zip(rule(**{**x, "decay": None}), rule(**zero), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_word_names_an_implementation():
    x = make("channel", "scalar", "scalar", gate="none")
    assert torch.equal(chunk_delta_rule(**x, impl="reference").out, chunk_delta_rule(**x).out)
    with pytest.raises(ValueError, match="not a valid Impl"):
        chunk_delta_rule(**x, impl="fast")


@pytest.mark.parametrize("gate", ["softplus", "bounded"])
@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_documents_and_splits_are_as_the_whole(decay, erase, write, gate):
    x = make(decay, erase, write, gate=gate)
    tokens = ("q", "k", "v", "decay", "beta", "erase", "write")

    def cut(part):
        return {n: p[:, part] if n in tokens and p is not None else p for n, p in x.items()}

    whole, last = chunk_delta_rule(**x)
    one = chunk_delta_rule(**cut(slice(0, 18)))
    two = chunk_delta_rule(**cut(slice(18, 21)), state=one.state)
    torch.testing.assert_close(torch.cat([one.out, two.out], 1), whole)
    torch.testing.assert_close(two.state, last)
    packed, states = chunk_delta_rule(**x, segments=Segments([18, 0, 3]))
    torch.testing.assert_close(packed[:, :18], one.out)
    torch.testing.assert_close(packed[:, 18:], chunk_delta_rule(**cut(slice(18, 21))).out)
    assert (states[1] == 0).all()


WRONG = {
    "no beta": ({"beta": None}, 'beta must be .* where erase or write is "beta", got None; pass that'),
    "a beta that nothing reads": (
        {"erase": torch.zeros(1, 21, 2, 16), "write": torch.zeros(1, 21, 2, 20)},
        'neither erase nor write is "beta".*leave it out',
    ),
    "erase of another width": ({"erase": torch.zeros(1, 21, 2, 20)}, r"erase must be \[1, 21, 2, 16\]"),
    "write of another width": ({"write": torch.zeros(1, 21, 2, 16)}, r"write must be \[1, 21, 2, 20\]"),
    "nothing written": ({"write": None}, 'write must be a tensor, "beta", got None'),
    "another word": ({"erase": "none"}, "erase must be a tensor, \"beta\" or None, got 'none'"),
    "another gate": ({"gate": "relu"}, "gate must be none, softplus or bounded"),
    "a gate without its bias": ({"dt_bias": None}, r"dt_bias must be \[2\]"),
    "a bias per channel for a decay per head": ({"dt_bias": torch.zeros(32)}, r"dt_bias must be \[2\]"),
    "a bias without a gate": ({"gate": "none"}, "a_log must be None"),
    "a gate without a decay": ({"decay": None}, 'gate "softplus" needs a decay'),
    "decay of two axes": ({"decay": torch.zeros(1, 21)}, "decay must be"),
    "decay of other heads": ({"decay": torch.zeros(1, 21, 3)}, r"must be \[3\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        chunk_delta_rule(**{**make("scalar", "scalar", "scalar"), **change})


def interpreted(function):
    """Mark a test of the kernels."""
    off = os.environ.get("TRITON_INTERPRET") != "1"
    return pytest.mark.interpret(
        pytest.mark.skipif(off, reason="the interpreter is off: make interpret")(function)
    )


@interpreted
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_the_kernels_match_the_reference(decay, erase, write, packed):
    x = make(decay, erase, write, dtype=torch.float32)
    leaves = {name: part for name, part in x.items() if isinstance(part, torch.Tensor)}
    settings = {"segments": Segments([5, 0, 16])} if packed else {}
    state = torch.randn(3 if packed else 1, 2, 16, 20, requires_grad=True)
    leaves["state"] = state
    found, expected = (
        chunk_delta_rule(**x, **settings, state=state, impl=impl) for impl in (Impl.TRITON, Impl.REFERENCE)
    )
    grads = (torch.randn_like(found.out), torch.randn_like(found.state))
    mine, theirs = (torch.autograd.grad(result, list(leaves.values()), grads) for result in (found, expected))
    assert distance(found.out, expected.out) < 5e-3
    assert distance(found.state, expected.state) < 5e-3
    for name, one, two in zip(leaves, mine, theirs, strict=True):
        assert one.shape == two.shape
        assert distance(one, two) < (2e-2 if name in ("a_log", "dt_bias") else 6e-3), name


@interpreted
@pytest.mark.parametrize(("decay", "erase", "write"), FAMILY)
def test_the_op_compiles_whole_and_keeps_torch_s_contracts(decay, erase, write):
    x = make(decay, erase, write, dtype=torch.float32, T=5, V=16)
    names = [name for name, part in x.items() if isinstance(part, torch.Tensor)]
    rest = {name: part for name, part in x.items() if name not in names}
    leaves = [x[name] for name in names]

    def step(*parts):
        return chunk_delta_rule(**dict(zip(names, parts, strict=True)), **rest, impl=Impl.TRITON).out

    torch.compiler.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    order = ("q", "k", "v", "decay", "beta", "a_log", "dt_bias", "erase", "write")
    settings = (None, *[None] * 5, "softplus", -5.0, True, True, None, erase, write, True)
    torch.library.opcheck(
        delta_rule_forward,
        (*(x.get(name) for name in order), *settings),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@interpreted
def test_how_states_and_gates_lie_in_memory_changes_nothing():
    x = make("channel", "scalar", "scalar", dtype=torch.float32, gate="softplus")
    state = torch.randn(1, 2, 20, 16).transpose(2, 3)
    strided = {**x, "a_log": torch.randn(4)[::2], "dt_bias": torch.randn(1).expand(32)}
    plain = {**strided, **{name: strided[name].contiguous() for name in ("a_log", "dt_bias")}}
    found = chunk_delta_rule(**strided, state=state, impl=Impl.TRITON)
    expected = chunk_delta_rule(**plain, state=state.contiguous(), impl=Impl.TRITON)
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.state, expected.state)


@interpreted
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
def test_compiled_gradients_are_right_where_heads_come_before_tokens(monkeypatch):
    torch.manual_seed(0)
    leaves = [torch.randn(2, 2, 5, 16, requires_grad=True) for _ in range(3)]
    leaves += [torch.randn(2, 5, 2, 16, requires_grad=True), torch.randn(2, 5, 2, requires_grad=True)]
    gates = {"gate": "softplus", "a_log": torch.zeros(2), "dt_bias": torch.zeros(32)}

    def step(*parts):
        q, k, v = (part.transpose(1, 2) for part in parts[:3])
        return chunk_kda(q, k, v, *parts[3:], **gates, impl=Impl.TRITON).out

    expected = torch.autograd.grad(step(*leaves).square().sum(), leaves)
    # what is compiled for a graph does not change with how its ops are registered
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


@interpreted
def test_no_decay_is_none_on_the_kernels():
    x = {**make("scalar", "scalar", "scalar", gate="none", dtype=torch.float32), "decay": None}
    found, expected = chunk_delta_rule(**x, impl="triton"), chunk_delta_rule(**x)
    assert distance(found.out, expected.out) < 5e-3
    assert distance(found.state, expected.state) < 5e-3


@interpreted
@pytest.mark.parametrize("gate", ["none", "bounded"])
def test_the_recurrent_kernel_matches_the_reference_and_keeps_the_state(gate):
    x = make("channel", "scalar", "scalar", gate=gate, T=3, dtype=torch.float32)
    state = torch.randn(1, 2, 16, 20)
    before = state.clone()
    with torch.no_grad():
        for given in (None, state):
            found, expected = (recurrent_delta_rule(**x, state=given, impl=impl) for impl in Impl)
            assert distance(found.out, expected.out) < 1e-5
            assert distance(found.state, expected.state) < 1e-5
    assert torch.equal(state, before)
    other = make("scalar", "scalar", "scalar", T=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="use chunk_delta_rule"):
        recurrent_delta_rule(**other, impl="triton")


@interpreted
def test_no_rows_are_no_output():
    x = make("channel", "scalar", "scalar", dtype=torch.float32)
    empty = {name: part[:0] if name not in ("a_log", "dt_bias", "gate") else part for name, part in x.items()}
    out, state = chunk_delta_rule(**empty, impl=Impl.TRITON)
    assert out.shape == (0, 21, 2, 20)
    assert state.shape == (0, 2, 16, 20)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes them")
def test_tensors_of_the_cpu_are_refused():
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    x = make("channel", "scalar", "scalar", dtype=torch.float32)
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        chunk_delta_rule(**x, impl=Impl.TRITON)


def test_all_heads_may_share_queries_keys_and_values():
    x = make("channel", "scalar", "scalar", gate="none", H=1)
    wide = {name: x[name].expand(-1, -1, 4, *x[name].shape[3:]) for name in ("decay", "beta")}
    found = chunk_delta_rule(**{**x, **wide})
    expected = chunk_delta_rule(**x)
    torch.testing.assert_close(found.out, expected.out.expand(-1, -1, 4, -1))
    torch.testing.assert_close(found.state, expected.state.expand(-1, 4, -1, -1))

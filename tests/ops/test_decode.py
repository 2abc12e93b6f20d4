"""The public decode step: its definition against the ops of a layer, and, interpreted, its kernel against that."""

from __future__ import annotations

import os

import pytest
import torch

from gendistill.ops import (
    causal_conv,
    chunk_delta_rule,
    decode_delta_rule,
    gated_rms_norm,
    l2norm,
    log_decay,
    recurrent_kda,
)

CASES = {
    "everything": {"bias": True, "norm": True, "output": "silu"},
    "softplus": {"gate": "softplus", "output": "sigmoid", "activation": "identity"},
    "given gates": {"gate": "none", "norm": True},
    "no convolution": {"taps": 0, "output": "silu"},
    "one tap": {"taps": 1},
    "wide values": {"V": 24, "scale": 0.3, "norm": True, "output": "sigmoid"},
}


def make(
    gate="bounded", taps=4, bias=False, norm=False, output="none", activation="silu", V=16, scale=None,
    N=2, T=7, H=4, kv=2, K=16, dtype=torch.float64,
):  # fmt: skip
    """Draw the arguments of steps: those of the tokens, those of the layer, and both states."""
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    sizes = [H * K, kv * K, kv * V]
    parts = [draw(N, T, size) for size in sizes]
    decay, beta = draw(N, T, H, K), draw(N, T, H)
    if gate == "none":
        decay, beta = -decay.abs(), beta.sigmoid()
        # the rule takes keys of length one at most
        parts[:2] = [part / 8 for part in parts[:2]]
    tokens = {"q": parts[0], "k": parts[1], "v": parts[2], "decay": decay, "beta": beta}
    tokens["output_gate"] = None if output == "none" else draw(N, T, H * V)
    layer = {
        "gate": gate,
        "a_log": None if gate == "none" else draw(H) / 3,
        "dt_bias": None if gate == "none" else draw(H * K) - 2,
        "scale": scale,
        "conv_weight": [draw(size, taps) for size in sizes] if taps else None,
        "conv_bias": [draw(size) for size in sizes] if bias else None,
        "conv_activation": activation,
        "norm_weight": draw(V) if norm else None,
        "norm_eps": 1e-5,
        "output_activation": output,
    }
    states = draw(N, H, K, V), draw(N, sum(sizes), taps - 1) if taps > 1 else None
    return tokens, layer, states


def run(tokens, layer, states, **settings):
    """Take all tokens from copies of the states; returns output and states."""
    state, window = (None if part is None else part.clone() for part in states)
    tokens = dict(tokens)
    parts = [tokens.pop(name) for name in ("q", "k", "v", "decay", "beta")]
    out = decode_delta_rule(*parts, state, **tokens, **layer, conv_state=window, **settings)
    return out, state, window


def as_layer(tokens, layer, states):
    """Take all tokens through the ops that a layer trains with."""
    state, window = states
    parts = [tokens[name] for name in ("q", "k", "v")]
    sizes, (K, V) = [part.shape[-1] for part in parts], state.shape[2:]
    if layer["conv_weight"] is not None:
        bias = layer["conv_bias"]
        mixed, window = causal_conv(
            torch.cat(parts, -1),
            torch.cat(layer["conv_weight"]),
            None if bias is None else torch.cat(bias),
            activation=layer["conv_activation"],
            state=window,
        )
        parts = mixed.split(sizes, -1)
    q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(parts, (K, K, V), strict=True))
    rule = {name: layer[name] for name in ("gate", "a_log", "dt_bias", "scale")}
    out, state = chunk_delta_rule(q, k, v, tokens["decay"], tokens["beta"], **rule, state=state)
    out = gated_rms_norm(
        out,
        layer["norm_weight"],
        tokens["output_gate"],
        activation=layer["output_activation"],
        eps=layer["norm_eps"],
    )
    # one tap remembers nothing
    return out.unflatten(-1, (-1, V)), state, None if states[1] is None else window


def same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one.to(other.dtype), other, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_what_the_layer_s_ops_do(name):
    x = make(**CASES[name])
    same(run(*x), as_layer(*x))


@pytest.mark.parametrize("name", CASES)
def test_tokens_together_are_as_one_by_one(name):
    tokens, layer, states = make(**CASES[name])
    whole = run(tokens, layer, states)
    outs = []
    for token in range(7):
        here = {key: None if part is None else part[:, token : token + 1] for key, part in tokens.items()}
        out, *states = run(here, layer, states)
        outs.append(out)
    same((torch.cat(outs, 1), *states), whole)


def test_both_states_change_in_place():
    tokens, layer, states = make(**CASES["everything"])
    parts = [tokens[name] for name in ("q", "k", "v", "decay", "beta")]
    before = [part.clone() for part in states]
    settings = {**layer, "output_gate": tokens["output_gate"], "conv_state": states[1]}
    decode_delta_rule(*parts, states[0], **settings)
    assert not any(torch.equal(one, other) for one, other in zip(before, states, strict=True))


def test_what_does_not_fit_is_named():
    tokens, layer, states = make(gate="none", taps=0)
    k = l2norm(tokens["k"])
    for change, message in (
        ({"decay": tokens["decay"][:, :, :1]}, r"decay must be \[2, 7, 4, 16\]"),
        ({"beta": tokens["beta"][:1]}, r"beta must be \[2, 7, 4\]"),
        ({"k": k[..., :24]}, "24 channels of k are not heads of 16 that divide 4"),
    ):
        with pytest.raises(ValueError, match=message):
            run({**tokens, **change}, layer, states)


@pytest.mark.parametrize("name", CASES)
def test_rows_without_a_sequence_give_zeros_and_keep_their_states(name):
    tokens, layer, states = make(**CASES[name], N=3)
    lives = torch.tensor([True, False, True])
    expected = run(tokens, layer, states)
    for part in tokens.values():
        if part is not None:
            part[1] = torch.nan
    states[0][1, 0] = torch.nan
    found = run(tokens, layer, states, lives=lives)
    same(
        [part if part is None else part[lives] for part in found],
        [part if part is None else part[lives] for part in expected],
    )
    assert not found[0][1].any()
    for part, old in zip(found[1:], states, strict=True):
        if part is not None:
            torch.testing.assert_close(part[1], old[1], rtol=0, atol=0, equal_nan=True)
    everywhere = run(tokens, layer, states, lives=torch.zeros(3, dtype=torch.bool))
    assert not everywhere[0].any()
    same(everywhere[1:], states, equal_nan=True, rtol=0, atol=0)


def test_what_does_not_say_which_rows_live_is_named():
    x = make(gate="none", taps=0)
    for lives, message in (
        (torch.ones(2), "lives must be bool, got float32"),
        (torch.ones(3, dtype=torch.bool), r"lives must be \[2\], got \[3\]"),
        (torch.ones(2, dtype=torch.bool, device="meta"), "lives is on meta and q on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*x, lives=lives)


def test_what_is_missing_is_named():
    """Neither a gate without its parameters nor a convolution without a state is something else silently."""
    tokens, layer, states = make(**CASES["everything"])
    for change, message in (
        ({"a_log": None}, 'gate "bounded" needs a_log and dt_bias'),
        ({"dt_bias": None}, 'gate "bounded" needs a_log and dt_bias'),
        ({"gate": "Bounded"}, 'gate must be none, softplus or bounded, got "Bounded"'),
        ({"output_activation": "none"}, 'an output gate needs output_activation silu or sigmoid, got "none"'),
    ):
        with pytest.raises(ValueError, match=message):
            run(tokens, {**layer, **change}, states)
    with pytest.raises(ValueError, match="conv_state must be given"):
        run(tokens, layer, (states[0], None))
    with pytest.raises(ValueError, match='gate "softplus" needs a_log and dt_bias'):
        log_decay(tokens["decay"], gate="softplus", a_log=layer["a_log"])


def interpreted(test):
    off = os.environ.get("TRITON_INTERPRET") != "1"
    return pytest.mark.interpret(
        pytest.mark.skipif(off, reason="the interpreter is off: make interpret")(test)
    )


@interpreted
def test_a_state_that_lies_otherwise_in_memory_is_taken_further():
    tokens, _, (state, _) = make(gate="none", taps=0, T=2, dtype=torch.float32)
    q, k, v = (tokens[name].unflatten(-1, (-1, 16)) for name in "qkv")
    transposed = state.transpose(2, 3).contiguous().transpose(2, 3)
    rest = tokens["decay"], tokens["beta"]
    with torch.no_grad():
        found = recurrent_kda(q, k, v, *rest, state=transposed, impl="triton")
    same(found, recurrent_kda(q, k, v, *rest, state=state), rtol=0, atol=1e-4)
    assert torch.equal(transposed, state)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_matches_the_definition_in_float64(name):
    tokens, layer, states = make(**CASES[name], T=2, dtype=torch.float32)

    def widen(part):
        if isinstance(part, torch.Tensor):
            return part.double()
        return [widen(each) for each in part] if isinstance(part, list) else part

    exact = ({k: widen(p) for k, p in tokens.items()}, {k: widen(p) for k, p in layer.items()})
    with torch.no_grad():
        found = run(tokens, layer, states, impl="triton")
    same(found, run(*exact, [widen(part) for part in states]), rtol=0, atol=1e-4)

"""The Triton decode step, interpreted on the CPU, against the reference ops in float64."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gendistill.ops import (
    bounded_log_decay,
    causal_conv,
    l2norm,
    softplus_log_decay,
)
from gendistill.ops.reference.delta_rule import recurrent_delta_rule

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from triton.runtime.interpreter import interpreter_builder

from gendistill.bench.launches import watch
from gendistill_kernels.delta import decode
from gendistill_kernels.delta.decode import decode_step
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Rule

pytestmark = pytest.mark.interpret
TOLERANCE = 2e-6
# one rounding to ten bits of mantissa
HALF = 4e-4


class Step(NamedTuple):
    """Hold the arguments of one step."""

    qkv: Tensor
    decay: Tensor
    beta: Tensor
    state: Tensor
    rule: Rule
    heads: Heads
    A_log: Tensor | None
    dt_bias: Tensor | None
    convolution: Convolution | None
    finish: Finish
    lives: Tensor | None = None


class Result(NamedTuple):
    """Hold what a step returns and the states it leaves."""

    out: Tensor
    state: Tensor
    conv: Tensor | None


def make(
    N=2, T=1, H=2, K=16, V=16, *, heads=None, rule=None, taps=4, activation="silu", bias=True,
    norm=True, gate="silu", dtype=torch.float32, conv_dtype=None, seed=0,
) -> Step:  # fmt: skip
    torch.manual_seed(seed)
    heads, rule = heads or Heads(H, H, H), rule or Rule("bounded")
    channels = (heads.q + heads.k) * K + heads.v * V
    convolution = None
    if taps:
        past = torch.randn(N, channels, taps - 1).to(dtype).to(conv_dtype or dtype) if taps > 1 else None
        offset = torch.randn(channels).to(dtype) if bias else None
        convolution = Convolution(torch.randn(channels, taps).to(dtype), past, offset, activation)
    decay, beta = torch.randn(N, T, H, K).to(dtype), torch.randn(N, T, H).to(dtype)
    return Step(
        qkv=torch.randn(N, T, channels).to(dtype),
        decay=-0.3 * decay.abs() if rule.gate == "none" else decay,
        beta=beta if rule.sigmoid else beta.sigmoid(),
        state=torch.randn(N, H, K, V),
        rule=rule,
        heads=heads,
        A_log=None if rule.gate == "none" else torch.rand(H) * 0.6 - 0.3,
        dt_bias=None if rule.gate == "none" else torch.randn(H * K) - 2,
        convolution=convolution,
        finish=Finish(
            norm_weight=torch.rand(V).to(dtype) + 0.5 if norm else None,
            norm_eps=1e-5,
            gate=torch.randn(N, T, H * V).to(dtype) if gate else None,
            gate_activation=gate or "silu",
        ),
    )


def run(x: Step) -> Result:
    """Take the step from copies of the states."""
    state, convolution = x.state.clone(), x.convolution
    if convolution is not None and convolution.state is not None:
        convolution = convolution._replace(state=convolution.state.clone())
    out = decode_step(**x._replace(state=state, convolution=convolution)._asdict())
    return Result(out, state, None if convolution is None else convolution.state)


def reference(x: Step) -> Result:
    """Compose the step from the reference ops, in float64."""
    qkv, conv = x.qkv.double(), None
    if x.convolution is not None:
        weight, past, bias, activation = x.convolution
        qkv, conv = causal_conv(
            qkv,
            weight.double(),
            None if bias is None else bias.double(),
            activation=activation,
            state=None if past is None else past.double(),
        )
    H, K, V = x.state.shape[1:]
    sizes = [x.heads.q * K, x.heads.k * K, x.heads.v * V]
    q, k, v = (
        part.unflatten(-1, (number, -1)).repeat_interleave(H // number, 2)
        for part, number in zip(qkv.split(sizes, -1), x.heads, strict=True)
    )
    if x.rule.norm:
        q, k = l2norm(q), l2norm(k)
    decay = x.decay.double()
    if x.A_log is not None and x.dt_bias is not None:
        gates = x.A_log.double(), x.dt_bias.double()
        if x.rule.gate == "bounded":
            decay = bounded_log_decay(decay, *gates, lower_bound=x.rule.lower_bound)
        else:
            decay = softplus_log_decay(decay, *gates)
    beta = x.beta.double().sigmoid() if x.rule.sigmoid else x.beta.double()
    out, state = recurrent_delta_rule(
        q, k, v, log_decay=decay, erase=beta, write=beta, state=x.state.double(), scale=x.rule.scale
    )
    if x.finish.norm_weight is not None:
        out = F.rms_norm(out, (V,), x.finish.norm_weight.double(), x.finish.norm_eps)
    if x.finish.gate is not None:
        act = {"silu": F.silu, "sigmoid": torch.sigmoid, "none": lambda raw: raw}[x.finish.gate_activation]
        out = out * act(x.finish.gate.double()).view_as(out)
    return Result(out, state, conv)


def distance(x, y):
    return ((x.double() - y).square().mean().sqrt() / (y.square().mean().sqrt() + 1e-12)).item()


def tokens(x: Step, part: slice) -> Step:
    """Take some of the new tokens."""
    gate = x.finish.gate
    return x._replace(
        qkv=x.qkv[:, part],
        decay=x.decay[:, part],
        beta=x.beta[:, part],
        finish=x.finish._replace(gate=None if gate is None else gate[:, part]),
    )


CASES = {
    "one token": {},
    "softplus": {"rule": Rule("softplus"), "T": 3, "gate": "sigmoid"},
    "more tokens than taps": {"T": 8, "activation": "identity", "bias": False},
    "fewer key and value heads": {"H": 4, "heads": Heads(4, 2, 1), "T": 3, "N": 1},
    "groups of unlike sizes": {"H": 6, "heads": Heads(6, 2, 3), "N": 1},
    "nine heads with the same keys and values": {
        "K": 64,
        "V": 64,
        "H": 9,
        "heads": Heads(9, 1, 1),
        "T": 2,
        "N": 1,
    },
    "heads that share keys and values two by two": {"H": 4, "heads": Heads(4, 2, 2), "T": 2},
    "fewer query heads": {"H": 4, "heads": Heads(2, 2, 4), "rule": Rule("softplus"), "T": 3, "N": 1},
    "channels that fill no tile": {"K": 24, "V": 20, "T": 3},
    "wide values": {"K": 16, "V": 32, "rule": Rule("bounded", lower_bound=-1.0, scale=0.5)},
    "given decay and beta": {"rule": Rule("none", sigmoid=False), "T": 2},
    "not normalised": {"rule": Rule("bounded", norm=False, scale=0.02), "norm": False, "gate": None},
    "no convolution": {"taps": 0, "H": 4, "heads": Heads(4, 2, 1), "T": 3, "N": 1},
    "one tap": {"taps": 1, "T": 2},
    "two taps": {"taps": 2, "T": 2, "norm": False},
    "no norm": {"norm": False, "T": 2, "gate": "none"},
    "no gate": {"gate": None, "T": 2},
    "values in blocks": {"K": 256, "V": 72, "H": 1, "heads": Heads(1, 1, 1), "T": 2, "N": 1},
    "values that heads share, in blocks": {"K": 256, "V": 130, "heads": Heads(2, 1, 1), "T": 2, "N": 1},
    "values in blocks without a norm": {"K": 130, "V": 130, "H": 1, "T": 2, "N": 1, "norm": False},
    "half": {"dtype": torch.float16, "T": 3, "H": 4, "heads": Heads(4, 2, 2), "N": 1},
    "half with a float32 window": {
        "dtype": torch.float16,
        "conv_dtype": torch.float32,
        "rule": Rule("softplus"),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_states_match_the_reference(name):
    x = make(**CASES[name])
    found, expected = run(x), reference(x)
    assert found.out.dtype == x.qkv.dtype
    assert distance(found.out, expected.out) < (HALF if x.qkv.dtype == torch.float16 else TOLERANCE)
    assert distance(found.state, expected.state) < TOLERANCE
    if found.conv is not None and expected.conv is not None:
        assert torch.equal(found.conv, expected.conv.to(found.conv.dtype))


@pytest.mark.parametrize("sizes", [{"H": 4, "heads": Heads(4, 2, 1), "K": 24, "V": 20}, {"taps": 0}])
def test_tokens_together_are_as_one_by_one(sizes):
    x = make(N=1, T=4, **sizes)
    together = run(x)
    for token in range(4):
        one = run(tokens(x, slice(token, token + 1)))
        assert torch.equal(one.out[:, 0], together.out[:, token])
        x = x._replace(state=one.state)
        if x.convolution is not None:
            x = x._replace(convolution=x.convolution._replace(state=one.conv))
    assert torch.equal(x.state, together.state)
    if x.convolution is not None and together.conv is not None:
        assert torch.equal(x.convolution.state, together.conv)


def test_a_sequence_in_a_batch_is_as_if_alone():
    x = make(N=2, T=2, H=2, heads=Heads(2, 1, 1))
    whole = run(x)
    for row in range(2):
        here = slice(row, row + 1)
        alone = run(
            x._replace(
                qkv=x.qkv[here],
                decay=x.decay[here],
                beta=x.beta[here],
                state=x.state[here],
                convolution=x.convolution._replace(state=x.convolution.state[here]),
                finish=x.finish._replace(gate=x.finish.gate[here]),
            )
        )
        for part, all_rows in zip(alone, whole, strict=True):
            assert torch.equal(part, all_rows[here])


def rows(x: Step, at: list[int]) -> Step:
    """Take some of the sequences."""
    gate, convolution = x.finish.gate, x.convolution
    if convolution is not None and convolution.state is not None:
        convolution = convolution._replace(state=convolution.state[at])
    return x._replace(
        qkv=x.qkv[at],
        decay=x.decay[at],
        beta=x.beta[at],
        state=x.state[at],
        convolution=convolution,
        finish=x.finish._replace(gate=None if gate is None else gate[at]),
        lives=None,
    )


def bits(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.uint8)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ({}, 1),
        ({"H": 4, "heads": Heads(4, 2, 2), "K": 24, "V": 20}, 2),
        ({"H": 2, "heads": Heads(2, 1, 1), "dtype": torch.float16}, 2),
        ({"taps": 0, "norm": False, "gate": None}, 1),
        ({"K": 256, "V": 72, "H": 1, "heads": Heads(1, 1, 1)}, 1),
        ({"K": 256, "V": 130, "heads": Heads(2, 1, 1)}, 2),
    ],
)
def test_rows_without_a_sequence_give_zeros_and_keep_their_states(sizes, launches, T):
    lives = torch.tensor([True, False, True, False, False])
    x = make(N=5, T=T, **sizes)._replace(lives=lives)
    dead, alive = ([*at.nonzero()[:, 0].tolist()] for at in (~lives, lives))
    for part in (x.qkv, x.decay, x.beta, x.finish.gate):
        if part is not None:
            part[dead[:2]] = torch.nan
    for part in (x.state, None if x.convolution is None else x.convolution.state):
        if part is not None:
            part[dead[0]] = torch.nan
    with watch("decode_convolution") as before, watch("decode") as step:
        found = run(x)
    assert len(before) + len(step) == launches
    for one, other in zip(found, run(rows(x, alive)), strict=True):
        assert one is other is None or torch.equal(one[alive], other)
    assert torch.equal(bits(found.out[dead]), torch.zeros_like(bits(found.out[dead])))
    assert torch.equal(bits(found.state[dead]), bits(x.state[dead]))
    if x.convolution is not None:
        assert torch.equal(bits(found.conv[dead]), bits(x.convolution.state[dead]))


@pytest.mark.parametrize("heads", [Heads(2, 2, 2), Heads(2, 1, 1)])
def test_all_rows_or_none_may_have_a_sequence(heads):
    x = make(N=3, T=2, heads=heads)
    for one, other in zip(run(x._replace(lives=torch.ones(3, dtype=torch.bool))), run(x), strict=True):
        assert torch.equal(one, other)
    found = run(x._replace(lives=torch.zeros(3, dtype=torch.bool)))
    for one, other in zip(found, (torch.zeros(3, 2, 2, 16), x.state, x.convolution.state), strict=True):
        assert torch.equal(one, other)


def test_what_does_not_say_which_rows_live_is_refused():
    x, whole = make(), torch.ones(4, dtype=torch.bool)
    for lives, message in (
        (torch.ones(2), "lives must be bool, got float32"),
        (torch.ones(2, dtype=torch.uint8), "lives must be bool, got uint8"),
        (whole[:3], r"lives must be \[2\], got \[3\]"),
        (whole[::2], "lives must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_step(**put(x, lives=lives))
    about = [(torch.float32, 0, (2, 1, 16), (16, 16, 1))] * 18 + [(torch.bool, -1, (2,), (1,))]
    settings = (Heads(2, 2, 2), Rule("bounded"), torch.device("cuda:0"), "silu", "silu", 1e-6)
    with pytest.raises(ValueError, match="lives is on the CPU and q on cuda:0"):
        decode._plan(tuple(about), *settings)


@pytest.mark.parametrize("heads", [Heads(6, 2, 3), Heads(6, 6, 3)])
def test_programs_may_run_in_any_order(monkeypatch, heads):
    x = make(H=6, heads=heads, T=2, N=1)
    expected = run(x)
    place = interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter_builder,
        "set_grid_idx",
        lambda i, j, k: place(interpreter_builder.grid_dim[0] - 1 - i, j, k),
    )
    for one, other in zip(run(x), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ({}, 1),
        ({"H": 4, "heads": Heads(4, 2, 2)}, 2),
        ({"H": 4, "heads": Heads(2, 4, 4)}, 2),
        # without a window nothing is moved on that others read
        ({"H": 4, "heads": Heads(4, 2, 2), "taps": 1}, 1),
        ({"H": 4, "heads": Heads(4, 2, 2), "taps": 0}, 1),
    ],
)
def test_what_heads_share_is_convolved_before(sizes, launches):
    x = make(T=2, **sizes)
    with watch("decode_convolution") as before, watch("decode") as step:
        run(x)
    assert len(step) == 1
    assert len(before) == launches - 1
    assert step[0].settings["CONVOLVED"] == bool(before)


def test_inputs_may_be_views_of_one_projection():
    x = make(N=2, T=2, K=24, V=20)
    expected = run(x)
    parts = [x.qkv, x.decay.flatten(2), x.beta, x.finish.gate]
    packed = torch.cat([*parts, torch.full((2, 2, 7), torch.nan)], -1)
    qkv, decay, beta, gate, _ = packed.split([part.shape[-1] for part in parts] + [7], -1)
    found = run(
        x._replace(qkv=qkv, decay=decay.unflatten(2, (2, 24)), beta=beta, finish=x.finish._replace(gate=gate))
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [0, 1, 4])
def test_q_k_and_v_may_be_tensors_of_their_own(taps, bias):
    x = make(H=4, heads=Heads(4, 2, 1), K=24, V=20, T=2, taps=taps, bias=bias)
    expected = run(x)
    sizes = [4 * 24, 2 * 24, 20]

    def apart(packed, dim):
        return [part.contiguous() for part in packed.split(sizes, dim)]

    y = x._replace(qkv=apart(x.qkv, 2))
    if x.convolution is not None:
        offset = apart(x.convolution.bias, 0) if bias else None
        y = y._replace(convolution=x.convolution._replace(weight=apart(x.convolution.weight, 0), bias=offset))
    for one, other in zip(run(y), expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_tensors_on_several_devices_are_refused():
    about = [(torch.float32, 0, (2, 1, 16), (16, 16, 1))] * 19
    about[15] = (torch.float32, 1, (2, 1, 16), (16, 16, 1))
    settings = (Heads(2, 2, 2), Rule("bounded"), torch.device("cuda:0"), "silu", "silu", 1e-6)
    with pytest.raises(ValueError, match="the convolution's state is on cuda:1 and q on cuda:0"):
        decode._plan(tuple(about), *settings)


SHAPES = {
    "qkv": ({"qkv": (2, 1, 98)}, r"qkv must be \[2, 1, 96\], got \[2, 1, 98\]"),
    "decay": ({"decay": (2, 1, 2, 8)}, r"decay must be \[2, 1, 2, 16\], got \[2, 1, 2, 8\]"),
    "beta": ({"beta": (1, 1, 2)}, r"beta must be \[2, 1, 2\], got \[1, 1, 2\]"),
    "state": ({"state": (1, 2, 16, 16)}, r"state must be \[2, 2, 16, 16\], got \[1, 2, 16, 16\]"),
    "A_log": ({"A_log": (1,)}, r"A_log must have 2 elements, one for each head, got shape \[1\]"),
    "dt_bias": (
        {"dt_bias": (16,)},
        r"dt_bias must have 32 elements, one for .* channel, got shape \[16\]",
    ),
    "weight": ({"convolution.weight": (64, 4)}, r"convolution's weight must be \[96, 4\], got \[64, 4\]"),
    "bias": ({"convolution.bias": (64,)}, r"convolution's bias must be \[96\], got \[64\]"),
    "history": (
        {"convolution.state": (1, 96, 3)},
        r"convolution's state must be \[2, 96, 3\], got \[1, 96, 3\]",
    ),
    "taps": (
        {"convolution.state": (2, 96, 4)},
        r"convolution's state must be \[2, 96, 3\], got \[2, 96, 4\]",
    ),
    "norm": ({"finish.norm_weight": (8,)}, r"norm_weight must be \[16\], got \[8\]"),
    "gate": ({"finish.gate": (2, 1, 16)}, r"gate must be \[2, 1, 32\], got \[2, 1, 16\]"),
    "out": ({"out": (2, 1, 2, 8)}, r"out must be \[2, 1, 2, 16\], got \[2, 1, 2, 8\]"),
}


def put(x, **changes):
    """Replace arguments, also parts of ``convolution`` and ``finish``, by name."""
    arguments = x._asdict()
    for name, value in changes.items():
        owner, _, part = name.rpartition(".")
        if owner:
            arguments[owner] = arguments[owner]._replace(**{part: value})
        else:
            arguments[name] = value
    return arguments


@pytest.mark.parametrize("name", SHAPES)
def test_what_the_kernel_would_read_past_is_refused(name):
    changes, message = SHAPES[name]
    changes = {key: torch.zeros(shape) for key, shape in changes.items()}
    with pytest.raises(ValueError, match=message):
        decode_step(**put(make(), **changes))


def test_parts_of_their_own_are_checked_one_by_one():
    x = make()
    parts = [torch.zeros(2, 1, 32), torch.zeros(2, 1, 16), torch.zeros(2, 1, 32)]
    with pytest.raises(ValueError, match=r"k must be \[2, 1, 32\], got \[2, 1, 16\]"):
        decode_step(**put(x, qkv=parts))
    weights = [torch.zeros(32, taps) for taps in (4, 4, 3)]
    with pytest.raises(ValueError, match=r"convolution's weight of v must be \[32, 4\], got \[32, 3\]"):
        decode_step(**put(x, **{"convolution.weight": weights}))


def test_states_that_cannot_change_in_place_are_refused():
    x = make()
    turned = x.state.transpose(2, 3)
    with pytest.raises(ValueError, match="state must be contiguous, it changes in place"):
        decode_step(**put(x, state=turned))
    past = x.convolution.state.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="convolution's state must be contiguous"):
        decode_step(**put(x, **{"convolution.state": past}))
    with pytest.raises(ValueError, match="state must be float32, got bfloat16"):
        decode_step(**put(x, state=x.state.bfloat16()))
    with pytest.raises(ValueError, match="convolution's state must be given"):
        decode_step(**put(x, **{"convolution.state": None}))


def test_channels_that_are_not_next_to_each_other_are_refused():
    x = make()
    for name, message in {"qkv": "channels of q", "decay": "channels of decay"}.items():
        part = getattr(x, name)
        apart = torch.stack([part, part], -1)[..., 0]
        with pytest.raises(ValueError, match=f"{message} must be next to each other"):
            decode_step(**put(x, **{name: apart}))


def test_heads_that_do_not_divide_those_of_the_state_are_refused():
    x = make(H=4, heads=Heads(4, 3, 2))
    with pytest.raises(ValueError, match="3 heads of k do not divide the state's 4"):
        decode_step(**x._asdict())


def test_nothing_but_the_sequences_is_written():
    x = make(N=2, K=24, V=20)
    expected = run(x)
    pools = [
        torch.full((4, *part.shape[1:]), torch.nan) for part in (x.state, x.convolution.state, expected.out)
    ]
    state, conv, out = (pool[1:3] for pool in pools)
    state.copy_(x.state)
    conv.copy_(x.convolution.state)
    views = x._replace(state=state, convolution=x.convolution._replace(state=conv))
    assert decode_step(**views._asdict(), out=out) is out
    for pool, part in zip(pools, (expected.state, expected.conv, expected.out), strict=True):
        assert torch.equal(pool[1:3], part)
        assert pool[[0, 3]].isnan().all()


def test_no_sequence_is_no_work():
    x = make(N=0)
    assert run(x).out.shape == (0, 1, 2, 16)

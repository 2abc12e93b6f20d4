"""The Triton kernels on a GPU at the edges of what they accept: memory around tensors, sizes, gates, graphs.

``pytest -s`` prints the errors that were measured.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gendistill.ops import Segments, causal_conv, chunk_kda, decode_delta_rule, gated_rms_norm
from gendistill.ops.select import Impl

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

from gendistill_kernels.conv.causal import conv_backward, conv_forward
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta.chunk import chunk_forward
from gendistill_kernels.delta.decode import decode_step
from gendistill_kernels.delta.layout import Chunks, InferenceChunks
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Inputs, Rule
from gendistill_kernels.norm.gated import gated_norm_backward, gated_norm_forward

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16
# relative rms error; rounding the result costs 1.7e-3 in bfloat16 and 2.1e-4 in float16
TOLERANCE = {BF16: 6e-3, FP16: 2.5e-3, torch.float32: 2e-3}
# sums over all tokens, in which most of the gradient cancels
SUMMED = {"d A_log": 5e-2, "d dt_bias": 2e-2}
LENGTHS = [0, 15, 1, 64, 0, 70, 1]


@pytest.fixture
def guards(cases):
    """Memory that shows what is written or read around tensors; nothing may have been written at the end."""
    made = cases.Guards()
    with made.apart():
        yield made
    assert not made.damage(), made.damage()


def guard_inputs(guards, x):
    return Inputs(*(part if part is None else guards.copy(part, name) for name, part in x._asdict().items()))


def table(errors):
    return "  ".join(f"{name} {value:.1e}" for name, value in errors.items())


def clean(results):
    return [name for name, part in results.items() if not torch.isfinite(part).all()]


SIZES = {
    "64 channels": {"T": 100},
    "one token": {"B": 3, "T": 1},
    "a whole chunk": {"T": 64, "K": 128},
    "96 and 128 channels": {"K": 96, "V": 128, "T": 65},
    "128 and 96 channels": {"K": 128, "V": 96, "T": 63},
    "100 channels": {"K": 100, "V": 72, "T": 17},
    "256 channels": {"K": 256, "V": 64, "T": 66},
    "grouped": {"H": 6, "heads": (6, 2, 2), "T": 70},
    "float16": {"K": 128, "T": 66, "dtype": FP16},
    "float32": {"T": 66, "dtype": torch.float32},
    "GDN": {"T": 70, "decay_per": "head"},
    "GDN-2": {"T": 70, "erase": "channel", "write": "channel"},
    "GDN-2, 96 and 128 channels": {"K": 96, "V": 128, "T": 65, "erase": "channel", "write": "channel"},
    "linear attention": {"T": 70, "erase": "none"},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_chunks_leave_the_memory_around_their_tensors_alone(cases, guards, name, packed):
    sizes = dict(SIZES[name])
    rule = Rule("bounded", **{word: sizes.pop(word) for word in ("erase", "write") if word in sizes})
    chunks, number = None, sizes.get("B", 2)
    if packed:
        sizes |= {"B": 1, "T": sum(LENGTHS)}
        chunks, number = Chunks.of(LENGTHS, DEVICE), len(LENGTHS)
    plain = cases.draw(rule, **sizes)
    grads = cases.upstream(plain, number)
    state = cases.normal(number, plain.decay.shape[2], plain.k.shape[3], plain.v.shape[3])
    expected = cases.run(plain, rule, state, grads, chunks)
    x, begin = guard_inputs(guards, plain), guards.copy(state, "state")
    ends = tuple(guards.copy(part, "gradient") for part in grads)
    if packed:
        chunks = Chunks(*(part if part is None else guards.copy(part, "table") for part in chunks))
    with guards.everywhere():
        found = cases.run(x, rule, begin, ends, chunks)
    for key, part in expected.items():
        # around a tensor there is NaN, which would be here if it was read
        assert torch.equal(found[key], part), key
    for name, part in plain._asdict().items():
        assert part is None or torch.equal(getattr(x, name), part), f"{name} was written to"
    assert torch.equal(begin, state)


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize(
    ("K", "V", "heads"), [(64, 64, (4, 2, 2)), (128, 128, (2, 1, 1)), (100, 72, (2, 2, 2))]
)
def test_live_and_dead_spans_leave_the_memory_around_their_tensors_alone(
    cases, guards, monkeypatch, K, V, heads, has_state
):
    monkeypatch.setattr("gendistill_kernels.delta.layout.UNCUT", 2)
    rule, lengths = Rule("softplus"), [300, 0, 64, 1, 129, 0]
    plain = cases.draw(rule, 1, sum(lengths), heads[0], K, V, heads=heads)
    state = cases.normal(len(lengths), heads[0], K, V) if has_state else None
    chunks = Segments(lengths, device=DEVICE, room=14).table(InferenceChunks.of)
    expected = chunk_forward(plain, rule, state=state, chunks=chunks)[:2]
    x, begin = guard_inputs(guards, plain), state if state is None else guards.copy(state, "state")
    tables = InferenceChunks(*(guards.copy(part, "table") for part in chunks))
    with guards.everywhere():
        found = chunk_forward(x, rule, state=begin, chunks=tables)[:2]
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("channels", "taps"), [(96, 4), (100, 3), (520, 4)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_convolution_leaves_the_memory_around_its_tensors_alone(
    cases, guards, channels, taps, packed, dtype
):
    torch.manual_seed(0)
    rows, tokens, number = (1, sum(LENGTHS), len(LENGTHS)) if packed else (2, 67, 2)
    tiles = Tiles.of(LENGTHS, DEVICE) if packed else None
    x, grad = (cases.normal(rows, tokens, channels, dtype=dtype) for _ in range(2))
    weight, bias = cases.normal(channels, taps, dtype=dtype), cases.normal(channels, dtype=dtype)
    state, end = (cases.normal(number, channels, taps - 1, dtype=dtype) for _ in range(2))

    def run(x, grad, weight, bias, state, end):
        settings = {"activation": "silu", "state": state, "tiles": tiles}
        forward = conv_forward(x, weight, bias, **settings)
        return [*forward, *conv_backward(grad, end, x, weight, bias, **settings)]

    inputs = (x, grad, weight, bias, state, end)
    expected = run(*inputs)
    kept = [guards.copy(part) for part in inputs]
    with guards.everywhere():
        found = run(*kept)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(kept, inputs, strict=True))


@pytest.mark.parametrize(("H", "V"), [(3, 64), (9, 96), (5, 100), (2, 256)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_norm_leaves_the_memory_around_its_tensors_alone(cases, guards, H, V, dtype):
    torch.manual_seed(0)
    out, weight = cases.normal(1, 67, H, V, dtype=dtype), cases.normal(V, dtype=dtype)
    gate, grad = (cases.normal(1, 67, H * V, dtype=dtype) for _ in range(2))

    def run(out, weight, gate, grad):
        settings = {"activation": "silu"}
        forward = gated_norm_forward(out, weight, gate, **settings)
        return [forward, *gated_norm_backward(grad, out, weight, gate, **settings)]

    inputs = (out, weight, gate, grad)
    expected = run(*inputs)
    kept = [guards.copy(part) for part in inputs]
    with guards.everywhere():
        found = run(*kept)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(kept, inputs, strict=True))


@pytest.mark.parametrize(("H", "kv", "K"), [(4, 4, 64), (9, 3, 64), (3, 1, 128), (2, 2, 100), (2, 1, 256)])
@pytest.mark.parametrize("T", [1, 3])
def test_decoding_leaves_the_memory_around_its_tensors_alone(cases, guards, H, kv, K, T):
    torch.manual_seed(0)
    N, C = 3, (H + 2 * kv) * K
    inputs = {
        "qkv": cases.normal(N, T, C, dtype=BF16),
        "decay": cases.normal(N, T, H, K, dtype=BF16),
        "beta": cases.normal(N, T, H, dtype=BF16),
        "A_log": cases.normal(H) * 0.3,
        "dt_bias": cases.normal(H * K) - 2,
        "weight": cases.normal(C, 4, dtype=BF16),
        "bias": cases.normal(C, dtype=BF16),
        "gain": cases.normal(K, dtype=BF16),
        "gate": cases.normal(N, T, H * K, dtype=BF16),
    }
    states = cases.normal(N, H, K, K), cases.normal(N, C, 3, dtype=BF16)

    def run(x, state, past):
        return decode_step(
            x["qkv"],
            x["decay"],
            x["beta"],
            state,
            rule=Rule("bounded"),
            heads=Heads(H, kv, kv),
            A_log=x["A_log"],
            dt_bias=x["dt_bias"],
            convolution=Convolution(x["weight"], past, x["bias"], "silu"),
            finish=Finish(x["gain"], 1e-6, x["gate"], "silu"),
        )

    plain = [part.clone() for part in states]
    expected = run(inputs, *plain)
    kept = {name: guards.copy(part, name) for name, part in inputs.items()}
    inside = [guards.copy(part, "state") for part in states]
    with guards.everywhere():
        found = run(kept, *inside)
    assert torch.equal(found, expected)
    assert all(torch.equal(one, other) for one, other in zip(inside, plain, strict=True))
    assert all(torch.equal(kept[name], part) for name, part in inputs.items())


@pytest.mark.parametrize(("H", "kv", "K"), [(14, 2, 64), (16, 8, 128), (4, 4, 128)])
@pytest.mark.parametrize("N", [1, 300])
def test_steps_that_overlap_are_as_steps_that_wait(cases, N, H, kv, K):
    """The programs of a step read the state that the step before wrote, on whatever processors that was."""
    torch.manual_seed(0)
    T, C = 50, (H + 2 * kv) * K
    qkv, decay, beta = (cases.normal(T, N, 1, *sizes, dtype=BF16) for sizes in ((C,), (H, K), (H,)))
    weight, gates = cases.normal(C, 4, dtype=BF16), {"A_log": cases.normal(H), "dt_bias": cases.normal(H * K)}
    before = cases.normal(N, H, K, K), cases.normal(N, C, 3, dtype=BF16)
    state, past = (part.clone() for part in before)
    outs = torch.empty(T, N, 1, H, K, device=DEVICE, dtype=BF16)

    def step(token):
        decode_step(
            qkv[token], decay[token], beta[token], state, rule=Rule("bounded"), heads=Heads(H, kv, kv),
            convolution=Convolution(weight, past, None, "silu"), out=outs[token], **gates,
        )  # fmt: skip

    for token in range(T):
        step(token)
        torch.cuda.synchronize()
    expected = [part.clone() for part in (outs, state, past)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for token in range(T):
            step(token)
    for launch in (graph.replay, lambda: [step(token) for token in range(T)], graph.replay):
        outs.zero_()
        state.copy_(before[0])
        past.copy_(before[1])
        launch()
        torch.cuda.synchronize()
        for found, right in zip((outs, state, past), expected, strict=True):
            assert torch.equal(found, right)


def test_tokens_after_the_last_document_are_not_read(cases):
    """The public ops refuse them; the kernels, which may get a longer buffer, leave them alone."""
    rule, extra = Rule("softplus"), 70
    x = cases.draw(rule, B=1, T=sum(LENGTHS), K=128)
    grads = cases.upstream(x, len(LENGTHS))
    state = cases.normal(len(LENGTHS), 2, 128, 128)
    chunks = Chunks.of(LENGTHS, DEVICE)
    expected = cases.run(x, rule, state, grads, chunks)

    def longer(part):
        return F.pad(part, (0, 0) * (part.ndim - 2) + (0, extra), value=float("nan"))

    wide = x._replace(**{name: longer(getattr(x, name)) for name in cases.TENSORS[:5]})
    found = cases.run(wide, rule, state, (longer(grads[0]), grads[1]), chunks)
    for name, part in expected.items():
        here = found[name][:, : part.shape[1]] if found[name].shape != part.shape else found[name]
        assert torch.equal(here, part), name


@pytest.mark.parametrize("impl", list(Impl))
def test_packed_tokens_that_belong_to_no_document_are_refused(cases, impl):
    rule = Rule("bounded")
    x = cases.draw(rule, B=1, T=100)
    segments = Segments([30, 60], device=DEVICE)
    with pytest.raises(ValueError, match="90 tokens"):
        chunk_kda(*x[:5], gate="bounded", a_log=x.A_log, dt_bias=x.dt_bias, segments=segments, impl=impl)


def test_a_thousand_documents_of_one_token(cases):
    """Documents of one token are rows of one token; some are empty."""
    rule = Rule("bounded")
    lengths = [0 if number % 97 == 5 else 1 for number in range(1011)]
    kept = torch.tensor([bool(length) for length in lengths], device=DEVICE)
    x = cases.draw(rule, B=1, T=sum(lengths), H=2, K=64)
    assert x.q.shape[1] == 1000
    state = cases.normal(len(lengths), 2, 64, 64)
    grads = cases.upstream(x, len(lengths))
    found = cases.run(x, rule, state, grads, Chunks.of(lengths, DEVICE))
    rows = x._replace(**{name: getattr(x, name).transpose(0, 1) for name in cases.TENSORS[:5]})
    expected = cases.differentiate(rows, rule, state[kept], (grads[0].transpose(0, 1), grads[1][kept]))
    assert torch.equal(found["last"][~kept], state[~kept])
    assert torch.equal(found["d state"][~kept], grads[1][~kept])
    errors = {}
    for name, part in expected.items():
        mine = found[name]
        if name in ("last", "d state"):
            mine = mine[kept]
        elif name not in SUMMED:
            mine = mine.transpose(0, 1)
        errors[name] = cases.error(mine, part)
    print("\n" + table(errors))
    assert not [name for name, value in errors.items() if value > SUMMED.get(name, TOLERANCE[BF16])]


PAIRS = [(K, V) for K in (64, 96, 128, 256) for V in (64, 96, 128, 256) if K != V]


@pytest.mark.parametrize(("K", "V"), PAIRS)
def test_keys_and_values_of_different_width(cases, K, V):
    rule = Rule("softplus" if (K + V) % 64 else "bounded")
    x = cases.draw(rule, B=1, T=130, K=K, V=V)
    state, grads = cases.normal(1, 2, K, V), cases.upstream(x)
    found, expected = cases.run(x, rule, state, grads), cases.differentiate(x, rule, state, grads)
    errors = {name: cases.error(found[name], part) for name, part in expected.items()}
    print(f"\nK {K}, V {V}: {table(errors)}")
    assert not [name for name, value in errors.items() if not value < SUMMED.get(name, TOLERANCE[BF16])]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("gate", ["bounded", "softplus"])
def test_errors_beside_that_of_rounding_the_right_answer(cases, gate, dtype):
    rule = Rule(gate)
    x = cases.draw(rule, T=500, H=2, K=128, dtype=dtype)
    grads = cases.upstream(x)
    found, expected = cases.run(x, rule, None, grads), cases.differentiate(x, rule, None, grads)
    print(f"\n{gate}, {dtype}: error, and how many times that of rounding the float64 answer")
    for name, part in expected.items():
        ours, least = cases.error(found[name], part), cases.error(part.to(found[name].dtype), part)
        ratio = f"{ours / least:5.2f}" if found[name].dtype == dtype else "    -"
        print(f"  {name:10} {ours:.2e}  {ratio}")
        assert ours < SUMMED.get(name, TOLERANCE[dtype]), name


def saturated(value):
    return lambda x: torch.full_like(x, value)


def some_at(value):
    def change(x):
        changed = x.clone()
        changed[..., ::10] = value
        return changed

    return change


# log-decays, or what a gate makes them of
GATES = {
    "none": {
        "no decay": saturated(0.0),
        "almost no decay": saturated(-1e-6),
        "five everywhere": saturated(-5.0),
        "none to eight": lambda x: -8 * torch.rand_like(x),
        "normal, eight": lambda x: -8 * torch.randn_like(x).abs(),
        "some forget at once": some_at(-1000.0),
    },
    "bounded": {
        "no decay": saturated(-60.0),
        "five everywhere": saturated(60.0),
        "uniform, eight": lambda x: 16 * torch.rand_like(x) - 8,
        "normal, eight": lambda x: 8 * torch.randn_like(x),
        "some at the bound": some_at(1000.0),
    },
}
GATES["softplus"] = GATES["bounded"]


@pytest.mark.parametrize(("gate", "name"), [(gate, name) for gate in GATES for name in GATES[gate]])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_result_is_right_with_extreme_gates(cases, gate, name, dtype):
    rule = Rule(gate)
    x = cases.draw(rule, B=1, T=200, H=2, K=64, dtype=dtype)
    torch.manual_seed(2)
    x = x._replace(decay=GATES[gate][name](x.decay))
    if gate != "none":
        # so that the values above are what the gate gets
        x = x._replace(dt_bias=torch.zeros_like(x.dt_bias))
    state, grads = cases.normal(1, 2, 64, 64), cases.upstream(x)
    found, expected = cases.run(x, rule, state, grads), cases.differentiate(x, rule, state, grads)
    assert not clean(found)
    # A gate at its end has no gradient, and what is left of it underflows.
    errors = {key: cases.error(found[key], part, floor=1e-5) for key, part in expected.items()}
    print(f"\n{gate}, {name}, {dtype}: {table(errors)}")
    # Where channels forget at once, the gradient of their decay is zero, to the accuracy of terms that are not.
    # A gate's parameters weigh that with its steepness, and A_log with log-decays down to -200.
    tolerance = dict.fromkeys(errors, 2 * TOLERANCE[dtype])
    tolerance |= {"d decay": 5e-2, "d dt_bias": 5e-2, "d A_log": 0.1}
    assert not {key: value for key, value in errors.items() if not value < tolerance[key]}


@pytest.mark.parametrize(("dtype", "size"), [(BF16, 1e4), (BF16, 1e-4), (FP16, 1e3)])
@pytest.mark.parametrize("gate", ["bounded", "softplus"])
def test_values_of_any_size(cases, gate, dtype, size):
    rule = Rule(gate)
    x = cases.draw(rule, B=1, T=200, H=2, K=128, dtype=dtype)
    x = x._replace(v=(x.v * size).to(dtype))
    state, grads = cases.normal(1, 2, 128, 128) * size, cases.upstream(x)
    # in float16, so that the gradients of q and k stay in range
    grads = (grads[0] / size**0.5, grads[1] / size**0.5)
    found, expected = cases.run(x, rule, state, grads), cases.differentiate(x, rule, state, grads)
    assert not clean(found)
    errors = {name: cases.error(found[name], part) for name, part in expected.items()}
    print(f"\n{gate}, values times {size:g}: {table(errors)}")
    assert not [name for name, value in errors.items() if not value < SUMMED.get(name, 2 * TOLERANCE[dtype])]


def capture(step):
    """Record a step after warming up beside the graph's stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def check_replays(step, inputs):
    """Compare replays on new inputs with eager calls, bit by bit."""
    graph, results = capture(step)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for part in inputs:
                part.copy_(torch.randn_like(part))
        for part in results:
            part.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [part.clone() for part in results]
        for one, other in zip(replayed, step(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [150, 8300])
def test_forward_and_backward_replay_in_a_cuda_graph(cases, packed, T):
    """A sequence longer than 8,192 tokens is scanned in spans."""
    rule = Rule("bounded")
    lengths = [T - 67, 0, 1, 66]
    x = cases.draw(rule, B=1, T=T, H=2, K=128)
    segments = Segments(lengths, device=DEVICE) if packed else None
    number = len(lengths) if packed else 1
    state = cases.normal(number, 2, 128, 128)
    grads = cases.upstream(x, number)
    leaves = [part.requires_grad_() for part in (*x, state) if part is not None]
    gates = {"gate": "bounded", "a_log": x.A_log, "dt_bias": x.dt_bias}

    def step():
        result = chunk_kda(*x[:5], **gates, state=state, segments=segments, impl=Impl.TRITON)
        return [part.detach() for part in result] + list(torch.autograd.grad(list(result), leaves, grads))

    check_replays(step, [*x[:5], state])


def test_convolution_and_norm_replay_in_a_cuda_graph(cases):
    torch.manual_seed(0)
    x, weight, bias = cases.normal(2, 150, 192, dtype=BF16), cases.normal(192, 4), cases.normal(192)
    gain, gate = cases.normal(64), cases.normal(2, 150, 192, dtype=BF16)
    leaves = [part.requires_grad_() for part in (x, weight, bias, gain, gate)]
    grad = cases.normal(2, 150, 192, dtype=BF16)

    def step():
        mixed, _ = causal_conv(x, weight, bias, activation="silu", impl=Impl.TRITON)
        out = gated_rms_norm(mixed.unflatten(-1, (3, 64)), gain, gate, impl=Impl.TRITON)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    check_replays(step, [x, gate])


class Decoding:
    """Hold the inputs and states of a layer's steps."""

    def __init__(self, cases, N=3, H=4, kv=2, K=64, T=1):
        torch.manual_seed(0)
        C = (H + 2 * kv) * K
        self.inputs = [cases.normal(N, T, *sizes, dtype=BF16) for sizes in ((C,), (H, K), (H,), (H * K,))]
        self.sizes = [H * K, kv * K, kv * K]
        taps = [[*cases.normal(C, *width).split(self.sizes)] for width in ((4,), ())]
        self.settings = {
            **{"gate": "bounded", "a_log": cases.normal(H) * 0.3, "dt_bias": cases.normal(H * K) - 2},
            **{"conv_weight": taps[0], "conv_bias": taps[1], "conv_activation": "silu"},
            **{"output_activation": "sigmoid", "impl": "triton"},
        }
        self.gain = cases.normal(K)
        self.states = [cases.normal(N, H, K, K), cases.normal(N, C, 3, dtype=BF16)]

    def step(self, state, past, lives=None):
        qkv, decay, beta, gate = self.inputs
        with torch.no_grad():
            return decode_delta_rule(
                *qkv.split(self.sizes, 2),
                *(decay, beta, state),
                **self.settings,
                conv_state=past,
                norm_weight=self.gain,
                output_gate=gate,
                lives=lives,
            )


@pytest.mark.parametrize("T", [1, 4])
def test_decoding_replays_in_a_cuda_graph_and_walks_on(cases, T):
    layer = Decoding(cases, T=T)
    graph, out = capture(lambda: layer.step(*layer.states))
    eager = [part.clone() for part in layer.states]
    for seed in range(8):
        torch.manual_seed(seed)
        for part in layer.inputs:
            part.copy_(torch.randn_like(part))
        graph.replay()
        expected = layer.step(*eager)
        assert torch.equal(out, expected)
        assert all(torch.equal(one, other) for one, other in zip(layer.states, eager, strict=True))


@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("N", [5, 300])
@pytest.mark.parametrize("T", [1, 3])
def test_a_replayed_step_skips_the_rows_that_have_no_sequence_then(cases, N, kv, T):
    """Which rows those are is written right before, by a kernel of torch; and again before the next step."""
    layer = Decoding(cases, N, kv=kv, T=T)
    positions = torch.zeros(N, dtype=torch.int64, device=DEVICE)

    def step():
        return [layer.step(*layer.states, lives) for lives in (positions >= 0, positions > 0)]

    graph, outs = capture(step)
    for seed in range(8):
        torch.manual_seed(seed)
        positions.copy_(torch.randint(-1, 2, (N,)))
        inputs = [torch.randn_like(part) for part in layer.inputs]
        states = [torch.randn_like(part) for part in layer.states]
        right = [part.clone() for part in states]
        expected = []
        for lives in (positions >= 0, positions > 0):
            before = [part.clone() for part in right]
            for part, new in zip(layer.inputs, inputs, strict=True):
                part.copy_(new)
            # all rows, by the same compiled kernel
            out = layer.step(*right, torch.ones_like(lives))
            expected.append(torch.where(lives[:, None, None, None], out, 0))
            for part, old in zip(right, before, strict=True):
                part[~lives] = old[~lives]
        # of rows that never live nothing is used, and nothing changes
        never = positions < 0
        odd = torch.arange(N, device=DEVICE) % 2 == 1
        for part, new in zip(layer.inputs, inputs, strict=True):
            part.copy_(new)
            part[never] = torch.nan
        for part, new, wanted in zip(layer.states, states, right, strict=True):
            for one in (new, wanted):
                one[never & odd] = torch.nan
            part.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        for found, wanted in zip(outs, expected, strict=True):
            assert torch.equal(found, wanted)
        for found, wanted in zip(layer.states, right, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("N", [1, 40, 300])
def test_steps_that_overlap_wait_for_each_other(cases, N, replayed):
    """A step may be placed while the one before it runs; here every one needs what that one writes."""
    layer = Decoding(cases, N)

    def walk(states, wait):
        outs = []
        for _ in range(20):
            outs.append(layer.step(*states))
            # from the output to the next step's input, by a kernel that waits for nothing but the stream
            layer.inputs[3].copy_(outs[-1].flatten(2))
            wait()
            outs.append(layer.step(*states))
            wait()
        return outs

    gate = layer.inputs[3].clone()
    one, other = ([part.clone() for part in layer.states] for _ in range(2))
    expected = walk(one, torch.cuda.synchronize)
    layer.inputs[3].copy_(gate)
    if replayed:
        before = [part.clone() for part in other]
        graph, outs = capture(lambda: walk(other, lambda: None))
        layer.inputs[3].copy_(gate)
        for part, start in zip(other, before, strict=True):
            part.copy_(start)
        graph.replay()
    else:
        outs = walk(other, lambda: None)
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(outs, expected, strict=True))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))

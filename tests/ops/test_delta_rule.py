"""Laws of the general delta rule: chunked equals recurrent equals independent oracles, forward and backward."""

import pytest
import torch

from gendistill.ops import Impl, Segments, chunk_kda, gated_rms_norm, l2norm
from gendistill.ops.reference.delta_rule import chunk_delta_rule, recurrent_delta_rule

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 130]


def make_inputs(batch=2, length=20, heads=4, key_heads=2, value_heads=2, channels=8, values=6, *, decay="channel",
                erase="scalar", write="scalar", dtype=torch.float64, seed=0, strength=1.0):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=dtype)  # noqa: E731
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    total = max(heads, value_heads)
    gate_shape = {"scalar": (batch, length, total), "key": (batch, length, total, channels)}
    gate_shape["value"] = (batch, length, total, values)
    return {
        "q": l2norm(randn(batch, length, heads, channels)),
        "k": l2norm(randn(batch, length, key_heads, channels)),
        "v": randn(batch, length, value_heads, values),
        "log_decay": {
            "none": None,
            "scalar": -strength * rand(*gate_shape["scalar"]),
            "channel": -strength * rand(*gate_shape["key"]),
        }[decay],
        "erase": {"none": None, "scalar": rand(*gate_shape["scalar"]), "channel": rand(*gate_shape["key"])}[
            erase
        ],
        "write": rand(*gate_shape["scalar" if write == "scalar" else "value"]),
        "state": randn(batch, total, channels, values),
    }


def naive(q, k, v, log_decay, erase, write, state):
    """One head, one token at a time, matrices written out: independent of the code under test."""
    batch, length, heads, channels = q.shape[0], q.shape[1], max(q.shape[2], v.shape[2]), q.shape[3]
    out = torch.zeros(batch, length, heads, v.shape[3], dtype=q.dtype)
    last = torch.zeros_like(state)
    for b in range(batch):
        for h in range(heads):
            memory = state[b, h].clone()
            query_head, key_head, value_head = (h // (heads // t.shape[2]) for t in (q, k, v))
            for t in range(length):
                key, value = k[b, t, key_head], v[b, t, value_head]
                decay = torch.ones(channels, dtype=q.dtype)
                if log_decay is not None:
                    decay = decay * log_decay[b, t, h].exp()
                memory = torch.diag(decay) @ memory
                target = write[b, t, h] * value
                if erase is not None:
                    target = target - (erase[b, t, h] * key) @ memory
                memory = memory + torch.outer(key, target)
                out[b, t, h] = (q[b, t, query_head] @ memory) * channels**-0.5
            last[b, h] = memory
    return out, last


@pytest.mark.parametrize("write", ["scalar", "channel"])
@pytest.mark.parametrize("erase", ["none", "scalar", "channel"])
@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_recurrent_matches_written_out_matrices(decay, erase, write):
    inputs = make_inputs(length=7, decay=decay, erase=erase, write=write)
    out, state = recurrent_delta_rule(**inputs)
    expected_out, expected_state = naive(**inputs)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("write", ["scalar", "channel"])
@pytest.mark.parametrize("erase", ["none", "scalar", "channel"])
@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_chunk_matches_recurrent_for_every_gate(decay, erase, write):
    inputs = make_inputs(length=37, decay=decay, erase=erase, write=write)
    for ours, theirs in zip(chunk_delta_rule(**inputs), recurrent_delta_rule(**inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("floor", [None, -5.0])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunk_matches_recurrent_for_every_length(length, floor):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        inputs = make_inputs(length=length, dtype=dtype, strength=5.0)
        chunked = chunk_delta_rule(**inputs, log_decay_floor=floor)
        for ours, theirs in zip(chunked, recurrent_delta_rule(**inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("heads", "key_heads", "value_heads"), [(4, 4, 4), (6, 2, 2), (2, 2, 4), (3, 1, 3)])
def test_grouped_heads_read_head_h_over_group(heads, key_heads, value_heads):
    inputs = make_inputs(length=19, heads=heads, key_heads=key_heads, value_heads=value_heads)
    for ours, theirs in zip(chunk_delta_rule(**inputs), naive(**inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("floor", [None, -1.0])
def test_gradients_of_both_forms_agree(floor):
    grads = []
    for run in (lambda **x: chunk_delta_rule(**x, log_decay_floor=floor), recurrent_delta_rule):
        inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(length=21).items()}
        out, state = run(**inputs)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        ((out * weights).sum() + state.square().sum()).backward()
        grads.append({name: tensor.grad for name, tensor in inputs.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=1e-8, msg=name)


def test_gradcheck_of_the_chunked_form():
    inputs = make_inputs(batch=1, length=5, heads=2, key_heads=1, value_heads=1, channels=3, values=2,
                         erase="channel", write="channel")  # fmt: skip
    names = list(inputs)
    tensors = tuple(inputs[name].requires_grad_() for name in names)

    def run(*values):
        return tuple(chunk_delta_rule(**dict(zip(names, values, strict=True)), chunk_size=2))

    assert torch.autograd.gradcheck(run, tensors, atol=1e-7)


@pytest.mark.parametrize("floor", [None, -5.0])
def test_extreme_decay_stays_finite(floor):
    inputs = make_inputs(length=64, dtype=torch.float32)
    inputs["log_decay"] = torch.full_like(
        inputs["log_decay"], -1e4 if floor is None else floor
    ).requires_grad_()
    inputs["q"].requires_grad_()
    out, state = chunk_delta_rule(**inputs, log_decay_floor=floor)
    (out.sum() + state.sum()).backward()
    for tensor in (out, state, inputs["log_decay"].grad, inputs["q"].grad):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("lengths", [[5, 0, 33, 1, 16], [1], [0, 7], [40, 2, 2]])
def test_packed_documents_equal_separate_ones(lengths):
    """Values, states and gradients; empty and one-token documents included."""
    inputs = make_inputs(batch=1, length=sum(lengths))
    inputs["state"] = torch.randn(len(lengths), *inputs["state"].shape[1:], dtype=torch.float64)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    segments = Segments.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0))
    out, state = chunk_delta_rule(**leaves, segments=segments)
    start, parts, states = 0, [], []
    for index, length in enumerate(lengths):
        piece = {
            name: tensor[:, start : start + length] for name, tensor in leaves.items() if name != "state"
        }
        result = recurrent_delta_rule(**piece, state=leaves["state"][index : index + 1])
        parts.append(result.out)
        states.append(result.state)
        start += length
    torch.testing.assert_close(out, torch.cat(parts, 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(state, torch.cat(states), rtol=0, atol=1e-10)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    packed = torch.autograd.grad((out * weights).sum() + state.sum(), list(leaves.values()))
    separate = torch.autograd.grad(
        (torch.cat(parts, 1) * weights).sum() + torch.cat(states).sum(), list(leaves.values())
    )
    for name, ours, theirs in zip(leaves, packed, separate, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("split", [1, 3, 16, 29])
def test_any_split_of_the_sequence_gives_the_same_result(split):
    inputs = make_inputs(length=30)
    whole = chunk_delta_rule(**inputs)
    state, parts = inputs.pop("state"), []
    for start in range(0, 30, split):
        piece = {name: tensor[:, start : start + split] for name, tensor in inputs.items()}
        out, state = chunk_delta_rule(**piece, state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole.out, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, whole.state, rtol=0, atol=1e-10)


def test_zero_gates_change_nothing_and_full_write_overwrites():
    inputs = make_inputs(length=9, heads=1, key_heads=1, value_heads=1)
    still = dict(inputs, log_decay=torch.zeros_like(inputs["log_decay"]), erase=inputs["erase"] * 0)
    still["write"] = still["erase"]
    torch.testing.assert_close(chunk_delta_rule(**still).state, inputs["state"], rtol=0, atol=0)
    one = torch.ones_like(inputs["write"])
    key = inputs["k"][:, :1].expand_as(inputs["k"])
    written = dict(still, k=key, erase=one, write=one)
    state = chunk_delta_rule(**written).state
    read = torch.einsum("bhkv,bhk->bhv", state, key[:, 0])
    torch.testing.assert_close(read, inputs["v"][:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [3, 70])
def test_kda_matches_the_one_in_transformers(length):
    from transformers.models.kimi_linear import modeling_kimi_linear as theirs

    inputs = make_inputs(length=length, heads=4, key_heads=4, value_heads=4, values=8, dtype=torch.float32)
    q, k, v, decay, beta = (inputs[name] for name in ("q", "k", "v", "log_decay", "write"))
    ours = chunk_kda(q, k, v, decay, beta, state=inputs["state"])
    expected, state = theirs.recurrent_kimi_delta_attention(
        q, k, v, g=decay, beta=beta, initial_state=inputs["state"], output_final_state=True
    )
    torch.testing.assert_close(ours.out, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.state, state, rtol=0, atol=2e-5)


def test_wrong_shapes_are_named():
    inputs = make_inputs(length=4)
    with pytest.raises(ValueError, match="write must be"):
        chunk_delta_rule(**dict(inputs, write=inputs["write"][:, :2]))
    with pytest.raises(ValueError, match="state must have shape"):
        chunk_delta_rule(**dict(inputs, state=inputs["state"][:1]))
    with pytest.raises(ValueError, match="multiple"):
        chunk_delta_rule(**dict(inputs, k=torch.zeros(2, 4, 3, 8, dtype=torch.float64)))


def test_tensors_that_do_not_fit_are_named():
    q, k, v, decay = torch.rand(4, 1, 6, 2, 8)
    beta = torch.rand(1, 6, 2)
    good = {"q": q, "k": k, "v": v, "decay": -decay, "beta": beta}
    for changed, message in (
        ({"k": k[:, :5]}, "k must have shape"),
        ({"decay": -decay[:, :, :1]}, "2 heads of beta do not fit 1 heads of decay"),
        ({"v": torch.rand(1, 6, 3, 8)}, "do not fit 3 heads of v"),
        ({"state": torch.rand(1, 2, 8, 4)}, "state must have shape"),
        ({"segments": Segments([4, 4])}, "one row of 8 tokens"),
        ({"impl": "fast"}, "not a valid Impl"),
    ):
        with pytest.raises(ValueError, match=message):
            chunk_kda(**{**good, **changed})
    assert chunk_kda(**good, impl="reference").out.shape == (1, 6, 2, 8)
    gates = {"a_log": torch.zeros(2), "dt_bias": torch.zeros(16)}
    with pytest.raises(ValueError, match='got "Bounded"'):
        chunk_kda(q, k, v, decay, beta, gate="Bounded", **gates)
    for activation, gate in (("relu", beta), ("none", beta), ("silu", None)):
        with pytest.raises(ValueError, match="activation must be silu or sigmoid with a gate"):
            gated_rms_norm(v, None, gate, activation=activation, impl=Impl.REFERENCE)

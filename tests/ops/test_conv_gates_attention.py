"""Laws of the short convolution, the gates and the attention op."""

import math

import pytest
import torch
import torch.nn.functional as F

from gendistill.ops import (
    Segments,
    bounded_log_decay,
    causal_conv,
    chunk_kda,
    gated_rms_norm,
    l2norm,
    resolve,
    sliding_window_attention,
    softplus_log_decay,
)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (9, 4), (9, 1), (5, 2)])
def test_conv_matches_a_padded_grouped_convolution(length, taps, activation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, length, 3), torch.randn(3, taps), torch.randn(3)
    state = torch.randn(2, 3, taps - 1)
    padded = torch.cat([state, x.transpose(1, 2)], dim=-1)
    expected = F.conv1d(padded, weight[:, None], bias, groups=3).transpose(1, 2)
    expected = F.silu(expected) if activation == "silu" else expected
    out, last = causal_conv(x, weight, bias, activation=activation, state=state)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, padded[..., length:])


@pytest.mark.parametrize("lengths", [[4, 0, 1, 7], [2], [0, 3]])
def test_packed_conv_equals_separate_convolutions(lengths):
    torch.manual_seed(0)
    x = torch.randn(1, sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    weight, state = (
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(len(lengths), 3, 3, dtype=torch.float64),
    )
    segments = Segments(lengths)
    out, last = causal_conv(x, weight, state=state, segments=segments)
    parts = [
        causal_conv(piece, weight, state=state[i : i + 1]) for i, piece in enumerate(x.split(lengths, dim=1))
    ]
    expected = torch.cat([part.out for part in parts], 1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, torch.cat([part.state for part in parts]))
    scale = torch.arange(out.numel(), dtype=torch.float64).view_as(out)
    ours, theirs = (torch.autograd.grad((y * scale).sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_identity_taps_return_the_input():
    x = torch.randn(2, 7, 5)
    weight = torch.zeros(5, 4)
    weight[:, -1] = 1
    assert torch.equal(causal_conv(x, weight, torch.zeros(5)).out, x)


def test_gates_follow_their_formulas_and_bounds():
    raw, a_log, bias = torch.randn(2, 3, 4, 8) * 50, torch.randn(4), torch.randn(32)
    decay = bounded_log_decay(raw, a_log, bias, lower_bound=-5.0)
    assert decay.dtype == torch.float32
    assert (decay >= -5).all()
    assert (decay <= 0).all()
    head, channel = 2, 5
    expected = -math.exp(a_log[head]) * F.softplus(raw[0, 0, head, channel] + bias[head * 8 + channel])
    assert softplus_log_decay(raw, a_log, bias)[0, 0, head, channel] == pytest.approx(
        expected.item(), rel=1e-5
    )
    single = bounded_log_decay(raw.bfloat16(), a_log, bias, lower_bound=-5.0)
    assert single.dtype == torch.float32


def test_l2norm_of_zero_is_zero_and_of_others_is_one():
    x = torch.randn(3, 8)
    x[1] = 0
    norms = l2norm(x).norm(dim=-1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 0.0, 1.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention_matches_a_loop_over_queries(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    out = sliding_window_attention(q, k, v, window=window, key_mask=mask)
    for b in range(2):
        for t in range(4):
            for h in range(4):
                place = 5 + t
                first = 0 if window is None else max(0, place - window + 1)
                keys = [s for s in range(first, place + 1) if mask[b, s]]
                scores = torch.stack([q[b, t, h] @ k[b, s, h // 2] for s in keys]) * 8**-0.5
                expected = sum(p * v[b, s, h // 2] for p, s in zip(scores.softmax(0), keys, strict=True))
                torch.testing.assert_close(out[b, t, h], expected, rtol=1e-4, atol=1e-5)


def test_packed_attention_equals_separate_documents():
    torch.manual_seed(0)
    lengths = [3, 0, 5, 1]
    q, k, v = (torch.randn(1, 9, 2, 4) for _ in range(3))
    out = sliding_window_attention(q, k, v, window=4, segments=Segments(lengths))
    pieces = zip(*(tensor.split(lengths, dim=1) for tensor in (q, k, v)), strict=True)
    expected = torch.cat(
        [sliding_window_attention(*piece, window=4) for piece in pieces if piece[0].shape[1]], 1
    )
    torch.testing.assert_close(out, expected)


def test_ops_are_traced_without_a_break():
    # torch 2.11 cannot trace an enumeration called with its own member
    weight, a_log, dt_bias = torch.randn(24, 4), torch.rand(2), torch.randn(8)

    def step(x, gate, decay, beta):
        impl = resolve("auto", op="delta_rule", device=x.device)
        qkv = causal_conv(x, weight, None, activation="silu", impl=impl)[0]
        q, k, v = qkv.unflatten(-1, (6, 4)).split(2, dim=2)
        settings = {"gate": "bounded", "a_log": a_log, "dt_bias": dt_bias}
        out = chunk_kda(q, k, v, decay, beta, **settings, impl=impl)[0]
        return gated_rms_norm(out, torch.ones(4), gate, eps=1e-6, activation="silu", impl=impl)

    given = torch.randn(1, 5, 24), torch.randn(1, 5, 8), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), step(*given))

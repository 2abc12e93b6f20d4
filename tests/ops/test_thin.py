"""Products of few rows in eager torch: what they are, and what they refuse."""

import pytest
import torch

from gendistill.ops.thin import suits, thin_linear, thin_mlp

EPS = 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_sum_of_products(thin_cases, bias):
    x, matrix, offset = thin_cases.linear(3, 5, 7, bias=bias, dtype=torch.float64)
    expected = torch.stack(
        [torch.stack([(row * weights).sum() for weights in matrix]) + (offset if bias else 0) for row in x]
    )
    torch.testing.assert_close(thin_linear(x, matrix, offset), expected)


@pytest.mark.parametrize("mixed", [True, False])
def test_mlp_is_what_is_written_out(thin_cases, mixed):
    x = thin_cases.mlp(3, 10, 6, mixed=mixed, dtype=torch.float64)
    kept = x.stream.clone()
    torch.testing.assert_close(thin_mlp(*x, eps=EPS), thin_cases.whole(x, eps=EPS))
    assert torch.equal(x.stream, kept)


def test_the_stream_keeps_its_dtype(thin_cases):
    x = thin_cases.mlp(2, 16, 24, stream=torch.float32, dtype=torch.bfloat16)
    out = thin_mlp(*x, eps=EPS)
    assert out.dtype == torch.float32
    assert thin_cases.distance(out, thin_cases.whole(x, eps=EPS)) < 1e-2
    assert thin_mlp(*x._replace(stream=x.stream.bfloat16()), eps=EPS).dtype == torch.bfloat16


def test_a_cpu_keeps_its_own_products():
    with torch.no_grad():
        assert not suits(torch.zeros(1, 8), torch.zeros(8, 8, dtype=torch.bfloat16))


WRONG_LINEAR = {
    "x": ({"x": torch.zeros(8)}, r"x must be \[M, K\], got \[8\]"),
    "matrix": ({"matrix": torch.zeros(4, 7)}, r"matrix must be \[N, 8\], got \[4, 7\]"),
    "bias": ({"bias": torch.zeros(5)}, r"bias must be \[4\], got \[5\]"),
    "dtype": ({"matrix": torch.zeros(4, 8).double()}, "matrix must be float32, got float64"),
    "strides": ({"matrix": torch.zeros(8, 4).T}, r"matrix must be contiguous, got strides \(1, 4\)"),
    "gradient": ({"x": torch.zeros(2, 8, requires_grad=True)}, "thin_linear has no gradients.*no_grad"),
    "impl": ({"impl": "fastest"}, "fastest"),
}


@pytest.mark.parametrize("name", WRONG_LINEAR)
def test_what_does_not_fit_is_refused(name):
    changes, words = WRONG_LINEAR[name]
    given = {"x": torch.zeros(2, 8), "matrix": torch.zeros(4, 8), "bias": torch.zeros(4)}
    thin_linear(**given)
    with pytest.raises(ValueError, match=words):
        thin_linear(**{**given, **changes})


WRONG_MLP = {
    "stream": ({"stream": torch.zeros(1, 2, 8)}, r"stream must be \[M, K\], got \[1, 2, 8\]"),
    "mixed": ({"mixed": torch.zeros(1, 8)}, r"mixed must be \[2, 8\] as the stream, got \[1, 8\]"),
    "norm": ({"norm_weight": torch.zeros(1, 8)}, r"norm_weight must be \[8\], got \[1, 8\]"),
    "odd": ({"gate_up": torch.zeros(5, 8)}, "a gate for every value, got 5 rows"),
    "gate_up": ({"gate_up": torch.zeros(6, 9)}, r"gate_up must be \[N, 8\], got \[6, 9\]"),
    "down": ({"down": torch.zeros(8, 6)}, r"down must be \[8, 3\], got \[8, 6\]"),
    "dtype": ({"down": torch.zeros(8, 3).half()}, "down must be float32, got float16"),
    "gradient": ({"down": torch.zeros(8, 3, requires_grad=True)}, "thin_mlp has no gradients"),
}


@pytest.mark.parametrize("name", WRONG_MLP)
def test_what_does_not_fit_an_mlp_is_refused(name):
    changes, words = WRONG_MLP[name]
    given = {
        "stream": torch.zeros(2, 8),
        "mixed": torch.zeros(2, 8),
        "norm_weight": torch.zeros(8),
        "gate_up": torch.zeros(6, 8),
        "down": torch.zeros(8, 3),
    }
    thin_mlp(**given, eps=EPS)
    with pytest.raises(ValueError, match=words):
        thin_mlp(**{**given, **changes}, eps=EPS)

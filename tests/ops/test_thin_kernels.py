"""The Triton kernels of products of few rows, interpreted on the CPU, against float64."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill.bench.launches import watch
from gendistill.engine.decoder import fuse, release
from gendistill.mixers.base import SequenceInfo
from gendistill.ops import Segments, resolve, thin
from gendistill.ops.thin import thin_linear, thin_mlp
from gendistill.ops.types import THIN_ROWS
from gendistill_kernels.runtime.lookup import Config, forced

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]
EPS = 1e-5
# float16 rounds outputs and hidden values
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3}
ROWS = range(1, THIN_ROWS + 1)
# widths and weights: less than a vector of every lane, tiles that are not full, several of them
SHAPES = [(5, 8), (40, 264), (7, 1000), (37, 128)]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch, cases):
    monkeypatch.setattr(cases, "DEVICE", "cpu")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_linear_matches_float64(thin_cases, rows, N, K):
    for dtype, bias in ((torch.float32, True), (torch.float16, False))[: 2 if K < 1000 else 1]:
        x, matrix, offset = thin_cases.linear(rows, N, K, bias=bias, dtype=dtype)
        expected = x.double() @ matrix.double().T + (offset.double() if bias else 0)
        found = thin_linear(x, matrix, offset, impl="triton")
        assert found.dtype == dtype
        assert thin_cases.distance(found, expected) < LIMITS[dtype]


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_may_be_apart(thin_cases, rows):
    x, matrix, offset = thin_cases.linear(rows, 24, 40)
    expected = thin_linear(x, matrix, offset, impl="triton")
    wide = torch.full((rows, 100), float("nan"))
    wide[:, 12:52] = x
    assert torch.equal(thin_linear(wide[:, 12:52], matrix, offset, impl="triton"), expected)
    turned = x.T.contiguous().T
    assert torch.equal(thin_linear(turned, matrix, offset, impl="triton"), expected)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_mlp_matches_float64(thin_cases, rows, mixed):
    for (K, inner), dtype, stream in (
        ((40, 24), torch.float32, None),
        ((264, 40), torch.float32, None),
        ((296, 24), torch.float16, torch.float32),
        ((512, 8), torch.float16, None),
    ):
        x = thin_cases.mlp(rows, K, inner, mixed=mixed, stream=stream, dtype=dtype)
        kept = x.stream.clone()
        # in few programs, each of which takes the interpreter its time
        with forced("thin_product", Config(16, 4, 24)):
            found = thin_mlp(*x, eps=EPS, impl="triton")
        assert found.dtype == x.stream.dtype
        assert thin_cases.distance(found, thin_cases.whole(x, eps=EPS)) < LIMITS[dtype]
        assert torch.equal(x.stream, kept)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_weight_of_the_norm_may_have_another_dtype(thin_cases, rows):
    x = thin_cases.mlp(rows, 264, 56, dtype=torch.float16)
    x = x._replace(norm_weight=x.norm_weight.float() + 1e-4, mixed=x.mixed.float())
    found = thin_mlp(*x, eps=EPS, impl="triton")
    assert thin_cases.distance(found, thin_cases.whole(x, eps=EPS)) < LIMITS[torch.float16]


@pytest.mark.parametrize(
    "config", [Config(4, 4, 1), Config(8, 2, 3), Config(64, 4, 64), Config(16, 1, 5, programs=9)]
)
def test_rows_of_a_matrix_may_be_shared_out_in_any_way(thin_cases, config):
    x = thin_cases.mlp(3, 520, 40)
    with forced("thin_product", config):
        found = thin_mlp(*x, eps=EPS, impl="triton")
    assert thin_cases.distance(found, thin_cases.whole(x, eps=EPS)) < LIMITS[torch.float32]


@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_is_read_or_written_around_tensors(cases, thin_cases, rows):
    """What lies beyond tiles, rows and columns is NaN, and stays."""
    guards = cases.Guards()
    x, matrix, offset = (guards.copy(part) for part in thin_cases.linear(rows, 21, 264))
    layer = thin_cases.MLP(*(guards.copy(part) for part in thin_cases.mlp(rows, 264, 24)))
    with guards.everywhere():
        found = thin_linear(x, matrix, offset, impl="triton"), thin_mlp(*layer, eps=EPS, impl="triton")
    assert guards.damage() == []
    assert all(torch.isfinite(part).all() for part in found)


def test_an_mlp_is_two_launches(thin_cases):
    for rows in (1, 4):
        with watch("thin_product") as launches:
            thin_mlp(*thin_cases.mlp(rows, 40, 24), eps=EPS, impl="triton")
        assert len(launches) == 2


def test_what_no_kernel_takes_is_refused(thin_cases):
    assert resolve("auto", op="thin", device=torch.device("cpu")) == "reference"
    for (M, K), dtype, words in (
        ((2, 8), torch.float64, 'got float64; use impl="reference"'),
        ((THIN_ROWS + 1, 8), torch.float32, f"up to {THIN_ROWS} rows, got {THIN_ROWS + 1}"),
        ((2, 12), torch.float32, "multiple of 8 weights, got 12"),
    ):
        x, matrix, _ = thin_cases.linear(M, 8, K, dtype=dtype)
        with pytest.raises(ValueError, match=words):
            thin_linear(x, matrix, impl="triton")
        with pytest.raises(ValueError, match=words):
            thin_mlp(*thin_cases.mlp(M, K, 8, dtype=dtype), eps=EPS, impl="triton")


def test_a_call_without_rows_returns_none(thin_cases):
    x, matrix, _ = thin_cases.linear(0, 24, 16)
    assert thin_linear(x, matrix, impl="triton").shape == (0, 24)
    assert thin_mlp(*thin_cases.mlp(0, 16, 24), eps=EPS, impl="triton").shape == (0, 16)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "config", [Qwen2Config(**SIZES), Qwen3Config(**SIZES, head_dim=16)], ids=["qwen2", "qwen3"]
)
def test_a_fused_decoder_with_few_tokens_computes_what_it_would(monkeypatch, config, tokens):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(0, 97, (1, tokens))
    given = {
        "input_ids": ids,
        "position_ids": torch.arange(tokens)[None],
        "sequences": SequenceInfo(Segments([tokens])),
    }
    fuse(model, torch.float32)
    asked = []

    def suits(x, matrix):
        asked.append(x.numel() // x.shape[-1])
        return not torch.is_grad_enabled()

    with torch.no_grad():
        expected = model.model(**given).last_hidden_state
        monkeypatch.setattr(thin, "suits", suits)
        found = model.model(**given).last_hidden_state
    release(model)
    # qkv, output, gate and up, down: of every layer
    assert asked == [tokens] * 8
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, expected)

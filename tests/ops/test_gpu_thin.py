"""Products of few rows on a GPU: real sizes against float64, CUDA graphs, bits, and weights that change.

``pytest -s`` prints the errors that were measured.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from gendistill.engine.decoder import fuse, release
from gendistill.mixers.base import SequenceInfo
from gendistill.ops import Segments, thin
from gendistill.ops.thin import thin_linear, thin_mlp
from gendistill.ops.types import THIN_ROWS

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
EPS = 1e-6
ROWS = range(1, THIN_ROWS + 1)
# outputs and weights of a row: projections of Qwen3-0.6B and Qwen2.5-0.5B, gates of mixers, and odd ones
SHAPES = [
    *((4096, 1024), (1024, 2048), (1024, 3072), (320, 1024), (2048, 128), (1152, 896), (896, 4864)),
    *((16, 1024), (7, 8), (1000, 1160), (30_000, 896)),
]
# rounding the output costs 1.7e-3 on average over a row; a row's worst case a little more
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_linear_matches_float64(thin_cases, N, K, dtype):
    worst = 0.0
    drawn, matrix, offset = thin_cases.linear(THIN_ROWS, N, K, dtype=dtype, device="cuda")
    for rows in ROWS:
        x, bias = drawn[:rows], offset if rows % 2 else None
        expected = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
        found = thin_linear(x, matrix, bias, impl="triton")
        worst = max(worst, thin_cases.distance(found, expected))
        assert torch.equal(found, thin_linear(x, matrix, bias, impl="triton"))
    print(f"\n{N} x {K} {dtype}: {worst:.1e}")
    assert worst < LIMITS[dtype]


@pytest.mark.parametrize("stream", [None, torch.float32])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("K", "inner"), [(1024, 3072), (896, 4864), (1160, 1000), (128, 8)])
def test_mlp_matches_float64(thin_cases, K, inner, dtype, stream):
    drawn = thin_cases.mlp(THIN_ROWS, K, inner, dtype=dtype, stream=stream, device="cuda")
    if stream is not None:
        drawn = drawn._replace(norm_weight=drawn.norm_weight.float())
    for rows in ROWS:
        mixed = drawn.mixed[:rows] if rows % 3 else None
        x = drawn._replace(stream=drawn.stream[:rows], mixed=mixed)
        kept = x.stream.clone()
        found, usual = (thin_mlp(*x, eps=EPS, impl=impl) for impl in ("triton", "reference"))
        expected = thin_cases.whole(x, eps=EPS)
        off, limit = (thin_cases.distance(part, expected) for part in (found, usual))
        assert off < max(1.3 * limit, LIMITS[torch.float32]), (rows, off, limit)
        assert torch.equal(x.stream, kept)
        assert torch.equal(found, thin_mlp(*x, eps=EPS, impl="triton"))


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_may_be_apart(thin_cases, rows):
    for skip in (8, 5):
        x, matrix, bias = thin_cases.linear(rows, 1000, 1024, dtype=torch.bfloat16, device="cuda")
        wide = torch.full((rows, 3000), float("nan"), dtype=x.dtype, device="cuda")
        wide[:, skip : skip + 1024] = x
        found = thin_linear(wide[:, skip : skip + 1024], matrix, bias, impl="triton")
        expected = x.double() @ matrix.double().T + bias.double()
        assert thin_cases.distance(found, expected) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("rows", ROWS)
def test_a_graph_of_many_layers_follows_its_inputs(thin_cases, rows):
    """Every kernel reads its weights while others still write what it reads besides."""
    K, inner, layers = 1024, 3072, 12
    parts = []
    for layer in range(layers):
        drawn = thin_cases.mlp(rows, K, inner, dtype=torch.bfloat16, device="cuda")
        square = thin_cases.normal(K, K, dtype=torch.bfloat16, device="cuda", seed=10 + layer) / K**0.5
        parts.append((square, drawn.norm_weight, drawn.gate_up, drawn.down))
    first = torch.zeros(rows, K, dtype=torch.bfloat16, device="cuda")

    def run(impl):
        stream = first
        for square, *mlp in parts:
            mixed = thin_linear(stream, square, impl=impl)
            stream = thin_mlp(stream, mixed, *mlp, eps=EPS, impl=impl)
        return stream

    run("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run("triton")
    for seed in range(20):
        first.copy_(thin_cases.normal(rows, K, seed=seed))
        graph.replay()
        kept = out.clone()
        assert torch.equal(kept, run("triton"))
        assert thin_cases.distance(kept, run("reference").double()) < 3e-2
        for _ in range(10):
            graph.replay()
        assert torch.equal(out, kept)


def test_a_call_waits_for_nothing(thin_cases):
    x, matrix, bias = thin_cases.linear(2, 256, 256, dtype=torch.bfloat16, device="cuda")
    layer = thin_cases.mlp(2, 256, 256, dtype=torch.bfloat16, device="cuda")
    for turn in range(2):
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            thin_linear(x, matrix, bias, impl="triton")
            thin_mlp(*layer, eps=EPS, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")


SIZES = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
}
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}


def inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (1, tokens), generator=generator).cuda()
    return {
        "input_ids": ids,
        "position_ids": torch.arange(tokens, device="cuda")[None],
        "sequences": SequenceInfo(Segments([tokens], device="cuda")),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, THIN_ROWS, THIN_ROWS + 1])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_fused_decoder_gives_what_many_rows_give(thin_cases, monkeypatch, family, tokens, dtype):
    """The same tokens alone and as the first of many, parameters in either dtype; arithmetic is bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**SIZES)).cuda().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    exact = model.double().model(inputs(tokens)["input_ids"]).last_hidden_state
    model.to(dtype)
    fuse(model, torch.bfloat16)
    taken, suits = [], thin.suits

    def watched(x, matrix):
        taken.append(suits(x, matrix))
        return taken[-1]

    monkeypatch.setattr(thin, "suits", watched)
    with torch.no_grad():
        found = model.model(**inputs(tokens)).last_hidden_state
        assert set(taken) == {tokens <= THIN_ROWS}
        usual = model.model(**inputs(64)).last_hidden_state[:, :tokens]
    release(model)
    errors = [thin_cases.distance(part, exact) for part in (found, usual)]
    print(f"\n{family} {tokens} {dtype}: {errors[0]:.1e}, of many {errors[1]:.1e}")
    assert errors[0] < 1.3 * errors[1] + 1e-3


def test_weights_that_change_are_read_as_they_are(thin_cases):
    """Read ahead, they must not be those of before; parameters are the matrices themselves here, and copies."""
    torch.manual_seed(0)
    given = inputs(2)
    for dtype, learns in ((torch.bfloat16, False), (torch.float32, True)):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES)).cuda().to(dtype)
        fuse(model, torch.bfloat16, learns=learns)
        with torch.no_grad():
            for _ in range(20):
                for parameter in model.parameters():
                    parameter.mul_(1.01)
                found = model.model(**given).last_hidden_state
                torch.cuda.synchronize()
                assert torch.equal(model.model(**given).last_hidden_state, found)
        release(model)


def test_general_products_agree(thin_cases):
    x, matrix, bias = thin_cases.linear(3, 1000, 1024, dtype=torch.bfloat16, device="cuda")
    found = thin_linear(x, matrix, bias, impl="triton")
    assert thin_cases.distance(found, F.linear(x, matrix, bias).double()) < 2 * LIMITS[torch.bfloat16]

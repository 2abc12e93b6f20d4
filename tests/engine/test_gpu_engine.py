"""Fused decoders on a GPU: as close to float32 as the family's own modules in bfloat16, and kernels against float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("these tests need a GPU", allow_module_level=True)

from gendistill.data.batch import Batch, model_inputs
from gendistill.engine.decoder import fuse, is_fused, release, why_not
from gendistill.ops import Impl, Segments
from gendistill.ops.block import attend, rms_norm

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def load(name):
    """Load a module of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small = load("test_decoder")

WIDE = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = [130, 382, 1, 255, 256]


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (2, 512), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).view(2, 512)
    return Batch(ids, ids.clone(), positions, Segments(LENGTHS), 1024, 1024).to(GPU)


def widened(config):
    """Return a config of head sizes that flash attention takes."""
    values = {**config.to_dict(), **WIDE, "head_dim": 64, "max_position_embeddings": 1024}
    return type(config)(**{key: value for key, value in values.items() if key != "architectures"})


def run(model, *, autocast):
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        hidden = model.model(**model_inputs(batch())).last_hidden_state
    generator = torch.Generator(GPU).manual_seed(2)
    weight = torch.randn(hidden.shape, generator=generator, device=GPU)
    (hidden.float() * weight).sum().backward()
    grads = {
        name: value.grad.float().flatten()
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    return hidden.detach().float(), grads


@pytest.mark.parametrize("family", ["llama with biases", "mistral with a window", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["teacher", "kda", "all kinds"])
def test_as_close_to_float32_as_the_modules_themselves(kind, family, monkeypatch):
    if kind == "all kinds" and family != "mistral with a window":
        pytest.skip(f"{family} has no window for its own attention")
    monkeypatch.setitem(small.FAMILIES, family, widened(small.FAMILIES[family]))
    model = (small.make_teacher(family) if kind == "teacher" else small.make_student(kind, family)).to(GPU)
    exact, exact_grads = run(model, autocast=False)
    plain, plain_grads = run(model, autocast=True)
    assert why_not(model, device=GPU, dtype=torch.bfloat16) is None
    fuse(model, torch.bfloat16)
    found, grads = run(model, autocast=True)
    assert is_fused(model)
    release(model)
    assert grads.keys() == exact_grads.keys()
    error, limit = small.distance(found, exact), small.distance(plain, exact)
    assert error < 1.2 * limit + 1e-3
    every = [torch.cat([each[name] for name in exact_grads]) for each in (grads, plain_grads, exact_grads)]
    error, limit = small.distance(every[0], every[2]), small.distance(every[1], every[2])
    print(f"{kind}, {family}: gradients {error:.2e}, of the family's modules {limit:.2e}")
    assert error < 1.2 * limit + 1e-3
    for name, exact_grad in exact_grads.items():
        error, limit = small.distance(grads[name], exact_grad), small.distance(plain_grads[name], exact_grad)
        assert error < 1.6 * limit + 1e-2, name


@pytest.mark.parametrize("family", ["mistral with a window", "qwen3"])
def test_a_teacher_in_bfloat16(family, monkeypatch):
    monkeypatch.setitem(small.FAMILIES, family, widened(small.FAMILIES[family]))
    model = small.make_teacher(family).to(GPU).requires_grad_(False)
    with torch.no_grad():
        exact = model.model(**model_inputs(batch())).last_hidden_state
        model.bfloat16()
        plain = model.model(**model_inputs(batch())).last_hidden_state
        fuse(model, torch.bfloat16)
        found = model.model(**model_inputs(batch())).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert small.distance(found, exact) < 1.2 * small.distance(plain, exact)


def test_adapters_as_close_to_float32_as_peft_itself(monkeypatch):
    pytest.importorskip("peft")
    adapted = load("test_adapted")
    monkeypatch.setitem(small.FAMILIES, "qwen3", widened(small.FAMILIES["qwen3"]))
    model = adapted.adapt(small.make_student("kda"), "everything").to(GPU)
    exact, exact_grads = run(model, autocast=False)
    plain, plain_grads = run(model, autocast=True)
    fuse(model, torch.bfloat16)
    found, grads = run(model, autocast=True)
    assert is_fused(model)
    release(model)
    assert grads.keys() == exact_grads.keys()
    assert small.distance(found, exact) < 1.2 * small.distance(plain, exact) + 1e-3
    every = [
        torch.cat([each[name].flatten() for name in exact_grads])
        for each in (grads, plain_grads, exact_grads)
    ]
    assert small.distance(every[0], every[2]) < 1.2 * small.distance(every[1], every[2]) + 1e-3


SHAPES = [
    ((16, 8), 128, None),
    ((14, 2), 64, 100),
    ((9, 3), 64, None),
    ((4, 2), 256, None),
    ((4, 1), 80, 64),
]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "channels", "window"), SHAPES)
def test_attention_matches_float64(heads, channels, window, norm):
    torch.manual_seed(0)
    lengths = [300, 1, 211]
    segments, tokens = Segments(lengths, device=GPU), sum(lengths)
    number = heads[0] + 2 * heads[1]
    qkv = torch.randn(tokens, number * channels, device=GPU).bfloat16()
    weights = [torch.rand(channels, device=GPU) + 0.5 if norm else None for _ in range(2)]
    angles = torch.rand(tokens, channels // 2, device=GPU).repeat(1, 2) * 6
    leaves = [None if part is None else part.clone().requires_grad_() for part in (qkv, *weights)]
    exact = [None if part is None else part.double().requires_grad_() for part in (qkv, *weights)]
    settings = {"heads": heads, "window": window, "segments": segments}
    out = attend(*leaves, angles.cos(), angles.sin(), **settings, impl=Impl.TRITON)
    expected = attend(*exact, angles.cos().double(), angles.sin().double(), **settings)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert small.distance(out, expected) < 6e-3
    for leaf, double in zip(leaves, exact, strict=True):
        if leaf is not None:
            assert small.distance(leaf.grad, double.grad) < 1e-2


@pytest.mark.parametrize(("heads", "channels", "window"), SHAPES)
def test_attention_with_room_or_to_documents_of_unknown_lengths_is_attention(heads, channels, window):
    torch.manual_seed(0)
    lengths = [300, 1, 211]
    empty, tokens = [0] * 13, sum(lengths)
    room = Segments([*lengths, *empty], device=GPU, room=16)
    qkv = torch.randn(tokens, (heads[0] + 2 * heads[1]) * channels, device=GPU).bfloat16()
    angles = torch.rand(tokens, channels // 2, device=GPU).repeat(1, 2) * 6
    angles, grad = (
        (angles.cos(), angles.sin()),
        torch.randn(tokens, heads[0] * channels, device=GPU).bfloat16(),
    )
    found = []
    for segments in (Segments(lengths, device=GPU), room, None):
        if segments is None:
            tables = {build: room.table(build) for build in room.builders}
            segments = Segments.unknown(len(room.lengths), tokens, tokens, room.cu_seqlens, tables, room=16)
        leaf = qkv.clone().requires_grad_()
        out = attend(
            leaf, None, None, *angles, heads=heads, window=window, segments=segments, impl=Impl.TRITON
        )
        out.backward(grad)
        found.append((out.detach(), leaf.grad))
    (expected, expected_grad), *others = found
    for out, gradient in others:
        assert torch.equal(out, expected)
        assert torch.equal(gradient, expected_grad)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [576, 896, 1024, 4096])
def test_norms_match_float64(width, stream):
    torch.manual_seed(0)
    x, added = (
        torch.randn(1000, width, device=GPU).to(stream),
        torch.randn(1000, width, device=GPU).bfloat16(),
    )
    weight = torch.rand(width, device=GPU) + 0.5
    leaves = [part.clone().requires_grad_() for part in (x, weight, added)]
    exact = [part.double().requires_grad_() for part in (x, weight, added)]
    total, y = rms_norm(*leaves, eps=1e-6, dtype=torch.bfloat16, impl=Impl.TRITON)
    expected = rms_norm(*exact, eps=1e-6, dtype=torch.float64)
    grads = torch.randn_like(total), torch.randn_like(y)
    torch.autograd.backward((total, y), grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    assert small.distance(y, expected[1]) < 6e-3
    assert small.distance(total, expected[0]) < (1e-6 if stream == torch.float32 else 4e-3)
    for leaf, double in zip(leaves, exact, strict=True):
        assert small.distance(leaf.grad, double.grad) < (6e-3 if leaf.dtype == torch.bfloat16 else 4e-3)

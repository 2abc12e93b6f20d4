"""Launches through the launcher, compiled for a GPU, beside Triton's plain path: the same bits."""

from __future__ import annotations

import functools

import pytest
import torch

from gendistill.ops import causal_conv, chunk_kda
from gendistill.ops.select import Impl

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

from triton.runtime.jit import JITFunction

from gendistill_kernels.runtime.launch import Fixed, Launcher

pytestmark = pytest.mark.gpu


def draw(B, T, H, K, *, offset):
    """Draw inputs that start ``offset`` elements behind an aligned address."""
    torch.manual_seed(0)
    shapes = [(B, T, H, K)] * 4 + [(B, T, H), (H,), (H * K,)]
    dtypes = [torch.bfloat16] * 5 + [torch.float32] * 2
    parts = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        store = torch.randn(torch.Size(shape).numel() + offset, device="cuda").to(dtype)
        parts.append(store[offset:].view(shape).requires_grad_())
    return parts


def run(parts):
    q, k, v, decay, beta, a_log, dt_bias = parts
    settings = {"gate": "softplus", "a_log": a_log, "dt_bias": dt_bias, "impl": Impl.TRITON}
    out, state = chunk_kda(q, k, v, decay, beta, **settings)
    mixed = causal_conv(
        q.flatten(2),
        torch.ones(q.shape[2] * q.shape[3], 4, device=q.device),
        activation="silu",
        impl=Impl.TRITON,
    )
    loss = out.float().square().sum() + state.sum() + mixed.out.float().sum()
    return [out.detach(), state.detach(), mixed.out.detach(), *torch.autograd.grad(loss, parts)]


@pytest.fixture
def plain(monkeypatch):
    """Collect launches that go through Triton's plain path."""
    found, run = [], JITFunction.run

    def counted(self, *arguments, **settings):
        found.append(self)
        return run(self, *arguments, **settings)

    monkeypatch.setattr(JITFunction, "run", counted)
    return found


def go_plain(monkeypatch):
    """Let every launch take Triton's plain path."""

    def launch(self, grid):
        if isinstance(grid, Fixed):
            return functools.partial(self.function[grid.grid], **grid.constants)
        return self.function[grid]

    monkeypatch.setattr(Launcher, "__getitem__", launch)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(2, 200, 3, 128), (1, 63, 2, 64)])
def test_launches_write_the_bits_of_plain_ones(shape, offset, plain, monkeypatch):
    # the first call compiles, later ones must not need Triton's plain path
    parts = draw(*shape, offset=offset)
    run(parts)
    plain.clear()
    rounds = [run(parts) for _ in range(2)]
    assert not plain
    go_plain(monkeypatch)
    expected = run(parts)
    assert len(plain) >= 7
    for found in rounds:
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_is_done_on_the_gpu_of_its_inputs():
    first = draw(2, 150, 2, 64, offset=0)
    second = [part.detach().to("cuda:1").requires_grad_() for part in first]
    assert torch.cuda.current_device() == 0
    for one, other in zip(run(first), run(second), strict=True):
        assert other.device == torch.device("cuda:1")
        assert torch.equal(one, other.to("cuda:0"))


def test_a_launch_goes_to_the_current_stream(plain):
    parts = draw(1, 64, 1, 64, offset=0)
    expected = run(parts)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        settings = {"gate": "softplus", "a_log": parts[5], "dt_bias": parts[6], "impl": Impl.TRITON}
        chunk_kda(*parts[:5], **settings)
        plain.clear()
        stream.wait_stream(torch.cuda.current_stream())
        # a launch to any other stream would not be captured
        with torch.cuda.graph(graph, stream=stream):
            out, _ = chunk_kda(*parts[:5], **settings)
        graph.replay()
    assert not plain
    assert torch.equal(out, expected[0])

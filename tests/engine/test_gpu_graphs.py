"""What a recording that fails leaves behind on a GPU: nothing."""

from __future__ import annotations

import gc

import pytest
import torch

from gendistill.engine.graphs import recorded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="these tests need a GPU"),
]
DEVICE = torch.device("cuda", 0)


def fail(pool):
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError),
        recorded(graph, device=DEVICE, pool=pool, stream=torch.cuda.Stream(DEVICE)),
    ):
        # waits for the device, which a recording must not
        torch.ones(1 << 20, device=DEVICE).sum().item()
    return graph


def check_that_all_is_well():
    torch.cuda.empty_cache()
    assert torch.empty(1 << 20).pin_memory().is_pinned()
    assert torch.rand(3, device=DEVICE).max() < 1
    x, graph = torch.ones(8, device=DEVICE), torch.cuda.CUDAGraph()
    with recorded(graph, device=DEVICE, pool=torch.cuda.graph_pool_handle()):
        y = x * 2 + torch.rand(8, device=DEVICE)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
    assert y.min() >= 2


@pytest.mark.parametrize("keeps_graph", [False, True])
def test_the_stream_the_allocator_and_draws_go_on(keeps_graph):
    before = torch.cuda.current_stream()
    graph = fail(torch.cuda.graph_pool_handle())
    if not keeps_graph:
        del graph
        gc.collect()
    assert torch.cuda.current_stream() == before
    check_that_all_is_well()


def test_pools_can_go_and_memory_comes_back():
    x = torch.ones(8, device=DEVICE)
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    pool, good = torch.cuda.MemPool(), torch.cuda.CUDAGraph()
    with recorded(good, device=DEVICE, pool=pool.id):
        y = x * 2
    fail(pool.id)
    other, another = torch.cuda.MemPool(), torch.cuda.CUDAGraph()
    with recorded(another, device=DEVICE, pool=other.id):
        z = x * 3
    good.replay()
    assert y.tolist() == [2] * 8
    another.replay()
    assert z.tolist() == [3] * 8
    del good, another, y, z
    gc.collect()
    # while a recording is not over, the process would be aborted here
    del pool, other
    gc.collect()
    check_that_all_is_well()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved + (4 << 20)

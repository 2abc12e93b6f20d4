"""CUDA graphs that leave nothing behind where they cannot be recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def recorded(
    graph: torch.cuda.CUDAGraph, *, device: torch.device, pool: Any, stream: Any = None
) -> Iterator[None]:
    """Record what is launched meanwhile as a graph; nothing of it runs.

    If something in it waits for the device, the end of the recording fails as well, and torch leaves undone what comes
    after it: the recording's stream stays the current one, its device draws no random numbers any more, and the process
    is aborted when memory of any recording is given back. Here all that is done; but the pool takes no recording again.

    Args:
        graph: Nothing has been recorded as it yet.
        device: Of the work.
        pool: Whose memory it takes, as ``torch.cuda.graph_pool_handle`` and the ``id`` of a pool say it; after an error
            the next needs another.
        stream: To record on; None: torch's own.
    """
    # other threads go on meanwhile
    recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)), recording:
            yield
    except BaseException:
        if not _has_ended(graph):
            _end(graph, device, pool)
        raise


# recordings that could not be ended: the allocator of pinned memory goes on asking them whether they are recorded
_UNENDED: list[torch.cuda.CUDAGraph] = []


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _end(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Do what the end of a recording and the graph, when it is let go, would have done."""
    _UNENDED.append(graph)
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        # it had not begun
        return
    torch._C._cuda_releasePool(index, pool)
    # the state of random numbers takes itself for recorded; a copy does not
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())

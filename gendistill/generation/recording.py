"""Work that is recorded as CUDA graphs, and errors that say that memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gendistill.engine.graphs import recorded

R = TypeVar("R")


class Recorder:
    """Records work of one model as CUDA graphs; no two of them run at a time, so that they share their memory.

    Args:
        device: Of the model, which need not be the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None

    @property
    def stream(self) -> Any:
        """The stream of all recordings: memory that one stream has had is never given to another."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def __call__(self, work: Callable[[], R]) -> tuple[R, torch.cuda.CUDAGraph]:
        """Record work; returns what it returns, to be overwritten by other graphs, and the graph.

        Nothing of what is recorded has run. Kernels that it needs must have run before.
        """
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with recorded(graph, device=self._device, pool=self._pool, stream=self.stream):
                made = work()
        except BaseException:
            # those before keep theirs
            self._pool = None
            raise
        return made, graph

    def forget(self) -> None:
        """Have the next graph not share the memory of those before, all of which are gone."""
        # a pool that no graph uses any more cannot be given to another
        self._pool = None


def ran_out(error: BaseException) -> bool:
    """Say whether memory has run out; the end of a recording in which it did fails too, with another error."""
    return any(
        isinstance(each, torch.OutOfMemoryError)
        or (isinstance(each, RuntimeError) and any(words in str(each) for words in _RAN_OUT))
        for each in (error, error.__context__)
    )


# what says so elsewhere: launches of kernels, and libraries of matrix products
_RAN_OUT = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

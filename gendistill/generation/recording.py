"""Work that is recorded as CUDA graphs, and errors that say that memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

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
        # other threads prepare batches meanwhile, where the model is being trained
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
        )
        # the end of a recording that has failed fails too, and would leave its stream the current one
        try:
            with torch.cuda.stream(torch.cuda.current_stream(self._device)), recording:
                made = work()
        except BaseException:
            if not _has_ended(graph):
                # the allocator goes on asking it, and lets no other recording into its pool
                _UNENDED.append(graph)
                self._pool = None
            raise
        self._pool = self._pool or graph.pool()
        return made, graph

    def forget(self) -> None:
        """Have the next graph not share the memory of those before, all of which are gone."""
        # a pool that no graph uses any more cannot be given to another
        self._pool = None


# recordings that could not be ended, because something in them waits for the device: freed, they would still be asked
_UNENDED: list[torch.cuda.CUDAGraph] = []


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def ran_out(error: BaseException) -> bool:
    """Say whether memory has run out; the end of a recording in which it did fails too, with another error."""
    return any(
        isinstance(each, torch.OutOfMemoryError)
        or (isinstance(each, RuntimeError) and any(words in str(each) for words in _RAN_OUT))
        for each in (error, error.__context__)
    )


# what says so elsewhere: launches of kernels, and libraries of matrix products
_RAN_OUT = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

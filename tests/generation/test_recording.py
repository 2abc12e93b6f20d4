"""What recordings share, and what one that fails leaves behind; CUDA is played on the host."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from gendistill.engine import graphs
from gendistill.generation.recording import Recorder, ran_out


@pytest.fixture
def cuda(monkeypatch):
    """As torch's own: a recording that something has broken fails at its end, too, and leaves its stream current."""
    seen = SimpleNamespace(current="main", recordings=[], broken=False, handles=count(), calls=[])

    class Generator:
        def clone_state(self):
            return "copy"

        def graphsafe_set_state(self, state):
            seen.calls.append(("random", state))

    class Graph:
        ended = False

        def pool(self):
            if not self.ended:
                raise RuntimeError("pool() without a preceding successful capture")
            return self.of

    class Stream:
        def __init__(self, device):
            self.device = device

    @contextmanager
    def stream(wanted):
        before, seen.current = seen.current, wanted
        try:
            yield
        finally:
            seen.current = before

    class Record:
        def __init__(self, graph, *, pool, stream, capture_error_mode):
            self.graph, self.pool, self.stream = graph, pool, stream

        def __enter__(self):
            seen.current = self.stream
            self.graph.of = self.pool
            seen.recordings.append((self.graph, self.pool, self.stream))

        def __exit__(self, *_):
            if seen.broken:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.graph.ended = True
            seen.current = "main"

    for name, value in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": stream,
        "graph": Record,
        "current_stream": lambda _: seen.current,
        "graph_pool_handle": lambda: f"pool {next(seen.handles)}",
        "current_device": lambda: 0,
        "default_generators": [Generator()] * 2,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("endAllocateToPool", "releasePool"):
        monkeypatch.setattr(
            torch._C, f"_cuda_{name}", lambda *a, name=name: seen.calls.append((name, *a)), raising=False
        )
    monkeypatch.setattr(graphs, "_UNENDED", [])
    return seen


def fails(error):
    def work():
        raise error

    return work


def test_all_graphs_share_a_stream_of_the_models_device_and_a_pool(cuda):
    record = Recorder(torch.device("cuda:1"))
    made = [record(lambda number=number: number) for number in range(3)]
    assert [value for value, _ in made] == [0, 1, 2]
    assert {stream for *_, stream in cuda.recordings} == {record.stream}
    assert record.stream.device == torch.device("cuda:1")
    assert [pool for _, pool, _ in cuda.recordings] == ["pool 0"] * 3
    record.forget()
    record(lambda: None)
    assert cuda.recordings[-1][1] == "pool 1"


def test_a_recording_that_was_ended_leaves_nothing_to_do(cuda):
    record = Recorder(torch.device("cuda"))
    record(lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        record(fails(torch.OutOfMemoryError("no more")))
    record(lambda: None)
    assert not graphs._UNENDED
    assert not cuda.calls


def test_of_a_recording_that_could_not_be_ended_the_end_is_made_up_for(cuda):
    record = Recorder(torch.device("cuda:1"))
    record(lambda: None)
    cuda.broken = True
    with pytest.raises(RuntimeError, match="previous error") as caught:
        record(fails(torch.OutOfMemoryError("no more")))
    assert ran_out(caught.value)
    assert cuda.current == "main"
    cuda.broken = False
    record(lambda: None)
    assert cuda.recordings[-1][1] == "pool 1"
    assert [cuda.recordings[1][0]] == graphs._UNENDED
    ends = [("endAllocateToPool", 1, "pool 0"), ("releasePool", 1, "pool 0"), ("random", "copy")]
    assert cuda.calls == ends

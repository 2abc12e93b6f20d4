"""What recordings share, and what one that fails leaves behind; CUDA is played on the host."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from gendistill.generation import recording
from gendistill.generation.recording import Recorder, ran_out


@pytest.fixture
def cuda(monkeypatch):
    """As torch's own: a recording that something has broken fails at its end, too, and leaves its stream current."""
    seen = SimpleNamespace(current="main", recordings=[], broken=False)

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
            self.graph.of = self.pool or f"pool {len(seen.recordings)}"
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
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(recording, "_UNENDED", [])
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
    assert [pool for _, pool, _ in cuda.recordings] == [None, "pool 0", "pool 0"]
    record.forget()
    record(lambda: None)
    assert cuda.recordings[-1][1] is None


def test_a_recording_that_was_ended_leaves_the_pool_to_others(cuda):
    record = Recorder(torch.device("cuda"))
    record(lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        record(fails(torch.OutOfMemoryError("no more")))
    record(lambda: None)
    assert cuda.recordings[-1][1] == "pool 0"
    assert not recording._UNENDED


def test_a_recording_that_could_not_be_ended_stays_and_keeps_its_pool_for_itself(cuda):
    record = Recorder(torch.device("cuda"))
    record(lambda: None)
    cuda.broken = True
    with pytest.raises(RuntimeError, match="previous error") as caught:
        record(fails(torch.OutOfMemoryError("no more")))
    assert ran_out(caught.value)
    assert cuda.current == "main"
    cuda.broken = False
    record(lambda: None)
    assert cuda.recordings[-1][1] is None
    assert [cuda.recordings[1][0]] == recording._UNENDED

"""Batches that travel as one buffer are the batches, with the index tables that kernels ask for."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from gendistill.bench.documents import synthetic_batch, synthetic_stream
from gendistill.data.batch import Batch
from gendistill.data.feed import Feed, Packed

SETTINGS = {"vocab_size": 257, "seq_len": 64, "mean_tokens": 20, "rows": 4, "seed": 3}


class Table(NamedTuple):
    """A table like those of kernels: tensors of two dtypes, one that is missing, a number."""

    starts: torch.Tensor
    wide: torch.Tensor
    missing: None
    number: int
    inner: tuple[torch.Tensor, int]


def build(lengths: list[int], device: torch.device) -> Table:
    numbers = torch.tensor(lengths, dtype=torch.int32)
    wide = numbers.long().cumsum(0).reshape(1, -1)
    moved = numbers.to(device), wide.to(device)
    return Table(*moved, None, len(lengths), (moved[0][:1], 3))


def build_list(lengths: list[int], device: torch.device) -> list[int]:
    return lengths


def batches() -> list[Batch]:
    return [synthetic_batch(**{**SETTINGS, "seed": seed}) for seed in range(3)]


def assert_same(found: Batch, expected: Batch) -> None:
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        ours, right = getattr(found, name).cpu(), getattr(expected, name).cpu()
        assert ours.dtype == right.dtype
        assert torch.equal(ours, right)
    assert found.segments.lengths == expected.segments.lengths
    for name in ("num_labels", "num_tokens", "document_ids"):
        assert getattr(found, name) == getattr(expected, name)


def test_what_is_unpacked_is_what_was_packed():
    before = batches()
    packed = Packed(before, [build, build_list])
    copy = packed.buffer.clone()
    packed.buffer.zero_()
    for found, expected in zip(packed.unpack(copy), before, strict=True):
        assert_same(found, expected)
        assert found.segments.builders == (
            build,
        )  # the other holds more than tensors: it is made when asked for
        table, right = found.segments.table(build), build(expected.segments.lengths, torch.device("cpu"))
        assert isinstance(table, Table)
        assert torch.equal(table.starts, right.starts)
        assert torch.equal(table.wide, right.wide)
        assert table.wide.dtype == torch.int64
        assert table[2:4] == right[2:4]
        assert torch.equal(table.inner[0], right.inner[0])
        assert table.inner[1] == 3
        assert found.segments.table(build_list) == expected.segments.lengths


def test_every_tensor_is_aligned_and_in_one_buffer():
    packed = Packed(batches(), [build])
    [first, *_] = packed.unpack(packed.buffer)
    tensors = [
        first.input_ids,
        first.labels,
        first.position_ids,
        first.cu_seqlens,
        *first.segments.table(build)[:2],
    ]
    assert all((tensor.data_ptr() - packed.buffer.data_ptr()) % 512 == 0 for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_arrive_on_a_gpu_without_waiting(prefetch):
    device = torch.device("cuda", torch.cuda.current_device())
    settings = {**SETTINGS, "micro_batch": 2}
    host, there = (
        synthetic_stream(**settings, prefetch=prefetch, device=each) for each in (torch.device("cpu"), device)
    )
    busy = torch.ones(4096, 4096, device=device)
    sums = []
    for step in range(6):
        if step == 1:
            # the first step makes the stream and fills the allocator
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(20):
            busy = busy @ busy / 4096
        expected, found = next(host), next(there)
        assert host.state_dict() == there.state_dict()
        for batch in found:
            assert batch.input_ids.device == device
            assert batch.to(device) is batch
            batch.segments.table(build_host)
        sums.append((expected, [(batch.input_ids * 2, batch.labels * 2) for batch in found], found))
        del found
    torch.cuda.set_sync_debug_mode("default")
    for expected, doubled, found in sums:
        for right, (ids, labels), batch in zip(expected, doubled, found, strict=True):
            assert torch.equal(ids.cpu(), right.input_ids * 2)
            assert torch.equal(labels.cpu(), right.labels * 2)
            assert_same(batch, right)
            assert torch.equal(batch.segments.table(build_host).cpu(), torch.tensor(right.segments.lengths))


def build_host(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(lengths).to(device, non_blocking=True)


@pytest.mark.gpu
def test_a_buffer_is_not_reused_while_it_is_read():
    device = torch.device("cuda", torch.cuda.current_device())
    feed = Feed(device)
    busy = torch.ones(4096, 4096, device=device)
    results = []
    for number in range(8):
        packed = Packed([synthetic_batch(**{**SETTINGS, "seed": number})])
        [batch] = feed.receive(feed.send(packed))
        for _ in range(20):
            busy = busy @ busy / 4096
        results.append(batch.input_ids + 0 * busy[0, 0].long())
        del batch
    for number, found in enumerate(results):
        assert torch.equal(found.cpu(), synthetic_batch(**{**SETTINGS, "seed": number}).input_ids)

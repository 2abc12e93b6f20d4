"""How every kernel is launched: one table, one lookup. Nothing is tuned at run time.

``gendistill bench tune`` times the entries beside other candidates and prints rows to paste here; docs/kernels.md says
how. tests/ops/test_configs.py compiles every entry at the largest sizes that it covers and holds it against the limits
of its architecture, tests/ops/test_gpu_configs.py runs every entry of the architecture it is on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

# for each kernel, what the block of a configuration counts
KERNELS = {
    "prepare": "key channels of a turn of the loop",
    "prepare_wild": "key channels of a turn of the loop",
    "scan": "value channels of a program",
    "summary": "value channels of a program",
    "carry": "value channels of a program",
    "reverse_scan": "value channels of a program",
    "reverse_summary": "value channels of a program",
    "values": "value channels of a program, all of them",
    "keys": "key channels of a program",
    "keys_wild": "nothing: its blocks are those of keys, whose sums it fills",
    "sum_heads": "elements of a program's tile",
    "sum_chunks": "elements of a program's tile",
    "conv_forward": "channels of a program",
    "conv_backward": "channels of a program",
    "norm_forward": "elements of a program's tile",
    "norm_backward": "elements of a program's tile",
    "decode": "elements of the state that a program holds at once, of one head",
    "decode_group": "as decode, of as many heads as fit, if heads share what a convolution moves on",
}
# Bytes of shared memory that a program may have. ``any`` is for 8.6, 8.9 and 12.x, which have the least of what runs
# bfloat16 products, and for whatever is not known.
SHARED_BYTES = {"sm_90": 232448, "sm_80": 166912, "any": 101376}
Architecture = Literal["sm_90", "sm_80", "any"]
_ARCHITECTURES: dict[tuple[int, int], Architecture] = {(9, 0): "sm_90", (8, 0): "sm_80", (8, 7): "sm_80"}
# as many chains times blocks of 128 values as keep every processor of the GPU busy with one program each
MANY = 100
# A longer sequence is cut into segments of this many chunks, which are walked at the same time. Its own length alone
# decides that, so that a sequence does not depend on what else is in the batch; and no GPU, for bits depend on it.
SEGMENT = 128


class Config(NamedTuple):
    """Say how a kernel is launched.

    Attributes:
        block: How much a program takes at once, as ``KERNELS`` says; less where there is less.
        warps: Of a program. The convolution gives each a strip of tokens; decode gives each 1024 elements, so that
            programs with less to do have fewer.
        stages: Turns of the loop whose loads are under way at the same time.
        registers: The most of a thread, so that several programs share a processor.
        programs: The most that share the work of one launch, of kernels that share it.
    """

    block: int
    warps: int
    stages: int = 1
    registers: int | None = None
    programs: int = 0


class Entry(NamedTuple):
    """Say what a configuration is for.

    Attributes:
        kernel: One of ``KERNELS``.
        keys, values: The most channels of a head, rounded up to a power of two.
        size: The most bytes of an element of the inputs.
        many: Whether there are ``MANY`` programs of 128 value channels; None where it does not matter.
        save: Whether states are kept for the backward pass; None where it does not matter.
        config: How to launch it.
    """

    kernel: str
    keys: int
    values: int
    size: int
    many: bool | None
    save: bool | None
    config: Config


ANY = 1 << 30

# what fits everywhere; timed on an H200, but for the sums
_EVERYWHERE = (
    Entry("sum_heads", ANY, ANY, 4, None, None, Config(1024, 4)),
    Entry("sum_chunks", ANY, ANY, 4, None, None, Config(4096, 4)),
    # 16 bytes for each thread of a warp; two programs at once on a processor
    Entry("conv_forward", ANY, ANY, 2, None, None, Config(256, 8, registers=128)),
    Entry("conv_forward", ANY, ANY, 4, None, None, Config(128, 8, registers=128)),
    Entry("norm_forward", ANY, ANY, 4, None, None, Config(4096, 4)),
    # 128 registers of state in each of 128 threads: one H100, batch 1, 5.6 us; 8 warps 6.6, 16 warps 9.5
    Entry("decode", ANY, ANY, 4, None, None, Config(128 * 128, 4, registers=255)),
    # As many for each thread. One H100, batch 1, 14 heads of 64 channels with 2 of keys and values: 10.1 us, half as
    # many at once 12.9, one at a time 17; 16 heads of 128 with 8: 8.7 us, one at a time 11.9 (docs/kernels-log.md, 32)
    Entry("decode_group", ANY, ANY, 4, None, None, Config(2 * 128 * 128, 8, registers=255)),
)

# The first row that covers a call is taken.
TABLE: dict[Architecture, tuple[Entry, ...]] = {
    # Timed beside others at K = V = 128 in bfloat16: scan, reverse_scan and keys on one H200, prepare on one H100
    # (docs/kernels-log.md); of the rest only the chosen one's time is on record. Nothing was timed with 256 channels or
    # 4 bytes, which is for comparisons and need not be fast. Every row's results have been compared with float64 on an
    # H100, at the largest sizes that it covers, decode's at 128 channels (tests/ops/test_gpu_configs.py).
    "sm_90": (
        # 128 channels a turn 0.50 ms at B, 64: 0.56, 32: 0.57
        Entry("prepare", 256, ANY, 4, None, None, Config(128, 4)),
        # 11% of B's chunks: 128 channels a turn 0.108 ms, 64: 0.136; 32 give ptxas 12.8 addresses that it loses
        Entry("prepare_wild", 256, ANY, 4, None, None, Config(128, 4)),
        Entry("scan", 128, 256, 2, True, True, Config(128, 8, stages=2)),
        Entry("scan", 128, 256, 2, True, False, Config(128, 8, stages=3)),
        # one H100, A, summary and scan: 0.671 ms saving, with two stages 0.716; with blocks of 32 0.764
        Entry("scan", 128, 256, 2, False, None, Config(64, 4, stages=3)),
        Entry("scan", 256, 256, 2, None, None, Config(64, 4)),
        Entry("scan", 256, 256, 4, None, False, Config(64, 4)),
        Entry("scan", 256, 128, 4, None, True, Config(64, 4)),
        # one H100, A, summary and scan: 0.526 ms; blocks of 64 with 4 warps and two stages 0.537
        Entry("summary", 128, 256, 2, None, None, Config(128, 8, stages=3)),
        Entry("summary", 128, 256, 4, None, None, Config(64, 4, stages=2)),
        Entry("carry", 128, 256, 4, None, None, Config(16, 8)),
        Entry("reverse_scan", 128, 256, 2, True, None, Config(128, 8, stages=2)),
        Entry("reverse_scan", 128, 256, 2, False, None, Config(64, 4, stages=2)),
        Entry("reverse_scan", 256, 256, 2, None, None, Config(64, 4)),
        Entry("reverse_scan", 128, 128, 4, None, None, Config(64, 4)),
        # 64 channels take 377 KB; with 4 warps, 32 channels spill ten times as much
        Entry("reverse_scan", 256, 128, 4, None, None, Config(32, 8)),
        Entry("reverse_summary", 128, 256, 2, None, None, Config(64, 4, stages=3)),
        # three stages take 477 KB
        Entry("reverse_summary", 128, 128, 4, None, None, Config(64, 4)),
        Entry("values", ANY, 256, 2, None, None, Config(256, 4)),
        Entry("values", ANY, 128, 4, None, None, Config(256, 4)),
        # one H100, B: 1.47 ms; with 8 warps 1.99 at 128 registers and 2.59 at 160, with 64 channels and 8 warps 1.84
        Entry("keys", 256, 256, 2, None, None, Config(32, 4)),
        # float32 values of 256 channels fit with no block: 8 take 239 KB
        Entry("keys", 256, 128, 4, None, None, Config(32, 4)),
        Entry("keys_wild", 256, 256, 2, None, None, Config(32, 4)),
        Entry("keys_wild", 256, 128, 4, None, None, Config(32, 4)),
        # programs: a few rounds of what fits on a GPU at once, each with its own sum for the weights
        Entry("conv_backward", ANY, ANY, 2, None, None, Config(256, 2, programs=2048)),
        Entry("conv_backward", ANY, ANY, 4, None, None, Config(128, 2, programs=2048)),
        # programs: five for each of 132 processors, each with its own sum for the weight
        Entry("norm_backward", ANY, ANY, 4, None, None, Config(2048, 4, programs=660)),
        *_EVERYWHERE,
    ),
    # No kernel has run on what follows: rows are chosen only to fit, and to spill little, by what the compiler says.
    # float32 inputs of the chunked kernels do not fit: prepare_wild takes 197 KB.
    "sm_80": (
        Entry("prepare", 256, ANY, 2, None, None, Config(32, 8)),
        Entry("prepare_wild", 256, ANY, 2, None, None, Config(32, 8)),
        Entry("scan", 128, 256, 2, None, None, Config(64, 8)),
        Entry("scan", 256, 256, 2, None, None, Config(16, 8)),
        Entry("summary", 128, 256, 2, None, None, Config(64, 8)),
        Entry("carry", 128, 256, 2, None, None, Config(16, 8)),
        Entry("reverse_scan", 128, 256, 2, None, None, Config(64, 8)),
        Entry("reverse_scan", 256, 256, 2, None, None, Config(64, 8)),
        Entry("reverse_summary", 128, 256, 2, None, None, Config(64, 8)),
        Entry("values", ANY, 256, 2, None, None, Config(256, 8)),
        Entry("keys", 256, 256, 2, None, None, Config(32, 4)),
        Entry("keys_wild", 256, 256, 2, None, None, Config(32, 4)),
        Entry("conv_backward", ANY, ANY, 2, None, None, Config(256, 2, programs=2048)),
        Entry("conv_backward", ANY, ANY, 4, None, None, Config(128, 2, programs=2048)),
        Entry("norm_backward", ANY, ANY, 4, None, None, Config(2048, 4, programs=540)),
        *_EVERYWHERE,
    ),
    # gradients of values of 256 channels do not fit: keys takes 160 KB
    "any": (
        Entry("prepare", 256, ANY, 2, None, None, Config(32, 8)),
        Entry("prepare_wild", 256, ANY, 2, None, None, Config(32, 8)),
        Entry("scan", 128, 256, 2, None, None, Config(64, 8)),
        Entry("scan", 256, 256, 2, None, None, Config(16, 8)),
        Entry("summary", 128, 256, 2, None, None, Config(64, 8)),
        Entry("carry", 128, 256, 2, None, None, Config(16, 8)),
        Entry("reverse_scan", 128, 128, 2, None, None, Config(64, 8)),
        Entry("reverse_scan", 256, 128, 2, None, None, Config(16, 8)),
        Entry("reverse_summary", 128, 128, 2, None, None, Config(64, 8)),
        Entry("values", ANY, 128, 2, None, None, Config(256, 8)),
        Entry("keys", 256, 128, 2, None, None, Config(32, 4)),
        Entry("keys_wild", 256, 128, 2, None, None, Config(32, 4)),
        Entry("conv_backward", ANY, ANY, 2, None, None, Config(256, 2, programs=1024)),
        Entry("conv_backward", ANY, ANY, 4, None, None, Config(128, 2, programs=1024)),
        Entry("norm_backward", ANY, ANY, 4, None, None, Config(2048, 4, programs=320)),
        *_EVERYWHERE,
    ),
}  # fmt: skip

_forced: dict[str, Config] = {}
_caches: list[Any] = []


def cached(size: int) -> Callable[[Callable[..., Any]], Any]:
    """Remember the last results of a function that depends on the table, until the table is overruled."""

    def decorate(function: Callable[..., Any]) -> Any:
        found = functools.lru_cache(size)(function)
        _caches.append(found)
        return found

    return decorate


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """Say which part of the table a device reads. On a CPU kernels are interpreted, as an sm_90 would run them."""
    if device.type != "cuda":
        return "sm_90"
    return _ARCHITECTURES.get(torch.cuda.get_device_capability(device), "any")


@cached(4096)
def lookup(
    device: torch.device,
    kernel: str,
    keys: int = 1,
    values: int = 1,
    size: int = 2,
    many: bool = False,
    save: bool = False,
) -> Config:
    """Return how to launch a kernel; arguments after the first as in :class:`Entry`.

    Raises:
        ValueError: No configuration fits.
    """
    if kernel in _forced:
        return _forced[kernel]
    return find(architecture(device), kernel, keys, values, size, many, save).config


def find(
    where: Architecture, kernel: str, keys: int, values: int, size: int, many: bool, save: bool
) -> Entry:
    """Return the first entry that covers a call; as :func:`lookup`."""
    rows = [
        row
        for row in TABLE[where]
        if row.kernel == kernel and row.many in (None, many) and row.save in (None, save)
    ]
    for row in rows:
        if keys <= row.keys and values <= row.values and size <= row.size:
            return row
    allowed = dict.fromkeys(
        f"{_most(row.keys)} key and {_most(row.values)} value channels of up to {row.size} bytes"
        for row in rows
    )
    purpose = "with a backward pass" if save else "without a backward pass"
    raise ValueError(
        f"the kernel {kernel} has no configuration for {keys} key and {values} value channels of {size} bytes "
        f"{purpose} on a GPU of the class {where}: allowed are {'; '.join(allowed)}; or use the reference"
    )


def _most(channels: int) -> str:
    return "any number of" if channels == ANY else f"up to {channels}"


def is_many(chains: int, values: int, *, packed: bool) -> bool:
    """Say whether there is work for every processor, until the end, if a program takes 128 value channels.

    Packed sequences differ in length, so that most programs are done before the last.
    """
    return not packed and chains * (values // 128) >= MANY


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Launch a kernel with this configuration, whatever its sizes; for tests and tuning."""
    before = dict(_forced)
    _forced[kernel] = config
    _forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _forget()


def _forget() -> None:
    for cache in _caches:
        cache.cache_clear()

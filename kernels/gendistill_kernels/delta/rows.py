"""How the delta rule's kernels are launched: what was measured, in plain rows."""

from __future__ import annotations

from typing import NamedTuple

from gendistill_kernels.runtime.hardware import Architecture
from gendistill_kernels.runtime.lookup import Config, Table

# any number of channels
ANY = 1 << 30
# as many chains times blocks of 128 values as keep every processor of the GPU busy with one program each
MANY = 100


class Row(NamedTuple):
    """What a configuration is for.

    Attributes:
        kernel: One of ``TABLE.kernels``.
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

    def suits(self, keys: int, values: int, size: int = 2, many: bool = False, save: bool = False) -> bool:
        """Say whether the row is for as many chains, and for passes that save as much."""
        return self.many in (None, many) and self.save in (None, save)

    def covers(self, keys: int, values: int, size: int = 2, many: bool = False, save: bool = False) -> bool:
        """Say whether these channels are not more or wider than the row's."""
        return keys <= self.keys and values <= self.values and size <= self.size

    def allowed(self) -> str:
        """Say what sizes the row covers."""
        return f"{_most(self.keys)} key and {_most(self.values)} value channels of up to {self.size} bytes"

    def narrowed(self, config: Config, keys: int, values: int, size: int, many: bool, save: bool) -> Row:
        """Return a row for calls of this key and smaller ones, as particular as this one."""
        return Row(
            self.kernel,
            ANY if self.keys == ANY else keys,
            ANY if self.values == ANY else values,
            size,
            None if self.many is None else many,
            None if self.save is None else save,
            config,
        )


def _most(channels: int) -> str:
    return "any number of" if channels == ANY else f"up to {channels}"


def _words(keys: int, values: int, size: int = 2, many: bool = False, save: bool = False) -> str:
    purpose = "with a backward pass" if save else "without a backward pass"
    return f"{keys} key and {values} value channels of {size} bytes {purpose}"


def is_many(chains: int, values: int, *, packed: bool) -> bool:
    """Say whether there is work for every processor, until the end, if a program takes 128 value channels.

    Packed sequences differ in length, so that most programs are done before the last.
    """
    return not packed and chains * (values // 128) >= MANY


# what fits everywhere; timed on an H200, but for the sums
_EVERYWHERE = (
    Row("sum_heads", ANY, ANY, 4, None, None, Config(1024, 4)),
    Row("sum_chunks", ANY, ANY, 4, None, None, Config(4096, 4)),
    # 64 numbers of a state in each of 64 threads, 128 in each of 128. Timed with the convolution's launch, in a CUDA
    # graph, states cold: docs/kernels-log.md, 39. 14 heads of 64 with 2 of keys and values, batch 1 and 512: 2.85 and
    # 69.7 us; 4 warps of 96 registers 3.15 and 72.9
    Row("decode", 64, 64, 4, None, None, Config(64 * 64, 2, registers=168)),
    # 16 heads of 128 with 8: 5.46 and 288 us; 8 warps of 128 registers 6.62 and 311; half a state at a time, 4 warps of
    # 168 registers, 6.99 and 293
    Row("decode", ANY, ANY, 4, None, None, Config(128 * 128, 4, registers=255)),
    # one channel of a thread, so that none changes hands before it is stored; 128 in 4 warps take as long
    Row("decode_convolution", ANY, ANY, 4, None, None, Config(256, 8)),
)

# The first row that covers a call is taken.
_ROWS: dict[Architecture, tuple[Row, ...]] = {
    # Timed beside others at K = V = 128 in bfloat16: scan, reverse_scan and keys on one H200, prepare on one H100
    # (docs/kernels-log.md); of the rest only the chosen one's time is on record. Nothing was timed with 256 channels or
    # 4 bytes, which is for comparisons and need not be fast. Every row's results have been compared with float64 on an
    # H100, at the largest sizes that it covers, decode's at 128 channels (tests/ops/test_gpu_configs.py).
    "sm_90": (
        # 128 channels an iteration 0.50 ms at B, 64: 0.56, 32: 0.57
        Row("prepare", 256, ANY, 4, None, None, Config(128, 4)),
        # 11% of B's chunks: 128 channels an iteration 0.108 ms, 64: 0.136; 32 give ptxas 12.8 addresses that it loses
        Row("prepare_levels", 256, ANY, 4, None, None, Config(128, 4)),
        Row("scan", 128, 256, 2, True, True, Config(128, 8, stages=2)),
        Row("scan", 128, 256, 2, True, False, Config(128, 8, stages=3)),
        # one H100, A, summary and scan: 0.671 ms saving, with two stages 0.716; with blocks of 32 0.764
        Row("scan", 128, 256, 2, False, None, Config(64, 4, stages=3)),
        Row("scan", 256, 256, 2, None, None, Config(64, 4)),
        Row("scan", 256, 256, 4, None, False, Config(64, 4)),
        Row("scan", 256, 128, 4, None, True, Config(64, 4)),
        # one H100, A, summary and scan: 0.526 ms; blocks of 64 with 4 warps and two stages 0.537
        Row("summary", 128, 256, 2, None, None, Config(128, 8, stages=3)),
        Row("summary", 128, 256, 4, None, None, Config(64, 4, stages=2)),
        Row("carry", 128, 256, 4, None, None, Config(16, 8)),
        Row("reverse_scan", 128, 256, 2, True, None, Config(128, 8, stages=2)),
        Row("reverse_scan", 128, 256, 2, False, None, Config(64, 4, stages=2)),
        Row("reverse_scan", 256, 256, 2, None, None, Config(64, 4)),
        Row("reverse_scan", 128, 128, 4, None, None, Config(64, 4)),
        # 64 channels take 377 KB; with 4 warps, 32 channels spill ten times as much
        Row("reverse_scan", 256, 128, 4, None, None, Config(32, 8)),
        Row("reverse_summary", 128, 256, 2, None, None, Config(64, 4, stages=3)),
        # three stages take 477 KB
        Row("reverse_summary", 128, 128, 4, None, None, Config(64, 4)),
        Row("values", ANY, 256, 2, None, None, Config(256, 4)),
        Row("values", ANY, 128, 4, None, None, Config(256, 4)),
        # one H100, B: 1.47 ms; with 8 warps 1.99 at 128 registers and 2.59 at 160, with 64 channels and 8 warps 1.84
        Row("keys", 256, 256, 2, None, None, Config(32, 4)),
        # float32 values of 256 channels fit with no block: 8 take 239 KB
        Row("keys", 256, 128, 4, None, None, Config(32, 4)),
        Row("keys_levels", 256, 256, 2, None, None, Config(32, 4)),
        Row("keys_levels", 256, 128, 4, None, None, Config(32, 4)),
        *_EVERYWHERE,
    ),
    # No kernel has run on what follows: rows are chosen only to fit, and to spill little, by what the compiler says.
    # float32 inputs of the chunked kernels do not fit: prepare_levels takes 197 KB.
    "sm_80": (
        Row("prepare", 256, ANY, 2, None, None, Config(32, 8)),
        Row("prepare_levels", 256, ANY, 2, None, None, Config(32, 8)),
        Row("scan", 128, 256, 2, None, None, Config(64, 8)),
        Row("scan", 256, 256, 2, None, None, Config(16, 8)),
        Row("summary", 128, 256, 2, None, None, Config(64, 8)),
        Row("carry", 128, 256, 2, None, None, Config(16, 8)),
        Row("reverse_scan", 128, 256, 2, None, None, Config(64, 8)),
        Row("reverse_scan", 256, 256, 2, None, None, Config(64, 8)),
        Row("reverse_summary", 128, 256, 2, None, None, Config(64, 8)),
        Row("values", ANY, 256, 2, None, None, Config(256, 8)),
        Row("keys", 256, 256, 2, None, None, Config(32, 4)),
        Row("keys_levels", 256, 256, 2, None, None, Config(32, 4)),
        *_EVERYWHERE,
    ),
    # gradients of values of 256 channels do not fit: keys takes 160 KB
    "any": (
        Row("prepare", 256, ANY, 2, None, None, Config(32, 8)),
        Row("prepare_levels", 256, ANY, 2, None, None, Config(32, 8)),
        Row("scan", 128, 256, 2, None, None, Config(64, 8)),
        Row("scan", 256, 256, 2, None, None, Config(16, 8)),
        Row("summary", 128, 256, 2, None, None, Config(64, 8)),
        Row("carry", 128, 256, 2, None, None, Config(16, 8)),
        Row("reverse_scan", 128, 128, 2, None, None, Config(64, 8)),
        Row("reverse_scan", 256, 128, 2, None, None, Config(16, 8)),
        Row("reverse_summary", 128, 128, 2, None, None, Config(64, 8)),
        Row("values", ANY, 128, 2, None, None, Config(256, 8)),
        Row("keys", 256, 128, 2, None, None, Config(32, 4)),
        Row("keys_levels", 256, 128, 2, None, None, Config(32, 4)),
        *_EVERYWHERE,
    ),
}  # fmt: skip

TABLE = Table(
    kernels={
        "prepare": "key channels of an iteration of the loop",
        "prepare_levels": "key channels of an iteration of the loop",
        "scan": "value channels of a program",
        "summary": "value channels of a program",
        "carry": "value channels of a program",
        "reverse_scan": "value channels of a program",
        "reverse_summary": "value channels of a program",
        "values": "value channels of a program, all of them",
        "keys": "key channels of a program",
        "keys_levels": "nothing: its blocks are those of keys, whose sums it fills",
        "sum_heads": "elements of a program's tile",
        "sum_chunks": "elements of a program's tile",
        "decode": "elements of the state that a program holds at once, of one head",
        "decode_convolution": "channels of a program, if heads of a decode step share some",
    },
    rows=_ROWS,
    words=_words,
)

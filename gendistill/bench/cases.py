"""What ``gendistill bench ops`` measures: sizes, bars, and the fewest bytes a call has to move. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

GATES = ("bounded", "softplus")
LOWER_BOUND = -5.0
# logits of the losses
VOCABULARY = 151_936
FORWARD, TRAIN = "forward", "forward+backward"
MEMORY, LAUNCHES, BANDWIDTH = "peak extra memory", "launches", "bandwidth"
STEP = "step"
GRAPH = "CUDA graph"
SPEED = "times as fast as the peer"
_SMALL_TOKENS = 200
COLD_QUANTITIES = ("empty cache", "warm cache")


@dataclass(frozen=True, slots=True)
class Case:
    """One call on whole sequences.

    Attributes:
        name: What ``--cases`` calls it.
        batch: Rows.
        tokens: Per row.
        heads: Of queries, gates and output.
        channels: Of keys and of values, per head.
        kv_heads: Heads of k and v.
        lengths: Documents packed into the only row, or None.
    """

    name: str
    batch: int
    tokens: int
    heads: int
    channels: int
    kv_heads: int
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.lengths is None or (self.batch, self.tokens) == (1, sum(self.lengths)), self.name

    @property
    def geometry(self) -> tuple[int, int, int, bool]:
        """What decides which code runs; cases that share it share one check."""
        return self.heads, self.channels, self.kv_heads, self.lengths is not None

    def small(self) -> Case:
        """Return a call of the same geometry that the reference can follow token by token."""
        if self.tokens <= _SMALL_TOKENS:
            return self
        if self.lengths is not None:
            return replace(self, tokens=_SMALL_TOKENS, lengths=(1, 66, _SMALL_TOKENS - 67))
        return replace(self, batch=2, tokens=_SMALL_TOKENS)

    def least_bytes(self, *, backward: bool, item_size: int) -> float:
        """Count what has to be read and written once.

        Forward: read q, k, v, decay and beta, write the output. Backward: read all of these but the output, and its
        gradient; write the gradients of the inputs.
        """
        K = V = self.channels
        shared = self.kv_heads / self.heads
        inputs = 2 * K + shared * (K + V) + 1
        number = inputs + V
        if backward:
            number += (inputs + V) + inputs
        return item_size * number * self.batch * self.tokens * self.heads


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """One decode step: everything between the projections of a layer, for one token per sequence."""

    name: str
    batch: int
    heads: int = 16
    channels: int = 128
    kv_heads: int = 16
    taps: int = 4

    @property
    def geometry(self) -> tuple[str, int, int, int]:
        """What decides which code runs; cases that share it share one check."""
        return "decode", self.heads, self.channels, self.kv_heads

    @property
    def state_bytes(self) -> int:
        """Size of the recurrent states, which a step reads and writes."""
        return 4 * self.batch * self.heads * self.channels**2


@dataclass(frozen=True, slots=True)
class LossCase:
    """One distillation loss, forwards and backwards, from hidden states and heads.

    Attributes:
        name: What ``--cases`` calls it.
        kind: ``kl``, ``reverse_kl`` or ``jsd``, of the teacher and the student.
        trained: Whether the student's head has a gradient.
    """

    name: str
    kind: str
    trained: bool
    tokens: int = 8192
    channels: int = 1024
    teacher_channels: int = 1024
    vocabulary: int = VOCABULARY


LOSS_CASES = (
    LossCase("kl, head trained", "kl", True),
    LossCase("kl, head frozen", "kl", False),
    LossCase("reverse_kl, head frozen", "reverse_kl", False),
    LossCase("jsd, head frozen", "jsd", False),
)
# by case and unit: of the time, of the memory besides the inputs
LOSS_BARS = {
    ("kl, head trained", "ms"): 22.0,
    ("kl, head frozen", "ms"): 18.0,
    ("kl, head trained", "GB"): 2.2,
    ("kl, head frozen", "GB"): 2.2,
}
LOSS_ERROR_BAR = 5e-3

# 20 documents, 16,384 tokens, shorter and longer than a chunk, and at its edges
_DOCUMENTS = (
    1,
    3,
    17,
    63,
    64,
    65,
    128,
    200,
    333,
    411,
    512,
    640,
    777,
    901,
    1024,
    1299,
    1700,
    2048,
    2600,
    3598,
)

# the most important first: --budget leaves out the last
CASES = (
    Case("8x4096x16x128", 8, 4096, 16, 128, kv_heads=16),
    Case("1x32768x16x128", 1, 32768, 16, 128, kv_heads=16),
    Case("4x2048x16x128", 4, 2048, 16, 128, kv_heads=16),
    Case("16x2048x9x64", 16, 2048, 9, 64, kv_heads=3),
    Case("8x4096x14x64", 8, 4096, 14, 64, kv_heads=2),
    Case("packed", 1, 16384, 16, 128, kv_heads=16, lengths=_DOCUMENTS),
)
DECODE_CASES = (
    DecodeCase("decode-1", 1),
    DecodeCase("decode-64", 64),
    DecodeCase("decode-256", 256),
    # what students of real teachers have
    DecodeCase("decode-1x9x64", 1, heads=9, channels=64, kv_heads=3),
    DecodeCase("decode-1x14x64", 1, heads=14, channels=64, kv_heads=2),
    DecodeCase("decode-1x16x128", 1, heads=16, channels=128, kv_heads=8),
    DecodeCase("decode-64x9x64", 64, heads=9, channels=64, kv_heads=3),
    DecodeCase("decode-64x16x128", 64, heads=16, channels=128, kv_heads=8),
)
COLD_CASE = Case("1x2048x16x128", 1, 2048, 16, 128, kv_heads=16)
NAMES = (*(case.name for case in CASES), "decode")
# between them few and many chains, heads of 64 and 128 channels, and a sequence that is cut into segments
TUNE_NAMES = ("8x4096x16x128", "1x32768x16x128", "8x4096x14x64")

# for the interpreter, which takes a second per chunk and head
SMOKE_CASES = (
    Case("tiny", 1, 65, 2, 16, kv_heads=1),
    Case("tiny-packed", 1, 35, 1, 16, kv_heads=1, lengths=(1, 31, 3)),
)
SMOKE_DECODE = DecodeCase("tiny-decode", 2, heads=2, channels=16, kv_heads=1)

# (case, quantity): not above this, in milliseconds, MiB, microseconds or seconds; a multiple of the peer's speed, not
# below
BARS = {
    ("8x4096x16x128", FORWARD): 1.0,
    ("8x4096x16x128", TRAIN): 4.0,
    ("1x32768x16x128", FORWARD): 1.2,
    ("1x32768x16x128", TRAIN): 4.5,
    ("1x32768x16x128", MEMORY): 1800.0,
    ("4x2048x16x128", FORWARD): 0.35,
    ("4x2048x16x128", TRAIN): 1.3,
    ("decode-1", STEP): 10.0,
    ("decode-64", STEP): 62.0,
    ("decode-256", STEP): 215.0,
    ("cold start", COLD_QUANTITIES[0]): 60.0,
    ("cold start", COLD_QUANTITIES[1]): 5.0,
    **{
        (case, f"{quantity}, {SPEED}"): 2.2
        for case in ("16x2048x9x64", "8x4096x14x64", "packed")
        for quantity in (FORWARD, TRAIN)
    },
    ("decode-1", f"{STEP}, {SPEED}"): 2.0,
}
# relative rms error against float64; those of A_log and dt_bias are sums in which most of the gradient cancels
ERROR_BAR = 2e-2
ERROR_BARS = {"d A_log": 3e-2, "d dt_bias": 3e-2}
# of ours to the peer's, on the same inputs; missing it is reported and stops nothing
ERROR_RATIO_BAR = 1.2

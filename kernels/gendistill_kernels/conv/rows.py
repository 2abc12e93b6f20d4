"""How the convolution's kernels are launched."""

from __future__ import annotations

from gendistill_kernels.runtime.lookup import ByBytes, Config, Table, bytes_in_words

# 16 bytes for each thread of a warp; two programs at once on a processor
_FORWARD = (
    ByBytes("conv_forward", 2, Config(256, 8, registers=128)),
    ByBytes("conv_forward", 4, Config(128, 8, registers=128)),
)


def _backward(programs: int) -> tuple[ByBytes, ...]:
    """Make the rows of the backward pass: a few rounds of what fits on a GPU, each with its own sum for the weights."""
    return (
        ByBytes("conv_backward", 2, Config(256, 2, programs=programs)),
        ByBytes("conv_backward", 4, Config(128, 2, programs=programs)),
    )


TABLE = Table(
    kernels={"conv_forward": "channels of a program", "conv_backward": "channels of a program"},
    # timed on an H200
    rows={
        "sm_90": (*_FORWARD, *_backward(2048)),
        # no kernel has run on these
        "sm_80": (*_FORWARD, *_backward(2048)),
        "any": (*_FORWARD, *_backward(1024)),
    },
    words=bytes_in_words,
)

"""How the gated norm's kernels are launched."""

from __future__ import annotations

from gendistill_kernels.runtime.lookup import ByBytes, Config, Table, bytes_in_words

_FORWARD = ByBytes("norm_forward", 4, Config(4096, 4))


def _backward(programs: int) -> ByBytes:
    """Make the row of the backward pass: five programs for each processor, each with its own sum for the weight."""
    return ByBytes("norm_backward", 4, Config(2048, 4, programs=programs))


TABLE = Table(
    kernels={
        "norm_forward": "elements of a program's tile",
        "norm_backward": "elements of a program's tile",
    },
    rows={
        # 132 processors; timed on an H200
        "sm_90": (_FORWARD, _backward(660)),
        # no kernel has run on these
        "sm_80": (_FORWARD, _backward(540)),
        "any": (_FORWARD, _backward(320)),
    },
    words=bytes_in_words,
)

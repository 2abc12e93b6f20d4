"""How the divergence's kernels are launched."""

from __future__ import annotations

from gendistill_kernels.runtime.lookup import ByBytes, Config, Table, bytes_in_words

# logits are float32, whatever the models compute in
_ROWS = (
    ByBytes("divergence", 4, Config(4096, 4)),
    # whose logarithms do not fit into the registers of four warps
    ByBytes("divergence_mixture", 4, Config(4096, 8)),
    ByBytes("tail_sum", 4, Config(4096, 8)),
    ByBytes("tail_gradient", 4, Config(4096, 8)),
)

TABLE = Table(
    kernels={
        "divergence": "logits of a row that a program takes",
        "divergence_mixture": "logits of a row that a program takes",
        "tail_sum": "logits of a row that a program takes",
        "tail_gradient": "logits of a row that a program takes",
    },
    rows={
        "sm_90": _ROWS,
        # no kernel has run on these
        "sm_80": _ROWS,
        "any": _ROWS,
    },
    words=bytes_in_words,
)

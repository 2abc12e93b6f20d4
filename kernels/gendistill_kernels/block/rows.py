"""How the kernels of a decoder layer are launched."""

from __future__ import annotations

from gendistill_kernels.runtime.lookup import ByBytes, Config, Table, bytes_in_words


def _rows(processors: int) -> tuple[ByBytes, ...]:
    """Make the rows of one architecture; where sums over tokens are taken, programs share them out."""
    return (
        ByBytes("block_norm_forward", 4, Config(2048, 4)),
        ByBytes("block_norm_backward", 4, Config(2048, 4, programs=4 * processors)),
        ByBytes("block_glu_forward", 4, Config(2048, 4)),
        ByBytes("block_glu_backward", 4, Config(2048, 4)),
        ByBytes("block_rope_forward", 4, Config(2048, 4)),
        ByBytes("block_rope_backward", 4, Config(2048, 4, programs=4 * processors)),
        ByBytes("block_attention", 2, Config(64, 4, stages=3)),
        ByBytes("block_attention", 4, Config(16, 4)),
        ByBytes("block_attention_queries", 2, Config(64, 4, stages=2)),
        ByBytes("block_attention_queries", 4, Config(16, 4)),
        ByBytes("block_attention_keys", 2, Config(64, 4, stages=2)),
        ByBytes("block_attention_keys", 4, Config(16, 4)),
    )


TABLE = Table(
    kernels={
        f"block_{part}_{way}": "elements of a program's tile"
        for part in ("norm", "glu", "rope")
        for way in ("forward", "backward")
    }
    | {
        "block_attention": "keys of a tile",
        "block_attention_queries": "keys of a tile",
        "block_attention_keys": "queries of a tile",
    },
    # 132 processors on sm_90; no kernel has run on the others
    rows={"sm_90": _rows(132), "sm_80": _rows(108), "any": _rows(64)},
    words=bytes_in_words,
)


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number``, which is at least one."""
    return 1 << (number - 1).bit_length()

"""How the kernels of paged attention are launched."""

from __future__ import annotations

from gendistill_kernels.runtime.lookup import ByBytes, Config, Table, bytes_in_words


def _rows(processors: int) -> tuple[ByBytes, ...]:
    """Make the rows of one architecture. Of decode, two programs fit on a processor; each shall have a second turn."""
    return (
        ByBytes("paged_store", 4, Config(2048, 4)),
        ByBytes("paged_prefill", 2, Config(64, 8, stages=3)),
        ByBytes("paged_prefill", 4, Config(16, 4)),
        ByBytes("paged_decode", 2, Config(64, 4, stages=3, programs=4 * processors)),
        ByBytes("paged_decode", 4, Config(16, 4, stages=3, programs=4 * processors)),
        ByBytes("paged_join", 4, Config(8192, 4)),
    )


TABLE = Table(
    kernels={
        "paged_store": "elements of a program's tile",
        "paged_prefill": "keys of a tile",
        "paged_decode": "keys of a tile",
        "paged_join": "elements of a program's tile",
    },
    # 132 processors on sm_90; no kernel has run on the others
    rows={"sm_90": _rows(132), "sm_80": _rows(108), "any": _rows(64)},
    words=bytes_in_words,
)

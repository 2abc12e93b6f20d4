"""How the kernels of paged attention are launched."""

from __future__ import annotations

from gendistill_kernels.runtime.lookup import ByBytes, Config, Table, bytes_in_words


def _rows(processors: int, prefill: Config, decode: Config) -> tuple[ByBytes, ...]:
    """Make the rows of one architecture, of which some configurations are for elements of two bytes.

    Of decode, three programs fit on a processor, and each shall have a second turn.
    """
    programs = 6 * processors
    return (
        ByBytes("paged_store", 4, Config(2048, 4)),
        ByBytes("paged_prefill", 2, prefill),
        ByBytes("paged_prefill", 4, Config(16, 8, stages=2)),
        ByBytes("paged_decode", 2, decode._replace(programs=programs)),
        ByBytes("paged_decode", 4, Config(16, 4, stages=3, programs=programs)),
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
    rows={
        "sm_90": _rows(132, Config(64, 8, stages=3), Config(64, 4, stages=3)),
        "sm_80": _rows(108, Config(32, 4, stages=2), Config(32, 4, stages=3)),
        "any": _rows(64, Config(32, 4), Config(32, 4, stages=2)),
    },
    words=bytes_in_words,
)

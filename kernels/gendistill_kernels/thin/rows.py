"""How products of few rows are launched."""

from __future__ import annotations

from gendistill_kernels.runtime.lookup import ByBytes, Config, Table, bytes_in_words


def _rows(processors: int) -> tuple[ByBytes, ...]:
    """Make the rows of one architecture: every processor shall have a program, or nearly so."""
    most = 7 * processors // 8
    return (
        # one H200: docs/kernels-log.md, 38
        ByBytes("thin_product", 2, Config(16, 4, stages=24, programs=most)),
        ByBytes("thin_product", 4, Config(16, 4, stages=12, programs=most)),
    )


# ``programs`` are as many as there shall be at least, for which they take fewer rows; the loads that ``stages`` counts
# are a thread's, of eight weights
TABLE = Table(
    kernels={"thin_product": "rows of the matrix that a program takes"},
    # 132 processors on sm_90; no kernel has run on the others
    rows={"sm_90": _rows(132), "sm_80": _rows(108), "any": _rows(64)},
    words=bytes_in_words,
)

"""Attention of one new token of each sequence to all of its keys, which lie in pages; split over keys.

Programs share a sequence out by pages: each takes some pages of one key head, for the query heads that share it, and
leaves their maximum m, sum l and sum of values o. A second launch joins them, in the order of the pages::

    m = max m_i      o = sum e^(m_i - m) o_i / sum e^(m_i - m) l_i

How many programs there are, the host decides from shapes alone, so that a CUDA graph can hold the launch; how many
pages each takes, the device decides from the length. No sum depends on the order in which programs run.
"""

# pyright: reportGeneralTypeIssues=false, reportUnboundVariable=false
# inside a kernel the language is Triton's: range, tuples and constants mean what its compiler says
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gendistill_kernels.block.rows import power_of_2
from gendistill_kernels.paged.rows import TABLE
from gendistill_kernels.paged.step import BITS, step
from gendistill_kernels.runtime.launch import Launcher, on_its_device

# Pages of a share: fewer are not worth a program. More are cut even if there are programs enough, so that a long
# sequence among short ones does not take all the time, but not into more shares than _EXTRA: each costs a program, for
# short sequences one that does nothing.
_LEAST, _LONG, _EXTRA = 2, 64, 8
# shares of a sequence; of all of them one program reads the maxima
_MOST = 256
# of a program that joins
_CHANNELS = 32


class Shares(NamedTuple):
    """How sequences are shared out.

    Attributes:
        number: Programs of each sequence and key head.
        wanted: How many are enough to keep the GPU busy.
    """

    number: int
    wanted: int

    @classmethod
    def of(cls, rows: int, KV: int, pages: int, programs: int) -> Shares:
        """Decide for so many sequences and key heads, pages that a sequence may have, and programs of a launch."""
        wanted = max(1, programs // (rows * KV))
        number = max(wanted, min(_EXTRA, -(-pages // _LONG)))
        return cls(min(number, -(-pages // _LEAST), _MOST), wanted)


@triton.jit
def _cut(
    length, begin, number, wanted, PAGE: tl.constexpr, LEAST: tl.constexpr, LONG: tl.constexpr
):  # fmt: skip
    """Return the first page with keys from ``begin`` on, the pages of a share, and how many shares have any."""
    page = begin // PAGE
    pages = tl.cdiv(length, PAGE) - page
    share = tl.maximum(tl.minimum(tl.cdiv(pages, wanted), LONG), tl.maximum(tl.cdiv(pages, number), LEAST))
    return page, share, tl.cdiv(pages, share)


@triton.jit(do_not_specialize=["rows", "width", "number", "wanted", "window"])
def decode_kernel(
    q, keys, values, table, lengths, out, levels, rows, width, number, wanted, window, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr,
    PAGE: tl.constexpr, LEAST: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    # programs that read neighbours at the same time come after each other
    shared = tl.program_id(0) % KV
    sequence = tl.program_id(0) // KV % rows
    mine = tl.program_id(0) // KV // rows
    length = tl.load(lengths + sequence)
    begin = tl.maximum(length - window, 0) if WINDOW else 0
    page, share, used = _cut(length, begin, number, wanted, PAGE, LEAST, LONG)
    # a program that is the only one writes zeros for a row without a sequence
    if (mine >= used) & (number > 1):
        return
    first = (page + mine * share) * PAGE
    last = tl.minimum(length, first + share * PAGE)
    G: tl.constexpr = H // KV
    member, column = tl.arange(0, BG), tl.arange(0, BD)
    inside = (member < G)[:, None] & (column < D)[None, :]
    head = sequence.to(tl.int64) * H + shared * G + member
    query = tl.load(q + head[:, None] * D + column[None, :], mask=inside, other=0.0)
    keys += shared * D
    values += shared * D
    table += sequence * width
    row = tl.full([BG], length - 1, tl.int32)
    most = tl.full([BG], float("-inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    at = tl.load(table + first // PAGE)
    for key in range(first, last, BN):
        at, acc, most, total = step(
            query, keys, values, table, at, key, begin, last, acc, most, total, row, window, scale,
            column, D, BN, KV, PAGE, True, WINDOW,
        )  # fmt: skip
    if WHOLE:
        acc /= tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + head[:, None] * D + column[None, :], acc.to(out.dtype.element_ty), mask=inside)
    else:
        place = head * number + mine
        tl.store(out + place[:, None] * D + column[None, :], acc, mask=inside)
        tl.store(levels + 2 * place, most, mask=member < G)
        tl.store(levels + 2 * place + 1, total, mask=member < G)


@triton.jit(do_not_specialize=["number", "wanted", "window"])
def join_kernel(
    found, levels, lengths, out, number, wanted, window,
    H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
    PAGE: tl.constexpr, LEAST: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    length = tl.load(lengths + head // H)
    begin = tl.maximum(length - window, 0) if WINDOW else 0
    _, _, used = _cut(length, begin, number, wanted, PAGE, LEAST, LONG)
    levels += 2 * head * number
    share = tl.arange(0, BS)
    level = tl.load(levels + 2 * share, mask=share < used, other=float("-inf"))
    sums = tl.load(levels + 2 * share + 1, mask=share < used, other=0.0)
    top = tl.max(level, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(level - top) * sums, 0)
    acc = tl.zeros([BC], tl.float32)
    for first in range(0, used, BM):
        some = first + tl.arange(0, BM)
        weight = tl.exp2(tl.load(levels + 2 * some, mask=some < used, other=float("-inf")) - top)
        inside = (some < used)[:, None] & (column < D)[None, :]
        place = (head * number + some)[:, None] * D + column[None, :]
        acc += tl.sum(weight[:, None] * tl.load(found + place, mask=inside, other=0.0), 0)
    acc /= tl.where(total > 0, total, 1.0)
    tl.store(out + head * D + column, acc.to(out.dtype.element_ty), mask=column < D)


_decode = Launcher(decode_kernel)
_join = Launcher(join_kernel)


@on_its_device
def decode(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, *, window: int | None
) -> Tensor:
    """Attend from the last token of every sequence; float32 scores and sums.

    Args:
        q: ``[S, H, D]`` contiguous, S at least 1, D up to 256.
        keys, values: ``[pages, PAGE, KV, D]`` contiguous, the new tokens' in them.
        table: ``[S, P]`` int32, the sequences' pages.
        lengths: ``[S]`` int32, tokens of each sequence; 0 for a row without one.
        window: Positions a query sees, its own included; None for all earlier ones.
    Returns: ``[S, H, D]``; zeros for a row without a sequence. Which sums are taken first depends on S and P.
    """
    rows, H, D = q.shape
    PAGE, KV = keys.shape[1:3]
    config = TABLE.lookup(q.device, "paged_decode", q.dtype.itemsize)
    width = table.shape[1]
    reached = width if window is None else min(width, (window + PAGE - 2) // PAGE + 1)
    shares = Shares.of(rows, KV, reached, config.programs)
    wide, whole = max(16, power_of_2(D)), shares.number == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    found, levels = out, out
    if not whole:
        found = torch.empty(rows, H, shares.number, D, dtype=torch.float32, device=q.device)
        levels = torch.empty(rows, H, shares.number, 2, dtype=torch.float32, device=q.device)
    reach = 0 if window is None else window
    pages = {"PAGE": PAGE, "LEAST": _LEAST, "LONG": _LONG, "WINDOW": window is not None}
    _decode[(KV * rows * shares.number,)](
        q, keys, values, table, lengths, found, levels, rows, width, *shares, reach, D**-0.5 * BITS.value,
        H=H, KV=KV, D=D, BD=wide, BG=max(16, power_of_2(H // KV)), BN=min(config.block, PAGE), **pages,
        WHOLE=whole, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if whole:
        return out
    config = TABLE.lookup(q.device, "paged_join", q.dtype.itemsize)
    # where sequences are few, programs share the channels of a head
    channels = wide if shares.wanted == 1 else min(wide, _CHANNELS)
    _join[(rows * H, wide // channels)](
        found, levels, lengths, out, *shares, reach,
        H=H, D=D, BC=channels, BS=power_of_2(shares.number),
        BM=min(max(1, config.block // channels), power_of_2(shares.number)), **pages, num_warps=config.warps,
    )  # fmt: skip
    return out

"""Attention to keys and values that lie in pages, as generation keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gendistill.ops.reference import paged as reference
from gendistill.ops.select import Impl, contract, is_triton
from gendistill.ops.types import PAGE, Pages

__all__ = ["PAGE", "Pages", "paged_attend"]


def paged_attend(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: tuple[int, int],
    eps: float = 1e-6,
    window: int | None = None,
    pages: Pages,
    impl: Impl | str = Impl.REFERENCE,
) -> Tensor:
    """Store the keys and values of new tokens in their pages, and attend causally to all of their sequences.

    The new tokens of a sequence are its last: with n of them and L in all, the one at ``i`` sees the keys from 0 to
    ``L - n + i``. What a page holds beyond the length of its sequence is not read, nor what no window reaches. Only
    numbers on the host decide what is launched, so that a call with ``pages.single`` can be part of a CUDA graph. The
    same call gives the same bits; those of a row may depend on how many rows and columns the table has, and on
    ``pages.single``.

    Args:
        qkv: ``[N, (H + 2 KV) * D]``: queries, keys and values of the new tokens, by head.
        q_weight, k_weight: ``[D]`` of an RMSNorm over every head, both or none.
        cos, sin: ``[N, D]``, rotary positions in the half-split layout, each angle twice.
        keys, values: ``[pages, PAGE, KV, D]`` in the dtype of qkv, contiguous; written in place. Keys are kept
            normalised and turned.
        heads: H and KV; query head ``h`` reads key/value head ``h // (H / KV)``.
        eps: Of the norms.
        window: Positions a query sees, its own included; None for all earlier ones.
        pages: Where sequences and new tokens are. The numbers in it are trusted: checking them would mean waiting for
            the device.
        impl: Implementation; :func:`gendistill.ops.resolve` chooses one for ``op="paged"``.
    Returns: ``[N, H * D]``; zeros for a row without a sequence.
    Raises:
        ValueError: Shapes or dtypes disagree, or a gradient is asked for, which this op does not have.
    """
    _check(qkv, q_weight, k_weight, cos, sin, keys, values, heads, window, pages)
    more = {"heads": heads, "eps": eps, "window": window, "pages": pages}
    if is_triton(impl):
        return _contract().paged_attend(qkv, q_weight, k_weight, cos, sin, keys, values, **more)
    return reference.paged_attend(qkv, q_weight, k_weight, cos, sin, keys, values, **more)


def _contract():
    if TYPE_CHECKING:
        import gendistill.ops.contracts.paged as found

        return found
    return contract("paged")


def _check(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: tuple[int, int],
    window: int | None,
    pages: Pages,
) -> None:
    H, KV = heads
    if KV < 1 or H < KV or H % KV:
        raise ValueError(f"heads must be H and KV with H a multiple of KV, got {heads}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the query's own position, or None; got {window}")
    if keys.dim() != 4 or keys.shape[1:3] != (PAGE, KV) or keys.shape[3] % 2:
        raise ValueError(f"keys must be [pages, {PAGE}, {KV}, D] with an even D, got {_shape(keys)}")
    D = keys.shape[3]
    if qkv.dim() != 2 or qkv.shape[1] != (H + 2 * KV) * D:
        raise ValueError(
            f"qkv must be [N, {(H + 2 * KV) * D}], for {H} + 2 * {KV} heads of {D}; got {_shape(qkv)}"
        )
    N, S = qkv.shape[0], pages.lengths.numel()
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given both or not at all; one of them is None")
    expected = {
        "values": (values, (*keys.shape,)),
        "cos": (cos, (N, D)),
        "sin": (sin, (N, D)),
        "q_weight": (q_weight, (D,)),
        "k_weight": (k_weight, (D,)),
        "pages.lengths": (pages.lengths, (S,)),
        "pages.starts": (pages.starts, (S + 1,)),
        "pages.cells": (pages.cells, (N,)),
    }
    for name, (part, shape) in expected.items():
        if part is not None and part.shape != shape:
            raise ValueError(
                f"{name} must be {_words(shape)} for {N} new tokens of {S} sequences, got {_shape(part)}"
            )
    if pages.table.dim() != 2 or len(pages.table) != S or not pages.table.shape[1]:
        raise ValueError(
            f"pages.table must be [{S}, P], one row for each of pages.lengths, got {_shape(pages.table)}"
        )
    if pages.single and N != S:
        raise ValueError(
            f"pages.single says that every sequence has one new token, but there are {N} for {S} sequences"
        )
    for name, part, dtype in (
        ("keys", keys, qkv.dtype),
        ("values", values, qkv.dtype),
        ("pages.table", pages.table, torch.int32),
        ("pages.lengths", pages.lengths, torch.int32),
        ("pages.starts", pages.starts, torch.int32),
        ("pages.cells", pages.cells, torch.int64),
    ):
        if part.dtype != dtype:
            raise ValueError(f"{name} must be {_dtype(dtype)}, got {_dtype(part.dtype)}")
        if not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {part.stride()} of {_shape(part)}")
    inputs = (qkv, q_weight, k_weight, cos, sin, keys, values)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in inputs):
        raise ValueError(
            "paged_attend has no gradients, but an input wants one; call it under torch.no_grad()"
        )


def _words(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _shape(part: Tensor) -> str:
    return _words(tuple(part.shape))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

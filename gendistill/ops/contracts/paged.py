"""The kernels of attention to pages as one function, without derivatives; none is traced."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from gendistill.ops.types import Pages

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# the widest tile of a program
_MOST_CHANNELS = 256


class StoreKernels(Protocol):
    """The kernel, as ``gendistill_kernels.paged.store`` has it."""

    def turn_and_store(
        self,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        cells: Tensor,
        *,
        num_heads: int,
        eps: float,
    ) -> Tensor:
        """Write keys and values into pages; return queries."""
        ...


class PrefillKernels(Protocol):
    """The kernel, as ``gendistill_kernels.paged.prefill`` has it."""

    def prefill(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        lengths: Tensor,
        starts: Tensor,
        *,
        window: int | None,
    ) -> Tensor:
        """Return ``[N, H, D]``."""
        ...


class DecodeKernels(Protocol):
    """The kernels, as ``gendistill_kernels.paged.decode`` has them."""

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, *, window: int | None
    ) -> Tensor:
        """Return ``[S, H, D]``."""
        ...


@functools.cache
def stores() -> StoreKernels:
    """Import the kernel, which needs triton."""
    from gendistill_kernels.paged import store

    return store


@functools.cache
def prefills() -> PrefillKernels:
    """Import the kernel, which needs triton."""
    from gendistill_kernels.paged import prefill

    return prefill


@functools.cache
def decodes() -> DecodeKernels:
    """Import the kernels, which need triton."""
    from gendistill_kernels.paged import decode

    return decode


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
    eps: float,
    window: int | None,
    pages: Pages,
) -> Tensor:
    """Run the kernels; arguments as :func:`gendistill.ops.paged.paged_attend`, whose checks have been passed.

    Raises:
        ValueError: The kernels cannot take the dtype or that many channels.
    """
    D = keys.shape[-1]
    if qkv.dtype not in _DTYPES or D > _MOST_CHANNELS:
        raise ValueError(
            f"the kernels of paged_attend take bfloat16, float16 and float32 and heads of up to {_MOST_CHANNELS} "
            f'channels, got {str(qkv.dtype).removeprefix("torch.")} and {D}; use impl="reference"'
        )
    if not len(qkv):
        return qkv.new_empty(0, heads[0] * D)
    q = stores().turn_and_store(
        qkv.contiguous(),
        q_weight,
        k_weight,
        cos.contiguous(),
        sin.contiguous(),
        keys,
        values,
        pages.cells,
        num_heads=heads[0],
        eps=eps,
    )
    if pages.single:
        out = decodes().decode(q, keys, values, pages.table, pages.lengths, window=window)
    else:
        out = prefills().prefill(q, keys, values, pages.table, pages.lengths, pages.starts, window=window)
    return out.flatten(1)

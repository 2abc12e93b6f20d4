"""What a decoder layer does between its matrix products: norms, SwiGLU, and attention to packed documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gendistill.ops.reference import block as reference
from gendistill.ops.select import Impl, contract, is_triton
from gendistill.ops.types import Segments


def rms_norm(
    x: Tensor,
    weight: Tensor,
    added: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
    impl: Impl | str = Impl.REFERENCE,
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream what a layer found, and normalise the sum: ``weight * s / sqrt(mean(s^2) + eps)``.

    Args:
        x: ``[..., D]``, the stream.
        weight: ``[D]``.
        added: ``[..., D]`` in any dtype, or None.
        eps: Added to the mean of squares.
        dtype: Of the norm; inside it is float32.
        impl: Implementation; :func:`gendistill.ops.resolve` chooses one for ``op="block"``.
    Returns: The sum in ``x.dtype`` and the norm.
    """
    if is_triton(impl):
        return _contract().rms_norm(x, weight, added, eps=eps, dtype=dtype)
    return reference.rms_norm(x, weight, added, eps=eps, dtype=dtype)


def attend(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: tuple[int, int],
    eps: float = 1e-6,
    window: int | None = None,
    segments: Segments,
    impl: Impl | str = Impl.REFERENCE,
) -> Tensor:
    """Attend causally within each of the packed documents, from what the projections made of them.

    Args:
        qkv: ``[N, (H + 2 KV) * D]``: queries, keys and values of all tokens, by head.
        q_weight, k_weight: ``[D]`` of an RMSNorm over every head, both or none.
        cos, sin: ``[N, D]``, rotary positions in the half-split layout, each angle twice.
        heads: H and KV; query head ``h`` reads key/value head ``h // (H / KV)``.
        eps: Of the norms.
        window: Positions a query sees, its own included; None for all earlier ones.
        segments: The documents, N tokens in all.
        impl: Implementation.
    Returns: ``[N, H * D]``.
    """
    more = {"heads": heads, "eps": eps, "window": window, "segments": segments}
    if is_triton(impl):
        return _contract().attend(qkv, q_weight, k_weight, cos, sin, **more)
    return reference.attend(qkv, q_weight, k_weight, cos, sin, **more)


def _contract():
    if TYPE_CHECKING:
        import gendistill.ops.contracts.block as found

        return found
    return contract("block")

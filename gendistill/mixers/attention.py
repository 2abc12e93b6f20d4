"""Softmax attention as a layer: full or within a sliding window, for use outside a pretrained family."""

from __future__ import annotations

from torch import Tensor, nn

from gendistill.mixers.base import SequenceInfo, rotate
from gendistill.ops.reference.attention import sliding_window_attention


class FullAttention(nn.Module):
    """Causal softmax attention with grouped key/value heads, as a layer.

    A converted student keeps its family's own attention modules; this layer has the same parameter names, so their
    weights load here.

    Args:
        hidden_size: Width of the input.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; as many as queries by default.
        head_dim: Channels per head; ``hidden_size // num_heads`` by default.
        qkv_bias: Biases on the q, k and v projections.
        output_bias: Bias on the output projection.
        qk_norm: RMSNorm over every query and key head (Qwen3).
        norm_eps: Its epsilon.
    """

    kind = "full"
    window: int | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(
                f"{num_heads} query heads are not a multiple of {self.num_kv_heads} key/value heads"
            )
        kv_size = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=output_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        *,
        sequences: SequenceInfo | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Mix a batch of sequences.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            sequences: Padding or packed documents; None when every row is one sequence without padding.
            position_embeddings: ``cos`` and ``sin`` ``[B or 1, T, head_dim]``, or None for no positions.
        Returns: ``[B, T, hidden_size]``, zero at padding.
        """
        batch, length = hidden_states.shape[:2]
        x = hidden_states if sequences is None else sequences.gather(hidden_states)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            angles = tuple(part.expand(batch, -1, -1) for part in position_embeddings)
            cos, sin = angles if sequences is None else (sequences.gather(part) for part in angles)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        segments = None if sequences is None else sequences.segments
        out = sliding_window_attention(q, k, v, window=self.window, segments=segments)
        y = self.o_proj(out.flatten(-2))
        return y if sequences is None else sequences.scatter(y, batch, length)


class SlidingWindowAttention(FullAttention):
    """Attention to the last ``window`` tokens, the current one included, as a layer."""

    kind = "swa"

    def __init__(self, *args: int, window: int, **kwargs: bool | float) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        if window < 1:
            raise ValueError(f"window must be at least 1 token, got {window}")
        self.window = window

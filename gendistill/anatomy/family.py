"""What the tensors of the supported families are, from the config alone.

Standard library only: it travels inside exported students.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """The optional tensors that a family's layers have.

    Attributes:
        qkv_bias: Biases on q, k and v; None: as ``attention_bias`` says.
        output_bias: Bias on the output projection; None: as ``attention_bias`` says.
        qk_norm: RMSNorm over each head of q and k.
    """

    qkv_bias: bool | None
    output_bias: bool | None
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(None, None),
    "mistral": Family(False, False),
    "qwen2": Family(True, False),
    "qwen3": Family(None, None, qk_norm=True),
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that shapes follow from.

    Attributes:
        norm_eps: Epsilon of every RMSNorm.
        sliding: Whether each layer of the teacher sees a window only.
        window: That window in tokens, or None.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    initializer_range: float
    norm_eps: float
    sliding: tuple[bool, ...]
    window: int | None


def family_of(config: Mapping[str, Any]) -> str:
    """Name the family whose decoder layers a model uses: a student's is that of its teacher."""
    return str(config.get("base_model_type" if config.get("model_type") == "gendistill" else "model_type"))


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Read the geometry of any model of a supported family, converted or not.

    Args:
        config: A family's config, or a student's, whose ``base_model_type`` names the family. Its fields have been
            checked.
    """
    name = family_of(config)
    family = FAMILIES[name]
    attention_bias = bool(config.get("attention_bias", False))
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    num_layers = int(config["num_hidden_layers"])
    window = config.get("sliding_window")
    sliding = _sliding_layers(config, name, num_layers, window)
    return Geometry(
        family=name,
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=name == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        initializer_range=float(config.get("initializer_range", 0.02)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        sliding=sliding,
        window=int(window) if window and any(sliding) else None,
    )


def layer_geometry(
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    norm_eps: float = 1e-6,
    initializer_range: float = 0.02,
) -> Geometry:
    """Make the geometry of a mixer that stands in no model: as many key/value heads as queries by default.

    Args:
        head_dim: Channels per head; ``hidden_size // num_heads`` by default.
    """
    return Geometry(
        family="",
        hidden_size=hidden_size,
        intermediate_size=0,
        vocab_size=0,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim or hidden_size // num_heads,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=False,
        qk_norm=qk_norm,
        tied_head=False,
        initializer_range=initializer_range,
        norm_eps=norm_eps,
        sliding=(False,),
        window=None,
    )


def _sliding_layers(
    config: Mapping[str, Any], family: str, num_layers: int, window: int | None
) -> tuple[bool, ...]:
    """Mistral windows every layer when ``sliding_window`` is set; the others say so layer by layer."""
    if not window:
        return (False,) * num_layers
    words = config.get("layer_types")
    if words is None:
        return (family == "mistral",) * num_layers
    return tuple(word == "sliding_attention" for word in words)


def attention_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of one attention layer, by name relative to ``self_attn``."""
    q_size, kv_size = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
        shapes[f"{name}.weight"] = (size, geometry.hidden_size)
        if geometry.qkv_bias:
            shapes[f"{name}.bias"] = (size,)
    shapes["o_proj.weight"] = (geometry.hidden_size, q_size)
    if geometry.output_bias:
        shapes["o_proj.bias"] = (geometry.hidden_size,)
    if geometry.qk_norm:
        shapes["q_norm.weight"] = shapes["k_norm.weight"] = (geometry.head_dim,)
    return shapes


def block_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of the rest of one layer: norms and MLP, by name relative to the layer."""
    hidden, inner = geometry.hidden_size, geometry.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, shape in (
        ("gate_proj", (inner, hidden)),
        ("up_proj", (inner, hidden)),
        ("down_proj", (hidden, inner)),
    ):
        shapes[f"mlp.{name}.weight"] = shape
        if geometry.mlp_bias:
            shapes[f"mlp.{name}.bias"] = shape[:1]
    shapes["post_attention_layernorm.weight"] = (hidden,)
    return shapes


def outer_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of what belongs to no layer: embeddings, final norm, and the head unless it is tied."""
    embedding = (geometry.vocab_size, geometry.hidden_size)
    shapes = {"model.embed_tokens.weight": embedding, "model.norm.weight": (geometry.hidden_size,)}
    if not geometry.tied_head:
        shapes["lm_head.weight"] = embedding
    return shapes

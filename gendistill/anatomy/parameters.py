"""The parameters of each linear mixer: names, shapes and how each one starts.

The mixer builds itself from this table and the conversion plan names its tensors from it, so that they cannot
disagree. Standard library only: the table also travels inside exported students.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Init:
    """Name a way to fill a new tensor, with its numbers. ``describe`` is what plans and logs print."""

    scheme: str
    values: tuple[float, ...] = ()

    def describe(self) -> str:
        """Return ``normal(0.02)``, ``zeros`` and the like."""
        return (
            f"{self.scheme}({', '.join(f'{value:g}' for value in self.values)})"
            if self.values
            else self.scheme
        )


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """Describe one parameter.

    Attributes:
        shape: Sizes, as in the module.
        init: How it starts when nothing is transferred.
        from_attention: Name of the attention tensor with the same meaning (same local name and shape), or None.
        float32: Whether it stays float32 in every checkpoint (gates).
    """

    shape: tuple[int, ...]
    init: Init
    from_attention: str | None = None
    float32: bool = False


SILU_ONE = 1.2784645427610738  # silu(SILU_ONE) == 1: the output gate starts open and passes values unchanged

# decay presets: (how A starts, how dt_bias starts); the spread that log_uniform asks for sits in dt_bias alone
DECAY_PRESETS = ("log_uniform", "mamba", "slow", "g6")


def kda_parameters(
    *,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    conv_size: int = 4,
    conv_bias: bool = True,
    gate: str = "bounded",
    gate_lower_bound: float = -5.0,
    gate_rank: int | None = None,
    decay_init: str = "log_uniform",
    half_life: tuple[float, float] = (4.0, 512.0),
    output_gate: str = "silu",
    output_gate_rank: int | None = None,
    output_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    init: str = "qkvo",
    initializer_range: float = 0.02,
) -> dict[str, ParameterSpec]:
    """List the parameters of one Kimi Delta Attention mixer.

    Decay, beta and state are per query head; keys and values have the teacher's kv heads.

    Args:
        hidden_size: Width of the model.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides ``num_heads``.
        head_dim: Channels per head, of queries, keys and values.
        qkv_bias: Whether q, k and v projections have biases (Qwen2).
        output_bias: Whether the output projection has one.
        init: ``qkvo``, ``vo`` or ``random``: the projections that start from attention.
        initializer_range: Standard deviation of new projections.
    Returns:
        Parameter name (relative to the mixer) to its specification, in module order.
    Source: arXiv 2510.26692; names as in transformers' ``kimi_linear``.
    """
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    projection = Init("normal", (initializer_range,))
    copied = {"qkvo": "qkvo", "vo": "vo", "random": ""}[init]
    table: dict[str, ParameterSpec] = {}

    def linear(name: str, letter: str, shape: tuple[int, int], bias: bool) -> None:
        for suffix, size, start in (("weight", shape, projection), ("bias", shape[:1], Init("zeros"))):
            if suffix == "weight" or bias:
                source = f"{name}.{suffix}" if letter in copied else None
                table[f"{name}.{suffix}"] = ParameterSpec(size, start, source)

    linear("q_proj", "q", (q_size, hidden_size), qkv_bias)
    linear("k_proj", "k", (kv_size, hidden_size), qkv_bias)
    linear("v_proj", "v", (kv_size, hidden_size), qkv_bias)
    if conv_size:
        for name, size in (("q_conv1d", q_size), ("k_conv1d", kv_size), ("v_conv1d", kv_size)):
            table[f"{name}.weight"] = ParameterSpec((size, 1, conv_size), Init("last_tap"))
            if conv_bias:
                table[f"{name}.bias"] = ParameterSpec((size,), Init("zeros"))
    rank = gate_rank or head_dim
    table["f_a_proj.weight"] = ParameterSpec((rank, hidden_size), projection)
    table["f_b_proj.weight"] = ParameterSpec((q_size, rank), projection)
    a_init, dt_init = _decay_inits(decay_init, gate, gate_lower_bound, half_life)
    table["A_log"] = ParameterSpec((num_heads,), a_init, float32=True)
    table["dt_bias"] = ParameterSpec((q_size,), dt_init, float32=True)
    table["b_proj.weight"] = ParameterSpec((num_heads, hidden_size), projection)
    if output_gate != "none":
        open_gate = Init("constant", (SILU_ONE,)) if output_gate == "silu" else Init("zeros")
        rank = output_gate_rank or head_dim
        table["g_a_proj.weight"] = ParameterSpec((rank, hidden_size), projection)
        table["g_b_proj.weight"] = ParameterSpec((q_size, rank), Init("zeros"))
        table["g_b_proj.bias"] = ParameterSpec((q_size,), open_gate)
    if output_norm:
        table["o_norm.weight"] = ParameterSpec((head_dim,), Init("ones"))
    linear("o_proj", "o", (hidden_size, q_size), output_bias)
    return table


def _decay_inits(
    preset: str, gate: str, lower_bound: float, half_life: tuple[float, float]
) -> tuple[Init, Init]:
    """Return how A_log and dt_bias start. With a zero gate projection they alone set the half-lives."""
    if preset == "log_uniform":
        scheme = "half_life_bounded" if gate == "bounded" else "half_life_softplus"
        bound = (lower_bound,) if gate == "bounded" else ()
        return Init("zeros"), Init(scheme, (*half_life, *bound))
    if gate == "bounded":
        raise ValueError(
            f'decay_init "{preset}" is defined for gate "softplus"; with "bounded" use "log_uniform"'
        )
    if preset == "mamba":
        return Init("log_uniform_a", (1.0, 16.0)), Init("softplus_inverse_log_uniform", (1e-3, 1e-1))
    if preset == "slow":
        return Init("constant", (math.log(0.1),)), Init("zeros")
    if preset == "g6":
        return Init("log_uniform_a", (0.03, 0.3)), Init("zeros")
    raise ValueError(f'unknown decay_init "{preset}"; allowed: {", ".join(DECAY_PRESETS)}')


def half_life_grid(count: int, low: float, high: float) -> list[float]:
    """Space ``count`` half-lives evenly in log over [low, high] tokens."""
    if count == 1:
        return [math.sqrt(low * high)]
    step = math.log(high / low) / (count - 1)
    return [low * math.exp(step * index) for index in range(count)]

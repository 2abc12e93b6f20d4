"""Kimi Delta Attention: its settings, parameters, state and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from gendistill.anatomy.family import Geometry
from gendistill.anatomy.settings import setting
from gendistill.anatomy.spec import Init, Kept, MixerSpec, ParameterSpec, StateSpec

SILU_ONE = 1.2784645427610738  # silu(SILU_ONE) == 1: the output gate starts open and passes values unchanged

# float32 numbers per token, head and channel that the eager chunked delta rule keeps for backward
_EAGER_COPIES = 24
# tokens of a chunk in our kernels
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class KDASettings:
    """Kimi Delta Attention (arXiv 2510.26692): its shape, and how it starts from attention.

    The geometry (heads, key/value heads, head_dim) is the teacher's. ``gate: bounded`` computes
    ``log_decay = lower_bound * sigmoid(exp(A_log) * (raw + dt_bias))``; ``softplus`` computes
    ``-exp(A_log) * softplus(raw + dt_bias)``.
    """

    conv_size: int = setting(4, "taps of the short causal convolution; 0 has none", ge=0, le=16)
    conv_activation: Literal["identity", "silu"] = "identity"
    conv_bias: bool = True
    gate: Literal["bounded", "softplus"] = "bounded"
    gate_lower_bound: float = setting(-5.0, "most negative log-decay per token (bounded)", ge=-20.0, lt=0.0)
    gate_rank: int | None = setting(None, "rank of the decay projection; null: head_dim", ge=1, le=2**20)
    decay_init: Literal["log_uniform", "mamba", "slow", "g6"] = "log_uniform"
    half_life: tuple[float, float] = setting((4.0, 512.0), "tokens; range of the log_uniform preset")
    output_gate: Literal["silu", "sigmoid", "none"] = "silu"
    output_gate_rank: int | None = setting(None, "rank of the output gate; null: head_dim", ge=1, le=2**20)
    output_norm: bool = setting(False, "RMSNorm over each head's output, before the gate")
    rope: bool = setting(False, "rotate q and k by position inside the mixer; false: no positions (NoPE)")
    qk_norm: Literal["fold", "drop"] = setting(
        "fold", "teacher's QK-norm scales: into q/k rows, or dropped", conversion_only=True
    )
    init: Literal["qkvo", "vo", "random"] = setting(
        "qkvo", "which projections start from the teacher's", conversion_only=True
    )

    def __post_init__(self) -> None:
        low, high = self.half_life
        if not 1e-3 <= low <= high <= 1e9:
            raise ValueError(
                f"half_life must be [low, high] with 0.001 <= low <= high <= 1e9, got [{low:g}, {high:g}]"
            )
        if self.gate == "bounded" and self.decay_init != "log_uniform":
            raise ValueError(
                f'decay_init "{self.decay_init}" needs gate: softplus; gate: bounded takes log_uniform'
            )


class KDASpec(MixerSpec):
    """Linear attention with a decay per channel and the delta rule."""

    kind = "kda"
    letter = "K"
    colour = ("#0072b2", "white")
    about = "linear attention with a state of fixed size"
    advice = "init: qkvo, half_life: [4, 512], conv_activation: identity, output_gate: silu"
    settings = KDASettings
    module = "gendistill.mixers.kda:KDA"
    op = "delta_rule"
    recurrent = True
    in_every_key = True

    def parameters(self, geometry: Geometry, settings: KDASettings) -> dict[str, ParameterSpec]:
        """List the parameters. Decay, beta and state are per query head; keys and values have the teacher's kv heads.

        Source: arXiv 2510.26692; names as in transformers' ``kimi_linear``.
        """
        hidden, heads, head_dim = geometry.hidden_size, geometry.num_heads, geometry.head_dim
        q_size, kv_size = heads * head_dim, geometry.num_kv_heads * head_dim
        projection = Init("normal", (geometry.initializer_range,))
        copied = {"qkvo": "qkvo", "vo": "vo", "random": ""}[settings.init]
        folded = geometry.qk_norm and settings.qk_norm == "fold"
        table: dict[str, ParameterSpec] = {}

        def linear(letter: str, shape: tuple[int, int], bias: bool) -> None:
            scale = f"{letter}_norm.weight" if folded and letter in "qk" else None
            for suffix, size, start in (("weight", shape, projection), ("bias", shape[:1], Init("zeros"))):
                if suffix == "weight" or bias:
                    name, moved = f"{letter}_proj.{suffix}", letter in copied
                    table[name] = ParameterSpec(
                        size, start, name if moved else None, scale if moved else None
                    )

        linear("q", (q_size, hidden), geometry.qkv_bias)
        linear("k", (kv_size, hidden), geometry.qkv_bias)
        linear("v", (kv_size, hidden), geometry.qkv_bias)
        if settings.conv_size:
            for name, size in (("q_conv1d", q_size), ("k_conv1d", kv_size), ("v_conv1d", kv_size)):
                taps = (size, 1, settings.conv_size)
                table[f"{name}.weight"] = ParameterSpec(taps, Init("last_tap"), decays=False)
                if settings.conv_bias:
                    table[f"{name}.bias"] = ParameterSpec((size,), Init("zeros"), decays=False)
        rank = settings.gate_rank or head_dim
        table["f_a_proj.weight"] = ParameterSpec((rank, hidden), projection)
        table["f_b_proj.weight"] = ParameterSpec((q_size, rank), projection)
        a_init, dt_init = _decay_inits(settings)
        table["A_log"] = ParameterSpec((heads,), a_init, float32=True, decays=False)
        table["dt_bias"] = ParameterSpec((q_size,), dt_init, float32=True, decays=False)
        table["b_proj.weight"] = ParameterSpec((heads, hidden), projection)
        if settings.output_gate != "none":
            open_gate = Init("constant", (SILU_ONE,)) if settings.output_gate == "silu" else Init("zeros")
            rank = settings.output_gate_rank or head_dim
            table["g_a_proj.weight"] = ParameterSpec((rank, hidden), projection)
            table["g_b_proj.weight"] = ParameterSpec((q_size, rank), Init("zeros"))
            table["g_b_proj.bias"] = ParameterSpec((q_size,), open_gate)
        if settings.output_norm:
            table["o_norm.weight"] = ParameterSpec((head_dim,), Init("ones"))
        linear("o", (hidden, q_size), geometry.output_bias)
        return table

    def state(self, geometry: Geometry, settings: KDASettings) -> dict[str, StateSpec]:
        """List the last inputs of the convolution, if there is one, and the float32 memory of every head."""
        channels = (geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_dim
        memory = (geometry.num_heads, geometry.head_dim, geometry.head_dim)
        conv = {"conv": StateSpec((channels, settings.conv_size - 1))} if settings.conv_size else {}
        return {**conv, "recurrent": StateSpec(memory, "float32")}

    def kept(self, geometry: Geometry, settings: KDASettings, impl: str | None) -> Kept:
        """Count what a layer keeps.

        Around the rule: its input, q, k, v before and after the convolution, two gates and its output, which are
        ``2h + 6q + 4kv``. Inside it: in eager torch the float32 working set of all chunks; in our kernels, per head of
        D channels, ``4D + 128 + D**2 / 64`` numbers and ``D / 64 + 3`` float32 numbers (docs/kernels/how.md: what
        memory holds when).
        """
        heads, head_dim = geometry.num_heads, geometry.head_dim
        q, kv = heads * head_dim, geometry.num_kv_heads * head_dim
        around = 2 * geometry.hidden_size + 6 * q + 4 * kv
        if impl != "triton":
            return Kept(around, _EAGER_COPIES * q)
        inside = 4 * head_dim + 2 * _CHUNK + math.ceil(head_dim**2 / _CHUNK)
        return Kept(around + heads * inside, heads * (math.ceil(head_dim / _CHUNK) + 3))

    def mixing_flops(self, geometry: Geometry, settings: KDASettings, length: int) -> int:
        """Count the recurrence: per token and head, what the key finds, what is written and what the query reads.

        Each is a product with the ``K x V`` memory. Kernels that work in chunks do more, which is not the model's.
        """
        return 6 * geometry.num_heads * geometry.head_dim**2 * length

    def not_used(self, name: str, settings: Any) -> str:
        """Say that a tensor starts anew, or that the norms of q and k have no place."""
        if not name.endswith("_norm.weight"):
            return f"starts new (init: {settings.init})"
        return "qk_norm: drop" if settings.qk_norm == "drop" else f"q and k start new (init: {settings.init})"


def _decay_inits(settings: KDASettings) -> tuple[Init, Init]:
    """Return how A_log and dt_bias start. With a zero gate projection they alone set the half-lives."""
    if settings.decay_init == "log_uniform":
        bounded = settings.gate == "bounded"
        bound = (settings.gate_lower_bound,) if bounded else ()
        scheme = "half_life_bounded" if bounded else "half_life_softplus"
        # the spread that log_uniform asks for sits in dt_bias alone
        return Init("zeros"), Init(scheme, (*settings.half_life, *bound))
    if settings.decay_init == "mamba":
        return Init("log_uniform_a", (1.0, 16.0)), Init("softplus_inverse_log_uniform", (1e-3, 1e-1))
    if settings.decay_init == "slow":
        return Init("constant", (math.log(0.1),)), Init("zeros")
    return Init("log_uniform_a", (0.03, 0.3)), Init("zeros")


KDA = KDASpec()

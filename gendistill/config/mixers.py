"""Settings of each mixer. The same sections are stored in a student's config.json."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gendistill.config.base import Section


class KDAConfig(Section):
    """Shape Kimi Delta Attention (arXiv 2510.26692) and say how it starts from attention.

    The geometry (heads, key/value heads, head_dim) is the teacher's. ``gate: bounded`` computes
    ``log_decay = lower_bound * sigmoid(exp(A_log) * (raw + dt_bias))``; ``softplus`` computes
    ``-exp(A_log) * softplus(raw + dt_bias)``.
    """

    conv_size: int = Field(
        default=4, ge=0, le=16, description="taps of the short causal convolution; 0 has none"
    )
    conv_activation: Literal["identity", "silu"] = "identity"
    conv_bias: bool = True
    gate: Literal["bounded", "softplus"] = "bounded"
    gate_lower_bound: float = Field(
        default=-5.0, ge=-20.0, lt=0.0, description="most negative log-decay per token (bounded)"
    )
    gate_rank: int | None = Field(
        default=None, ge=1, le=2**20, description="rank of the decay projection; null: head_dim"
    )
    decay_init: Literal["log_uniform", "mamba", "slow", "g6"] = "log_uniform"
    half_life: tuple[float, float] = Field(
        default=(4.0, 512.0), description="tokens; range of the log_uniform preset"
    )
    output_gate: Literal["silu", "sigmoid", "none"] = "silu"
    output_gate_rank: int | None = Field(
        default=None, ge=1, le=2**20, description="rank of the output gate; null: head_dim"
    )
    output_norm: bool = Field(default=False, description="RMSNorm over each head's output, before the gate")
    rope: bool = Field(
        default=False, description="rotate q and k by position inside the mixer; false: no positions (NoPE)"
    )
    qk_norm: Literal["fold", "drop"] = Field(
        default="fold", description="teacher's QK-norm scales: into q/k rows, or dropped"
    )
    init: Literal["qkvo", "vo", "random"] = Field(
        default="qkvo", description="which projections start from the teacher's"
    )

    @model_validator(mode="after")
    def _half_life_is_a_range(self) -> Self:
        low, high = self.half_life
        if not 1e-3 <= low <= high <= 1e9:
            raise ValueError(
                f"half_life must be [low, high] with 0.001 <= low <= high <= 1e9, got [{low:g}, {high:g}]"
            )
        return self

    @model_validator(mode="after")
    def _preset_fits_gate(self) -> Self:
        if self.gate == "bounded" and self.decay_init != "log_uniform":
            raise ValueError(
                f'decay_init "{self.decay_init}" needs gate: softplus; gate: bounded takes log_uniform'
            )
        return self


class SWAConfig(Section):
    """Shape sliding-window attention; its weights are the teacher's."""

    window: int = Field(default=512, ge=1, le=2**30, description="tokens a query sees, itself included")


class MixersConfig(Section):
    """Hold one section per kind of mixer; kept attention (``full``) has no settings."""

    kda: KDAConfig = KDAConfig()
    swa: SWAConfig = SWAConfig()

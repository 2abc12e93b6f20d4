"""What ``gendistill bench step`` trains: sizes of real models, our recipes' placements, and bars. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gendistill.anatomy.groups import ParamGroup
from gendistill.config.objectives import BlockOutputConfig, KLConfig
from gendistill.config.schema import ScheduleConfig, StageConfig

STAGES = ("distill", "block")
SPEED, RATIO, MEMORY, IDLE = "tokens/s", "times as fast as stock parts", "peak memory", "GPU idle share"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A teacher's sizes, and what its layers become.

    Attributes:
        name: What ``--shape`` calls it.
        family: Of the teacher.
        sizes: Fields of its configuration.
        placement: Mixer of every layer, as a recipe writes it.
        seq_len: Tokens of a packed row.
        rows: Rows of a step.
        micro_batch: Rows of a forward pass.
        mean_tokens: Of a document.
    """

    name: str
    family: str
    sizes: Mapping[str, Any] = field(repr=False)
    placement: str
    seq_len: int
    rows: int
    micro_batch: int
    mean_tokens: int = 500


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="qwen3-0.6b",
            family="qwen3",
            sizes={
                "vocab_size": 151_936,
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 40_960,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "tie_word_embeddings": True,
            },
            placement="full@0,2,6,11,13,18,21 kda",
            seq_len=4096,
            rows=16,
            micro_batch=4,
        ),
        Shape(
            name="qwen2.5-0.5b",
            family="qwen2",
            sizes={
                "vocab_size": 151_936,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32_768,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "tie_word_embeddings": True,
            },
            placement="kda kda kda full",
            seq_len=2048,
            rows=32,
            micro_batch=8,
        ),
        Shape(
            name="smollm2-135m",
            family="llama",
            sizes={
                "vocab_size": 49_152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
                "tie_word_embeddings": True,
            },
            placement="full@0,1,2,6,10,15,20,25 kda",
            seq_len=1024,
            rows=64,
            micro_batch=32,
        ),
        # for a CPU: everything of the others, in seconds
        Shape(
            name="tiny",
            family="qwen3",
            sizes={
                "vocab_size": 257,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "initializer_range": 0.3,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            },
            placement="kda full kda",
            seq_len=64,
            rows=4,
            micro_batch=2,
            mean_tokens=20,
        ),
    )
}

# (shape, stage, quantity): tokens a second and times not below, GB not above
BARS = {
    ("qwen3-0.6b", "distill", SPEED): 75_000.0,
    ("qwen3-0.6b", "distill", MEMORY): 60.0,
    ("qwen3-0.6b", "block", SPEED): 110_000.0,
    ("qwen2.5-0.5b", "distill", SPEED): 90_000.0,
    ("smollm2-135m", "distill", SPEED): 160_000.0,
    ("qwen3-0.6b", "distill", RATIO): 3.0,
    ("qwen3-0.6b", "distill", IDLE): 0.05,
    ("qwen3-0.6b", "block", IDLE): 0.05,
}


def stage_config(
    stage: str, *, seq_len: int, rows: int, micro_batch: int, checkpointing: bool
) -> StageConfig:
    """Describe a stage as the published recipe has it, at a constant rate and without logs and checkpoints.

    Args:
        stage: ``distill`` trains mixers, MLPs and norms end to end under forward KL; ``block`` trains mixers at the
            output of their blocks.
        seq_len: Tokens of a packed row.
        rows: Rows of a step.
        micro_batch: Rows of a forward pass.
        checkpointing: Whether activations are computed again in the backward pass.
    """
    own: dict[str, Any] = {
        "distill": {
            "objective": KLConfig(),
            "train": (ParamGroup.MIXER, ParamGroup.MLP, ParamGroup.NORM),
            "lr": 2.5e-5,
        },
        "block": {
            "objective": BlockOutputConfig(norm="l2"),
            "train": (ParamGroup.MIXER,),
            "lr": 1e-3,
            "weight_decay": 0.0,
        },
    }[stage]
    return StageConfig(
        **own,
        data="synthetic",
        steps=10**9,
        seq_len=seq_len,
        batch_size=rows,
        micro_batch_size=micro_batch,
        gradient_checkpointing=checkpointing,
        log_every_steps=10**9,
        schedule=ScheduleConfig(kind="constant", warmup=0.0),
    )

"""Public maths on ``[B, T, H, D]`` tensors; ``reference`` defines every op in eager torch."""

from gendistill.ops.gated_delta_rule import gated_delta_rule
from gendistill.ops.gated_norm import gated_rms_norm
from gendistill.ops.kda import gated_kda, kda
from gendistill.ops.reference.attention import sliding_window_attention
from gendistill.ops.reference.delta_rule import chunk_delta_rule, recurrent_delta_rule
from gendistill.ops.reference.gates import bounded_log_decay, l2norm, softplus_log_decay
from gendistill.ops.short_conv import causal_conv
from gendistill.ops.types import Impl, OpOutput, Segments, resolve_impl

__all__ = [
    "Impl",
    "OpOutput",
    "Segments",
    "bounded_log_decay",
    "causal_conv",
    "chunk_delta_rule",
    "gated_delta_rule",
    "gated_kda",
    "gated_rms_norm",
    "kda",
    "l2norm",
    "recurrent_delta_rule",
    "resolve_impl",
    "sliding_window_attention",
    "softplus_log_decay",
]

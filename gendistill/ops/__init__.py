"""Public maths on ``[B, T, H, D]`` tensors; ``reference`` defines every op in eager torch."""

from gendistill.ops.conv import causal_conv
from gendistill.ops.decode import decode_delta_rule
from gendistill.ops.delta_rule import (
    chunk_delta_rule,
    chunk_gdn,
    chunk_kda,
    recurrent_delta_rule,
    recurrent_gdn,
    recurrent_kda,
)
from gendistill.ops.divergence import Divergence, DivergenceOutput, Term, TopK, linear_divergence
from gendistill.ops.gates import bounded_log_decay, l2norm, log_decay, softplus_log_decay
from gendistill.ops.norm import gated_rms_norm
from gendistill.ops.reference.attention import sliding_window_attention
from gendistill.ops.select import Impl, resolve
from gendistill.ops.types import OpOutput, Segments

__all__ = [
    "Divergence",
    "DivergenceOutput",
    "Impl",
    "OpOutput",
    "Segments",
    "Term",
    "TopK",
    "bounded_log_decay",
    "causal_conv",
    "chunk_delta_rule",
    "chunk_gdn",
    "chunk_kda",
    "decode_delta_rule",
    "gated_rms_norm",
    "l2norm",
    "linear_divergence",
    "log_decay",
    "recurrent_delta_rule",
    "recurrent_gdn",
    "recurrent_kda",
    "resolve",
    "sliding_window_attention",
    "softplus_log_decay",
]

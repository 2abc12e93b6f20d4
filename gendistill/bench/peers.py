"""Who is measured: our ops, and those of fla-core where it is installed, each called as its user calls it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor

from gendistill.bench.cases import LOWER_BOUND
from gendistill.bench.inputs import NORM_EPS, DecodeInputs, SequenceInputs, decode_settings
from gendistill.ops import Impl, OpOutput, chunk_kda, decode_delta_rule


class Contestant(Protocol):
    """Who runs the two ops under test."""

    label: str

    def sequence(self, x: SequenceInputs) -> OpOutput:
        """Normalise q and k, apply the gates and the delta rule to whole sequences."""
        ...

    def decode(self, x: DecodeInputs) -> Callable[[], OpOutput]:
        """Return a step from the inputs to the output ``[N, 1, H, K]``, which owns copies of both states.

        The state that the step returns is laid out as ``[N, H, K, K]``.
        """
        ...


class Ours:
    """Our Triton kernels."""

    label = "gendistill"

    def sequence(self, x: SequenceInputs) -> OpOutput:
        """As :class:`Contestant` says."""
        return chunk_kda(
            x.q,
            x.k,
            x.v,
            x.decay,
            x.beta,
            gate=x.gate,  # pyright: ignore[reportArgumentType]
            a_log=x.a_log,
            dt_bias=x.dt_bias,
            lower_bound=LOWER_BOUND,
            state=x.state,
            segments=x.segments,
            impl=Impl.TRITON,
        )

    def decode(self, x: DecodeInputs) -> Callable[[], OpOutput]:
        """As :class:`Contestant` says; the state changes in place."""
        state, conv_state = x.state.clone(), x.conv_state.clone()
        q, k, v = x.split(x.qkv, 2)
        settings = {**decode_settings(x), "conv_state": conv_state, "impl": Impl.TRITON}

        def step() -> OpOutput:
            return OpOutput(decode_delta_rule(q, k, v, x.decay, x.beta, state, **settings), state)

        return step


class FlaCore:
    """The KDA ops of fla-core, with Triton kernels only and every fusion that they offer.

    Raises:
        PackageNotFoundError: It is not installed.
    """

    def __init__(self) -> None:
        os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
        self.label = f"fla-core {metadata.version('fla-core')}"
        self._kda: Any = importlib.import_module("fla.ops.kda")

    def sequence(self, x: SequenceInputs) -> OpOutput:
        """As :class:`Contestant` says; grouped k and v are repeated here, for its keys have a head per query."""
        k, v = (_repeated(part, x.q.shape[2]) for part in (x.k, x.v))
        bounded = x.gate == "bounded"
        out, state = self._kda.chunk_kda(
            x.q,
            k,
            v,
            x.decay,
            x.beta,
            A_log=x.a_log,
            dt_bias=x.dt_bias,
            initial_state=x.state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            safe_gate=bounded,
            lower_bound=LOWER_BOUND if bounded else None,
            cu_seqlens=x.cu_seqlens,
        )
        return OpOutput(out, state)

    def decode(self, x: DecodeInputs) -> Callable[[], OpOutput]:
        """As :class:`Contestant` says; three convolutions, the recurrence, and the gated norm."""
        convolve = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d_update
        channels = x.decay.shape[-1]
        norm = importlib.import_module("fla.modules").FusedRMSNormGated(
            channels, eps=NORM_EPS, activation="swish", device=x.qkv.device, dtype=x.qkv.dtype
        )
        with torch.no_grad():
            norm.weight.copy_(x.norm_weight)
        # its cache has a place for the token to come, and its layers keep the state value by key
        wide = torch.nn.functional.pad(x.conv_state, (1, 0))
        tokens, weights, biases = x.split(x.qkv, 2), x.split(x.conv_weight, 0), x.split(x.conv_bias, 0)
        windows = list(zip(tokens, x.split(wide, 1), weights, biases, strict=True))
        start = x.state.transpose(2, 3).contiguous()
        gate = x.output_gate.view(x.decay.shape)

        def step() -> OpOutput:
            mixed = [
                convolve(token, past, weight=weight, bias=bias)[0] for token, past, weight, bias in windows
            ]
            q, k, v = (_repeated(part.unflatten(-1, (-1, channels)), x.heads) for part in mixed)
            out, state = self._kda.fused_recurrent_kda(
                q,
                k,
                v,
                x.decay,
                x.beta,
                A_log=x.a_log,
                dt_bias=x.dt_bias,
                initial_state=start,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True,
                lower_bound=LOWER_BOUND,
                state_v_first=True,
            )
            return OpOutput(norm(out, gate), state.transpose(2, 3))

        return step


def _repeated(part: Tensor, heads: int) -> Tensor:
    groups = heads // part.shape[2]
    return part if groups == 1 else part.repeat_interleave(groups, dim=2)

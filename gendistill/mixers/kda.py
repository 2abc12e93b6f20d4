"""Kimi Delta Attention as a layer, shaped like the attention it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gendistill.anatomy.family import Geometry
from gendistill.anatomy.kda import KDA as SPEC
from gendistill.anatomy.kda import KDASettings
from gendistill.mixers.base import Mixer, MixerState, SequenceInfo, rotate
from gendistill.mixers.init import half_lives
from gendistill.ops.conv import causal_conv
from gendistill.ops.decode import decode_delta_rule
from gendistill.ops.delta_rule import chunk_kda
from gendistill.ops.gates import log_decay
from gendistill.ops.norm import gated_rms_norm
from gendistill.ops.select import Impl, resolve

# up to this many tokens after the first ones are decoded at once
_DECODE_TOKENS = 8


class ShortConv(nn.Module):
    """The taps of a depthwise convolution: ``weight`` ``[C, 1, W]`` and ``bias`` ``[C]``."""

    def __init__(self, channels: int, taps: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.register_parameter("bias", nn.Parameter(torch.empty(channels)) if bias else None)


class KDA(Mixer):
    """Kimi Delta Attention as a layer.

    Queries, keys and values are projected, passed through a short causal convolution and L2-normalised (q, k); a
    low-rank projection gates the decay of every key channel, another one the output. Keys and values may have
    fewer heads than queries; decay, write strength and memory are per query head.

    Arguments are those of :class:`~gendistill.mixers.base.Mixer`; settings are the fields of
    :class:`~gendistill.anatomy.kda.KDASettings`, such as ``gate="softplus"``.

    Source: arXiv 2510.26692; grouped heads and the identity convolution as in arXiv 2603.26556.
    """

    spec = SPEC
    projects = True

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_conv1d: ShortConv
    k_conv1d: ShortConv
    v_conv1d: ShortConv
    f_a_proj: nn.Linear
    f_b_proj: nn.Linear
    b_proj: nn.Linear
    g_a_proj: nn.Linear
    g_b_proj: nn.Linear
    o_norm: nn.RMSNorm
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def build(self, geometry: Geometry, settings: KDASettings) -> None:
        """Make one module per entry of the parameter table."""
        self.conv_size, self.conv_activation = settings.conv_size, settings.conv_activation
        self.gate, self.gate_lower_bound = settings.gate, settings.gate_lower_bound
        self.output_gate, self.rope = settings.output_gate, settings.rope
        self.norm_eps = geometry.norm_eps
        table = self.table
        for name, spec in table.items():
            owner, _, leaf = name.rpartition(".")
            if not owner:
                self.register_parameter(leaf, nn.Parameter(torch.empty(spec.shape)))
            elif leaf == "bias":
                continue
            elif owner.endswith("_conv1d"):
                self.add_module(owner, ShortConv(spec.shape[0], spec.shape[2], bias=f"{owner}.bias" in table))
            elif owner == "o_norm":
                self.add_module(owner, nn.RMSNorm(spec.shape[0], eps=geometry.norm_eps))
            else:
                rows, columns = spec.shape
                self.add_module(owner, nn.Linear(columns, rows, bias=f"{owner}.bias" in table))

    @property
    def impl(self) -> Impl:
        """The implementation that runs on the weights' device.

        Raises:
            ValueError: ``triton`` was requested and cannot run there.
        """
        return resolve(self.requested_impl, op="delta_rule", device=self.A_log.device)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """Compute the natural-log decay per key channel.

        Args:
            hidden_states: ``[B, T, hidden_size]``, the mixer's input.
        Returns: ``[B, T, H, K]`` float32, <= 0.
        """
        raw_decay, _, _ = self._raise_ranks(self.project(hidden_states, *self._inner))
        return log_decay(raw_decay, **self._gate)

    def diagnostics(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """Compute the half-life of every key channel, ``[B, T, H, K]`` in tokens."""
        return {"half_life": half_lives(self.log_decay(hidden_states))}

    def forward(
        self,
        hidden_states: Tensor,
        *,
        sequences: SequenceInfo | None = None,
        state: MixerState | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, MixerState]:
        """Mix a batch of sequences.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            sequences: Padding or packed documents; None when every row is one sequence without padding.
            state: What was remembered of the ``N`` sequences, or None. ``N`` is B, or the number of segments.
            position_embeddings: ``cos`` and ``sin`` ``[B or 1, T, head_dim]``; needed with ``rope`` only.
        Returns: ``[B, T, hidden_size]``, zero at padding, and the new state.
        """
        batch, length = hidden_states.shape[:2]
        impl = self.impl
        few = length <= _DECODE_TOKENS and sequences is None and not self.rope
        if few and state is not None and not torch.is_grad_enabled():
            skips = state.lives is not None
            # the chunked path below knows of no rows to skip, and changes their states like others
            if skips or impl is Impl.TRITON:
                return self._decode(hidden_states, state, impl)
        x = hidden_states if sequences is None else sequences.gather(hidden_states)
        if self._all in self.packed and not torch.is_grad_enabled():
            qkv, side_by_side = self._project_at_once(x)
            inner = self._split_inner(side_by_side)
        else:
            qkv, inner = self.project_together(x, *self._qkv), self.project(x, *self._inner)
        q, k, v, conv_state = self._convolve(qkv, sequences, state, impl)
        raw_decay, raw_beta, output_gate = self._raise_ranks(inner)
        if self.rope:
            if position_embeddings is None:
                raise ValueError("rope is on: pass position_embeddings=(cos, sin)")
            angles = tuple(part.expand(batch, -1, -1) for part in position_embeddings)
            cos, sin = angles if sequences is None else (sequences.gather(part) for part in angles)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out, memory = chunk_kda(
            q,
            k,
            v,
            raw_decay,
            raw_beta,
            **self._gate,
            state=None if state is None else state.recurrent,
            segments=None if sequences is None else sequences.segments,
            impl=impl,
        )
        y = gated_rms_norm(out, self._norm_weight, output_gate, **self._output_settings, impl=impl)
        (y,) = self.project(y, self.o_proj)
        if sequences is not None:
            y = sequences.scatter(y, batch, length)
        return y, MixerState(conv_state, memory)

    def _decode(self, x: Tensor, state: MixerState, impl: Impl) -> tuple[Tensor, MixerState]:
        """Take a few more tokens, by one op between the projections."""
        conv, recurrent = state.conv, state.recurrent
        if not state.owned:
            # the kernel steps through contiguous states; these may lie otherwise in memory
            recurrent = recurrent.clone(memory_format=torch.contiguous_format)
            conv = None if conv is None else conv.clone(memory_format=torch.contiguous_format)
        if self._all in self.packed:
            qkv, inner = self._project_at_once(x)
            q, k, v = qkv.split([layer.out_features for layer in self._qkv], dim=-1)
            raw_decay, raw_beta, output_gate = self._raise_ranks_at_once(inner)
        else:
            q, k, v = self.project(x, *self._qkv)
            raw_decay, raw_beta, output_gate = self._raise_ranks(self.project(x, *self._inner))
        conv_weight, conv_bias = self._taps()
        out = decode_delta_rule(
            q,
            k,
            v,
            raw_decay,
            raw_beta,
            recurrent,
            **self._gate,
            conv_weight=conv_weight or None,
            conv_bias=conv_bias or None,
            conv_state=conv,
            conv_activation=self.conv_activation,
            norm_weight=self._norm_weight,
            norm_eps=self.norm_eps,
            output_gate=output_gate,
            output_activation=self.output_gate,
            lives=state.lives,
            impl=impl,
        )
        (y,) = self.project(out.flatten(-2), self.o_proj)
        return y, MixerState(conv, recurrent)

    def projections(self) -> list[tuple[nn.Linear, ...]]:
        """List the groups of linear layers that read the same input."""
        groups = [self._all, self._qkv, self._inner, (self.f_b_proj,), (self.o_proj,)]
        return groups if self.output_gate == "none" else [*groups, (self.g_b_proj,)]

    @property
    def _all(self) -> tuple[nn.Linear, ...]:
        """The layers that read the input."""
        return (*self._qkv, *self._inner)

    @property
    def _qkv(self) -> tuple[nn.Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def _inner(self) -> tuple[nn.Linear, ...]:
        """The layers that lead from the input to decay, write strength and output gate."""
        layers = (self.f_a_proj, self.b_proj)
        return layers if self.output_gate == "none" else (self.f_a_proj, self.g_a_proj, self.b_proj)

    def _project_at_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries, keys and values side by side, and so what the inner layers make, from a single product."""
        out = self.packed[self._all](x)
        channels = sum(layer.out_features for layer in self._qkv)
        return out[..., :channels], out[..., channels:]

    def _split_inner(self, side_by_side: Tensor) -> tuple[Tensor, ...]:
        """Cut outputs of the inner layers, after which there may be more."""
        widths = [layer.out_features for layer in self._inner]
        return side_by_side[..., : sum(widths)].split(widths, dim=-1)

    def _raise_ranks(self, inner: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return raw decays ``[B, T, H, K]``, raw write strengths ``[B, T, H]``, and the raw output gate or None.

        Args:
            inner: What the inner layers make of the input.
        """
        decay, *gate, beta = inner
        (decay,) = self.project(decay, self.f_b_proj)
        raw_gate = self.project(gate[0], self.g_b_proj)[0] if gate else None
        return decay.unflatten(-1, (self.num_heads, self.head_dim)), beta, raw_gate

    def _raise_ranks_at_once(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Do so from outputs that lie side by side, by a single product if there is one; tokens may then be apart."""
        packed, parts = self.packed.get(self.side_by_side()), self._split_inner(inner)
        if packed is None:
            return self._raise_ranks(parts)
        decay, gate = packed(inner[..., : sum(layer.in_features for layer in self.side_by_side())])
        return decay.unflatten(-1, (self.num_heads, self.head_dim)), parts[-1], gate

    def side_by_side(self) -> tuple[nn.Linear, ...]:
        """List the layers that raise the ranks of decay and output gate."""
        return () if self.output_gate == "none" else (self.f_b_proj, self.g_b_proj)

    def _taps(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights ``[channels, W]`` and biases ``[channels]`` of the convolutions, none if there are none."""
        if not self.conv_size:
            return [], []
        convs: Any = self.convolutions()
        biases = [conv.bias for conv in convs]
        return [conv.weight.squeeze(1) for conv in convs], [bias for bias in biases if bias is not None]

    def convolutions(self) -> tuple[nn.Module, ...]:
        """List the convolutions of queries, keys and values, if there are any."""
        return (self.q_conv1d, self.k_conv1d, self.v_conv1d) if self.conv_size else ()

    def _all_taps(self) -> tuple[Tensor, Tensor | None]:
        """Return weights ``[channels, W]`` and biases ``[channels]`` of the convolutions as one."""
        packed = None if torch.is_grad_enabled() else self.packed.get(self.convolutions())
        if packed is not None:
            return packed.weight, packed.bias
        weights, biases = self._taps()
        return torch.cat(weights), torch.cat(biases) if biases else None

    def _convolve(
        self, qkv: Tensor, sequences: SequenceInfo | None, state: MixerState | None, impl: Impl
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        conv_state = None
        if self.conv_size:
            weight, bias = self._all_taps()
            qkv, conv_state = causal_conv(
                qkv,
                weight,
                bias,
                activation=self.conv_activation,
                state=None if state is None else state.conv,
                segments=None if sequences is None else sequences.segments,
                impl=impl,
            )
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        return q, k, v, conv_state

    @property
    def _norm_weight(self) -> Tensor | None:
        """Weight of the output norm, None where the layer has none."""
        return self.o_norm.weight if "o_norm" in self._modules else None

    @property
    def _gate(self) -> dict[str, Any]:
        """What turns raw decays into decays, as ops take it."""
        return {
            "gate": self.gate,
            "a_log": self.A_log,
            "dt_bias": self.dt_bias,
            "lower_bound": self.gate_lower_bound,
        }

    @property
    def _output_settings(self) -> dict[str, Any]:
        return {"activation": self.output_gate, "eps": self.norm_eps}

"""Draw the inputs of a case, and compute in float64, token by token, what a right answer is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gendistill.bench.cases import LOWER_BOUND, Case, DecodeCase
from gendistill.ops import (
    OpOutput,
    Segments,
    decode_delta_rule,
    recurrent_kda,
)

NORM_EPS = 1e-6


class SequenceInputs(NamedTuple):
    """The arguments of :func:`gendistill.ops.chunk_kda`.

    Attributes:
        q, k, v, decay, beta, a_log, dt_bias, state: The tensors; ``state`` may be None.
        gate: ``bounded`` or ``softplus``.
        segments: Of packed documents, or None.
        cu_seqlens: Their ends, int64, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    a_log: Tensor
    dt_bias: Tensor
    state: Tensor | None
    gate: str
    segments: Segments | None
    cu_seqlens: Tensor | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of, by the names in the tables."""
        names = ("q", "k", "v", "decay", "beta", "A_log", "dt_bias", "state")
        return {name: part for name, part in zip(names, self[:8], strict=True) if part is not None}


class DecodeInputs(NamedTuple):
    """What a decode step reads, and the states before it.

    Attributes:
        qkv: ``[N, 1, (H + 2 Hkv) K]`` before the convolution.
        decay: ``[N, 1, H, K]`` raw.
        beta: ``[N, 1, H]`` logits.
        a_log, dt_bias: ``[H]`` and ``[H * K]`` float32.
        conv_weight, conv_bias: ``[C, W]`` and ``[C]``.
        norm_weight: ``[K]``.
        output_gate: ``[N, 1, H * K]`` raw.
        state: ``[N, H, K, K]`` float32.
        conv_state: ``[N, C, W - 1]``.
        heads, kv_heads: How many.
    """

    qkv: Tensor
    decay: Tensor
    beta: Tensor
    a_log: Tensor
    dt_bias: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    norm_weight: Tensor
    output_gate: Tensor
    state: Tensor
    conv_state: Tensor
    heads: int
    kv_heads: int

    def split(self, packed: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Cut the channels of q, k and v apart."""
        channels = self.decay.shape[-1]
        sizes = [self.heads * channels, self.kv_heads * channels, self.kv_heads * channels]
        return tuple(part.contiguous() for part in packed.split(sizes, dim=dim))


def _gate_parameters(heads: int, channels: int, gate: str, device: str) -> tuple[Tensor, Tensor]:
    """Draw gate parameters as a layer starts with them, spread from short to long memory."""
    dt = torch.empty(heads * channels, device=device).uniform_(-6.9, -2.3).exp()
    if gate == "softplus":
        a_log = torch.empty(heads, device=device).uniform_(1, 16).log()
        return a_log, dt + torch.log(-torch.expm1(-dt))
    a_log = torch.empty(heads, device=device).uniform_(-0.3, 0.3)
    return a_log, torch.logit(dt / -LOWER_BOUND)


def draw_sequence(
    case: Case, gate: str, *, device: str, dtype: torch.dtype, with_state: bool = False, seed: int = 0
) -> SequenceInputs:
    """Draw a case; every tensor requires a gradient."""
    torch.manual_seed(seed)
    B, T, H, K = case.batch, case.tokens, case.heads, case.channels

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

    segments = None if case.lengths is None else Segments(list(case.lengths), device=device)
    number = B if segments is None else len(segments.lengths)
    a_log, dt_bias = _gate_parameters(H, K, gate, device)
    x = SequenceInputs(
        q=normal(B, T, H, K),
        k=normal(B, T, case.kv_heads, K),
        v=normal(B, T, case.kv_heads, K),
        decay=normal(B, T, H, K),
        beta=normal(B, T, H),
        a_log=a_log,
        dt_bias=dt_bias,
        state=normal(number, H, K, K, dtype=torch.float32) * K**-0.5 if with_state else None,
        gate=gate,
        segments=segments,
        cu_seqlens=None if segments is None else segments.cu_seqlens.long(),
    )
    for part in x.leaves.values():
        part.requires_grad_()
    return x


def exact_sequence(x: SequenceInputs) -> tuple[SequenceInputs, OpOutput]:
    """Apply the definition in float64; returns the inputs that its gradients are taken of, and its result."""
    names = [name for name in x._fields[:8] if getattr(x, name) is not None]
    exact = x._replace(**{name: getattr(x, name).detach().double().requires_grad_() for name in names})
    gates = {"gate": x.gate, "a_log": exact.a_log, "dt_bias": exact.dt_bias, "lower_bound": LOWER_BOUND}
    if x.segments is None:
        return exact, recurrent_kda(*exact[:5], **gates, state=exact.state)
    documents = [part.split(x.segments.lengths, dim=1) for part in exact[:5]]
    states = [None] * len(x.segments.lengths) if exact.state is None else exact.state.split(1)
    results = [
        recurrent_kda(*document, **gates, state=state)
        for *document, state in zip(*documents, states, strict=True)
    ]
    outs, states = zip(*results, strict=True)
    return exact, OpOutput(torch.cat(outs, 1), torch.cat(states))


def draw_decode(case: DecodeCase, *, device: str, dtype: torch.dtype, seed: int = 0) -> DecodeInputs:
    """Draw a decode step with the bounded gate."""
    torch.manual_seed(seed)
    N, H, K = case.batch, case.heads, case.channels
    C = (H + 2 * case.kv_heads) * K

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    return DecodeInputs(
        normal(N, 1, C),
        normal(N, 1, H, K),
        normal(N, 1, H),
        *_gate_parameters(H, K, "bounded", device),
        conv_weight=normal(C, case.taps) * 0.5,
        conv_bias=normal(C) * 0.1,
        norm_weight=1 + 0.1 * normal(K),
        output_gate=normal(N, 1, H * K),
        state=torch.randn(N, H, K, K, device=device) * K**-0.5,
        conv_state=normal(N, C, case.taps - 1),
        heads=H,
        kv_heads=case.kv_heads,
    )


def decode_settings(x: DecodeInputs) -> dict[str, Any]:
    """Say what :func:`gendistill.ops.decode_delta_rule` is told of a step, but for its tokens and states."""
    return {
        "gate": "bounded",
        "a_log": x.a_log,
        "dt_bias": x.dt_bias,
        "lower_bound": LOWER_BOUND,
        "conv_weight": x.split(x.conv_weight, 0),
        "conv_bias": x.split(x.conv_bias, 0),
        "norm_weight": x.norm_weight,
        "norm_eps": NORM_EPS,
        "output_gate": x.output_gate,
        "output_activation": "silu",
    }


def exact_decode(x: DecodeInputs) -> OpOutput:
    """Apply the definition in float64; ``out`` is ``[N, 1, H, K]``."""
    tensors = {name: part.double() for name, part in x._asdict().items() if isinstance(part, Tensor)}
    exact = x._replace(**tensors)
    (q, k, v), state = exact.split(exact.qkv, 2), exact.state
    settings = decode_settings(exact)
    out = decode_delta_rule(q, k, v, exact.decay, exact.beta, state, conv_state=exact.conv_state, **settings)
    return OpOutput(out, state)

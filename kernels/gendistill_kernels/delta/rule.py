"""What the delta rule takes and returns, in words that torch alone understands: no triton here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from gendistill_kernels.runtime.memory import Shape

_ERASE, _WRITE = ("none", "scalar", "channel"), ("scalar", "channel")


class Rule(NamedTuple):
    """What the inputs of a call mean.

    Attributes:
        gate: ``none``: ``decay`` holds log-decays; ``softplus``: raw values, log-decay
            ``-exp(A_log) softplus(raw + dt_bias)``; ``bounded``: ``lower_bound sigmoid(exp(A_log) (raw + dt_bias))``.
        lower_bound: Of the bounded gate.
        norm: L2-normalise q and k.
        sigmoid: ``beta``, ``Inputs.erase`` and ``Inputs.write`` hold logits.
        scale: Factor on q; ``K ** -0.5`` by default.
        erase: What a write first erases under its key: ``none``; ``scalar``: ``beta`` of it; ``channel``: of every key
            channel what ``Inputs.erase`` says.
        write: How much of v is written: ``scalar``: ``beta`` of it; ``channel``: of every value channel what
            ``Inputs.write`` says.

    Whether the decay is one per head shows in the shape of ``Inputs.decay``.
    """

    gate: Literal["none", "softplus", "bounded"] = "none"
    lower_bound: float = -5.0
    norm: bool = True
    sigmoid: bool = True
    scale: float | None = None
    erase: Literal["none", "scalar", "channel"] = "scalar"
    write: Literal["scalar", "channel"] = "scalar"


class Inputs(NamedTuple):
    """The tensors that the forward and the backward pass read.

    Attributes:
        q, k: ``[B, T, HQ, K]``, ``[B, T, HK, K]``.
        v: ``[B, T, HV, V]``.
        decay: ``[B, T, H, K]`` or ``[B, T, H]``, as ``Rule.gate`` says.
        beta: ``[B, T, H]``, as ``Rule.sigmoid`` says; None if neither ``Rule.erase`` nor ``Rule.write`` is ``scalar``.
        A_log, dt_bias: ``[H]`` and ``[H * K]``, or ``[H]`` for one decay per head; float32, of the gate; None without.
        erase: ``[B, T, H, K]`` if ``Rule.erase`` is ``channel``, else None.
        write: ``[B, T, H, V]`` if ``Rule.write`` is ``channel``, else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor | None
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    erase: Tensor | None = None
    write: Tensor | None = None


class Saved(NamedTuple):
    """What the backward pass needs besides inputs and output, as bytes; see ``layout.work_spaces``.

    Attributes:
        early: What the first half of the backward pass is the last to read.
        late: The rest.
    """

    early: Tensor
    late: Tensor


class Gradients(NamedTuple):
    """The gradients of ``Inputs`` and of the initial state, in their shapes and dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    erase: Tensor | None
    write: Tensor | None
    state: Tensor | None


class Heads(NamedTuple):
    """How many heads q, k and v have; each count divides that of the state."""

    q: int
    k: int
    v: int


class Convolution(NamedTuple):
    """The short convolution of q, k and v.

    Attributes:
        weight: ``[C, W]``, contiguous, or one for each of q, k and v; the last tap multiplies the current token.
        state: ``[N, C, W - 1]`` inputs before the first token, contiguous, in the dtype of the inputs or float32;
            updated in place. None for one tap.
        bias: ``[C]``, or one for each of q, k and v, or None.
        activation: ``identity`` or ``silu``.
    """

    weight: Tensor | Sequence[Tensor]
    state: Tensor | None
    bias: Tensor | Sequence[Tensor] | None = None
    activation: Literal["identity", "silu"] = "identity"


class Finish(NamedTuple):
    """What happens to the output of every head.

    Attributes:
        norm_weight: ``[V]`` of an RMSNorm over the head's channels, or None for no norm.
        norm_eps: Of that norm.
        gate: ``[N, T, H * V]`` raw output gate, or None.
        gate_activation: ``silu``, ``sigmoid`` or ``none``.
    """

    norm_weight: Tensor | None = None
    norm_eps: float = 1e-6
    gate: Tensor | None = None
    gate_activation: Literal["silu", "sigmoid", "none"] = "silu"


def check_gate(decay: Shape, rate: Shape | None, bias: Shape | None) -> None:
    """Refuse parameters of a gate, of these shapes, that do not fit the decay's."""
    for name, shape, number, per in (
        ("A_log", rate, decay[2], "head"),
        ("dt_bias", bias, math.prod(decay[2:]), "head" if len(decay) == 3 else "head and key channel"),
    ):
        if shape is None or math.prod(shape) != number:
            got = "None" if shape is None else f"shape {list(shape)}"
            raise ValueError(f"{name} must have {number} elements, one for each {per}, got {got}")


def check_rule(
    rule: Rule,
    decay: Shape,
    K: int,
    V: int,
    *,
    beta: Shape | None,
    erase: Shape | None,
    write: Shape | None,
) -> None:
    """Refuse inputs, of these shapes, that a rule has no use for, or a rule that lacks some."""
    for name, kind, kinds in (("erase", rule.erase, _ERASE), ("write", rule.write, _WRITE)):
        if kind not in kinds:
            raise ValueError(
                f"Rule.{name} must be one of {', '.join(kinds)}, got {kind!r}; choose one of them"
            )
    rows = tuple(decay[:3])
    scalar = "scalar" in (rule.erase, rule.write)
    parts = (
        ("beta", beta, rows if scalar else None),
        ("erase", erase, (*rows, K) if rule.erase == "channel" else None),
        ("write", write, (*rows, V) if rule.write == "channel" else None),
    )
    for name, part, shape in parts:
        if (part is None) != (shape is None) or (part is not None and tuple(part) != shape):
            got = None if part is None else list(part)
            fix = "leave it out" if shape is None else "pass it"
            raise ValueError(
                f'with erase "{rule.erase}" and write "{rule.write}" {name} must be'
                f" {None if shape is None else list(shape)}, got {got}; {fix}, or change Rule.erase or Rule.write"
            )

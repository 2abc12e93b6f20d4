"""The gated delta rule: one rule with named cases, in chunks of tokens or token by token.

What decays, what a write erases and how much is written tell the cases apart. ``chunk_`` names are for training and
prompts, ``recurrent_`` names for a few tokens after a state; both give the same answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gendistill.ops.gates import GATES, Gate, apply_gates
from gendistill.ops.reference.delta_rule import chunk_delta_rule as chunk_reference
from gendistill.ops.reference.delta_rule import recurrent_delta_rule as recurrent_reference
from gendistill.ops.select import Impl, contract, is_triton
from gendistill.ops.types import OpOutput, Segments

# below this many tokens the reference's loop is cheaper than its chunked form
_LOOP_TOKENS = 4


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None = None,
    *,
    erase: Tensor | Literal["beta"] | None = "beta",
    write: Tensor | Literal["beta"] = "beta",
    gate: Gate = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    scale: float | None = None,
    state: Tensor | None = None,
    segments: Segments | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> OpOutput:
    """Decay the state, erase what it holds under the key, write the value there, and read with the query.

    ``S <- diag(exp(g)) S``, ``S <- S + k (write v - S^T (erase k))^T``, ``o = scale S^T q``. One decay per head and
    ``beta`` for both strengths is the gated delta rule, :func:`chunk_gdn`; a decay per key channel and ``beta`` Kimi
    Delta Attention, :func:`chunk_kda`; channels everywhere GDN-2; no decay DeltaNet; no erase gated linear attention.

    Args:
        q: ``[B, T, Hq, K]``; head ``h`` of the output reads query head ``h // (H / Hq)``.
        k: ``[B, T, Hk, K]``, likewise.
        v: ``[B, T, Hv, V]``, likewise; each count of heads divides H.
        decay: ``[B, T, H]`` per head or ``[B, T, H, K]`` per key channel: natural-log decay, <= 0, without a gate. None
            for no decay. A step with decay 0 and strengths 0 changes nothing.
        beta: ``[B, T, H]`` strength in [0, 1] of what says ``beta``; None if neither does.
        erase: ``beta``; ``[B, T, H, K]``, a strength per key channel in [0, 1]; or None: a write erases nothing.
        write: ``beta``, or ``[B, T, H, V]``, a strength per value channel in [0, 1].
        gate: ``none``, or how ``decay`` is made of raw values: ``softplus``: ``-exp(a_log) * softplus(raw + dt_bias)``;
            ``bounded``: ``lower_bound * sigmoid(exp(a_log) * (raw + dt_bias))``. With a gate ``beta``, ``erase`` and
            ``write`` are logits, and q and k are L2-normalised here; without, they come normalised.
        a_log: ``[H]``, of the gate.
        dt_bias: ``[H]`` or ``[H * K]``, as ``decay``, of the gate.
        lower_bound: Of the bounded gate, per token, < 0.
        scale: Factor on q; ``K ** -0.5`` by default.
        state: ``[N, H, K, V]`` float32, or None for zeros; ``N`` is B, or the number of segments.
        segments: Documents packed on the token axis (then ``B == 1``); none sees another.
        impl: Implementation; :func:`gendistill.ops.resolve` chooses one.
    Returns:
        ``out`` ``[B, T, H, V]`` in ``v.dtype``; ``state`` ``[N, H, K, V]`` float32 after the last token.
    Raises:
        ValueError: Shapes disagree, a tensor is missing or superfluous, or the gate or ``impl`` is unknown.
    Source: arXiv 2412.06464 (GDN), arXiv 2605.22791 (separate erase and write), arXiv 2510.26692 (KDA).
    """
    _check(q, k, v, decay, beta, erase, write, gate, a_log, dt_bias, state, segments)
    if is_triton(impl):
        return _contract().chunk_delta_rule(
            q,
            k,
            v,
            _zeros(beta, erase, write) if decay is None else decay,
            beta,
            erase=erase if isinstance(erase, Tensor) else None,
            write=write if isinstance(write, Tensor) else None,
            erases=erase is not None,
            gate=gate,
            a_log=a_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            scale=scale,
            state=state,
            segments=segments,
        )
    gates = {"gate": gate, "a_log": a_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    x = apply_gates(q, k, decay, beta, erase=erase, write=write, **gates)
    strengths = {"log_decay": x.log_decay, "erase": x.erase, "write": x.write}
    if segments is None and q.shape[1] <= _LOOP_TOKENS:
        return recurrent_reference(x.q, x.k, v, **strengths, state=state, scale=scale)
    return chunk_reference(
        x.q,
        x.k,
        v,
        **strengths,
        state=state,
        scale=scale,
        segments=segments,
        log_decay_floor=lower_bound if gate == "bounded" else None,
    )


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None = None,
    *,
    erase: Tensor | Literal["beta"] | None = "beta",
    write: Tensor | Literal["beta"] = "beta",
    gate: Gate = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    scale: float | None = None,
    state: Tensor | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> OpOutput:
    """Apply the rule token by token: its definition on the reference, one launch for a few tokens on the kernels.

    Arguments and results as :func:`chunk_delta_rule`; ``state`` is not changed. The kernel takes a decay per key
    channel and ``beta`` for both strengths, and has no gradient. A layer's whole step, with its states updated in
    place, is :func:`gendistill.ops.decode_delta_rule`.

    Raises:
        ValueError: As :func:`chunk_delta_rule`; or ``impl`` is ``triton`` for another case of the rule.
    """
    _check(q, k, v, decay, beta, erase, write, gate, a_log, dt_bias, state, None)
    gates = {"gate": gate, "a_log": a_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    if not is_triton(impl):
        x = apply_gates(q, k, decay, beta, erase=erase, write=write, **gates)
        return recurrent_reference(
            x.q, x.k, v, log_decay=x.log_decay, erase=x.erase, write=x.write, state=state, scale=scale
        )
    is_tied = isinstance(erase, str) and isinstance(write, str)
    if decay is None or decay.ndim != 4 or beta is None or not is_tied:
        raise ValueError(
            'recurrent_delta_rule on "triton" takes a decay per key channel and beta for both strengths; use'
            ' chunk_delta_rule, or impl "reference"'
        )
    shape = (q.shape[0], decay.shape[2], k.shape[3], v.shape[3])
    # the kernel changes it in place, and steps through what is contiguous
    if state is None:
        memory = q.new_zeros(shape, dtype=torch.float32)
    else:
        memory = state.clone(memory_format=torch.contiguous_format)
    out = _contract().decode_delta_rule(
        q.flatten(2),
        k.flatten(2),
        v.flatten(2),
        decay,
        beta,
        memory,
        **gates,
        scale=scale,
        conv_weight=None,
        conv_bias=None,
        conv_state=None,
        conv_activation="identity",
        norm_weight=None,
        norm_eps=0.0,
        output_gate=None,
        output_activation="none",
        lives=None,
    )
    return OpOutput(out, memory)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    gate: Gate = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    state: Tensor | None = None,
    segments: Segments | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> OpOutput:
    """Apply Kimi Delta Attention: :func:`chunk_delta_rule` with a decay per key channel, ``[B, T, H, K]``, and beta.

    Source: arXiv 2510.26692.
    """
    _check_axes("chunk_kda", decay, 4)
    return chunk_delta_rule(
        q,
        k,
        v,
        decay,
        beta,
        gate=gate,
        a_log=a_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        state=state,
        segments=segments,
        impl=impl,
    )


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    gate: Gate = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    state: Tensor | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> OpOutput:
    """Apply Kimi Delta Attention token by token: :func:`recurrent_delta_rule` with a decay per key channel."""
    _check_axes("recurrent_kda", decay, 4)
    return recurrent_delta_rule(
        q,
        k,
        v,
        decay,
        beta,
        gate=gate,
        a_log=a_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        state=state,
        impl=impl,
    )


def chunk_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    gate: Gate = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    state: Tensor | None = None,
    segments: Segments | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> OpOutput:
    """Apply Gated DeltaNet: :func:`chunk_delta_rule` with one decay per head, ``[B, T, H]``, and beta.

    Source: arXiv 2412.06464.
    """
    _check_axes("chunk_gdn", decay, 3)
    return chunk_delta_rule(
        q,
        k,
        v,
        decay,
        beta,
        gate=gate,
        a_log=a_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        state=state,
        segments=segments,
        impl=impl,
    )


def recurrent_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    gate: Gate = "none",
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    state: Tensor | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> OpOutput:
    """Apply Gated DeltaNet token by token: :func:`recurrent_delta_rule` with one decay per head."""
    _check_axes("recurrent_gdn", decay, 3)
    return recurrent_delta_rule(
        q,
        k,
        v,
        decay,
        beta,
        gate=gate,
        a_log=a_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        state=state,
        impl=impl,
    )


def _contract():
    if TYPE_CHECKING:
        import gendistill.ops.contracts.delta_rule as found

        return found
    return contract("delta_rule")


def _zeros(beta: Tensor | None, *strengths: Tensor | str | None) -> Tensor:
    """Make the decay per head that is none."""
    like = next(part for part in (beta, *strengths) if isinstance(part, Tensor))
    return like.new_zeros(like.shape[:3])


# ----- what is refused; the kernels would read past the ends of tensors that do not fit -----
# A short call on a GPU waits for all that happens here: shapes are read once, and words are made for errors only.


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    erase: Tensor | str | None,
    write: Tensor | str | None,
    gate: str,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    segments: Segments | None,
) -> None:
    """Refuse what does not belong together."""
    if gate not in GATES:
        raise ValueError(f'gate must be none, softplus or bounded, got "{gate}"; choose one of them')
    if decay is not None:
        given = decay.shape
        if len(given) not in (3, 4):
            raise ValueError(
                f"decay must be [B, T, H] per head or [B, T, H, K] per key channel, got {list(given)}; reshape it"
            )
        heads = biases = None
        if gate != "none":
            heads, biases = (given[2],), (given[2] if len(given) == 3 else given[2] * given[3],)
        if (a_log if a_log is None else a_log.shape) != heads:
            _refuse("a_log", a_log, heads, f'with gate "{gate}"')
        if (dt_bias if dt_bias is None else dt_bias.shape) != biases:
            _refuse("dt_bias", dt_bias, biases, f'with gate "{gate}"')
    elif gate != "none":
        raise ValueError(f'gate "{gate}" needs a decay, got None; pass its raw values')
    # what says how many rows, tokens and heads there are
    counted, like = _first_tensor(beta, erase, write, decay)
    batch, length, number = rows = tuple(like.shape[:3])
    keys, values = q.shape[-1], v.shape[-1]
    for name, part, channels in (("q", q, keys), ("k", k, keys), ("v", v, values)):
        shape = part.shape
        if len(shape) != 4 or shape[0] != batch or shape[1] != length or shape[3] != channels:
            _refuse_shape(name, part, batch, length, channels)
        if number % shape[2]:
            raise ValueError(f"{number} heads of {counted} do not fit {shape[2]} heads of {name}")
    if decay is not None and decay.shape != (rows if len(given) == 3 else (*rows, keys)):
        if decay.shape[2] != number:
            raise ValueError(f"{number} heads of {counted} do not fit {decay.shape[2]} heads of decay")
        _refuse_shape("decay", decay, batch, length, keys)
    _check_strengths(beta, erase, write, rows, keys, values)
    sequences = batch
    if segments is not None:
        sequences = len(segments.lengths)
        if batch != 1 or segments.num_tokens != length:
            raise ValueError(
                f"packed input must be one row of {segments.num_tokens} tokens, got {batch} rows of {length}"
            )
    if state is not None and state.shape != (sequences, number, keys, values):
        raise ValueError(
            f"state must have shape {[sequences, number, keys, values]}, got {list(state.shape)}"
        )


def _first_tensor(
    beta: Tensor | None, erase: Tensor | str | None, write: Tensor | str | None, decay: Tensor | None
) -> tuple[str, Tensor]:
    if beta is not None:
        return "beta", beta
    if isinstance(erase, Tensor):
        return "erase", erase
    if isinstance(write, Tensor):
        return "write", write
    if decay is None:
        raise ValueError("beta must be given, or erase and write per channel, got none of them; pass beta")
    return "decay", decay


def _check_strengths(
    beta: Tensor | None,
    erase: Tensor | str | None,
    write: Tensor | str | None,
    rows: tuple[int, ...],
    keys: int,
    values: int,
) -> None:
    is_read = False
    if isinstance(erase, Tensor):
        if erase.shape != (*rows, keys):
            _refuse("erase", erase, (*rows, keys), "per key channel")
    elif erase == "beta":
        is_read = True
    elif erase is not None:
        raise ValueError(f'erase must be a tensor, "beta" or None, got {erase!r}; pass one of them')
    if isinstance(write, Tensor):
        if write.shape != (*rows, values):
            _refuse("write", write, (*rows, values), "per value channel")
    elif write == "beta":
        is_read = True
    else:
        raise ValueError(f'write must be a tensor, "beta", got {write!r}; pass one of them')
    if is_read and (beta is None or beta.shape != rows):
        _refuse("beta", beta, rows, 'where erase or write is "beta"')
    if not is_read and beta is not None:
        _refuse("beta", beta, None, 'where neither erase nor write is "beta"')


def _refuse(name: str, part: Tensor | None, shape: tuple[int, ...] | None, reason: str) -> None:
    got, wanted = (
        None if each is None else list(each) for each in (part if part is None else part.shape, shape)
    )
    fix = "leave it out" if shape is None else "pass that"
    raise ValueError(f"{name} must be {wanted} {reason}, got {got}; {fix}")


def _refuse_shape(name: str, part: Tensor, batch: int, length: int, channels: int) -> None:
    raise ValueError(f"{name} must have shape {[batch, length, 'heads', channels]}, got {list(part.shape)}")


def _check_axes(op: str, decay: Tensor, axes: int) -> None:
    if decay.ndim != axes:
        shape, other = ("[B, T, H, K]", "chunk_gdn") if axes == 4 else ("[B, T, H]", "chunk_kda")
        raise ValueError(
            f"{op} takes a decay of {shape}, got {list(decay.shape)}; or use {other} or chunk_delta_rule"
        )

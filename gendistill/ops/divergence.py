"""Divergences between two next-token distributions, from hidden states, without ever forming ``[B, T, V]``.

Tokens are taken in chunks. Each chunk's logits are made, compared and turned into gradients at once, in the forward
pass, so the backward pass only scales two stored tensors. Storing costs one tensor like the hidden states and, when
the head trains, one float32 tensor like the head; recomputing instead would save those and cost both logit matmuls
once more, which are most of the work here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gendistill.anatomy.cost import LOSS_CHUNK_BYTES
from gendistill.ops.select import Impl, is_triton


class Divergence(StrEnum):
    """What is compared: teacher P against student Q, or data against student."""

    FORWARD_KL = "kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"
    CE = "ce"


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a mix.

    Attributes:
        kind: ``kl`` is KL(P || Q), ``reverse_kl`` is KL(Q || P), ``jsd`` is
            ``beta KL(P || M) + (1 - beta) KL(Q || M)`` with ``M = beta P + (1 - beta) Q``, ``ce`` is ``-log Q[label]``.
        weight: Factor in the total.
        temperature: Divides both models' logits; the value is multiplied by its square, so that gradients keep
            their size. Cross-entropy has none.
        beta: Weight of the teacher in the mixture of ``jsd``.
    """

    kind: Divergence
    weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5


class DivergenceOutput(NamedTuple):
    """Sums over the counted positions.

    Attributes:
        total: Float32 scalar, weighted sum of the terms in nats; differentiable.
        count: Int64 scalar, counted positions.
        parts: ``[len(terms)]`` float32, each term's unweighted sum in nats; detached.
    """

    total: Tensor
    count: Tensor
    parts: Tensor


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    terms: Sequence[Term],
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> DivergenceOutput:
    """Compare student and teacher over the whole vocabulary at every counted position, in one pass.

    Logits are computed in the dtype of the student's tensors (under autocast: in its dtype) and in the teacher's own
    dtype; softmax, sums and gradients of logits are float32 (float64 for float64 inputs).

    Args:
        student_hidden: ``[B, T, D]`` last hidden states.
        student_weight: ``[V, D]`` output embedding; gets a gradient if it requires one.
        labels: ``[B, T]`` already shifted: what each position predicts, or ``ignore_index``.
        terms: What to sum; at least one.
        teacher_hidden: ``[B, T, E]``, not differentiated. Needed by every term but ``ce``.
        teacher_weight: ``[V, E]``, not differentiated.
        num_labels: Number of labels that count, if known on the host: saves a device synchronisation.
        ignore_index: Label of positions that do not count.
        chunk_size: Tokens per chunk; by default from the vocabulary.
        impl: Implementation: ``reference`` on every device; there are no kernels yet.
    Raises:
        ValueError: No term, a term without its teacher, vocabularies of different sizes, or ``impl`` is ``triton``.
    Source: JSD as in arXiv 2306.13649, eq. 1.
    """
    if is_triton(impl):
        raise ValueError(
            'impl "triton" is not available for linear_divergence: it has no kernels yet; use "reference"'
        )
    if not terms:
        raise ValueError("linear_divergence needs at least one term")
    uses_teacher = any(term.kind is not Divergence.CE for term in terms)
    if uses_teacher and (teacher_hidden is None or teacher_weight is None):
        raise ValueError("kl, reverse_kl and jsd need teacher_hidden and teacher_weight")
    if teacher_weight is not None and teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"vocabularies differ: student {student_weight.shape[0]}, teacher {teacher_weight.shape[0]}"
        )

    index = counted_positions(labels, num_labels, ignore_index=ignore_index)
    hidden = student_hidden.flatten(0, -2).index_select(0, index)
    targets = labels.flatten().index_select(0, index)
    teacher = None
    if uses_teacher and teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden.detach().flatten(0, -2).index_select(0, index), teacher_weight.detach())
    if chunk_size is None:
        chunk_size = chunk_tokens(student_weight)
    total, parts = _LinearDivergence.apply(
        hidden, student_weight, targets, teacher, tuple(terms), chunk_size, torch.is_grad_enabled()
    )
    count = torch.full((), index.numel(), dtype=torch.int64, device=labels.device)
    return DivergenceOutput(total, count, parts)


def counted_positions(labels: Tensor, num_labels: int | None = None, *, ignore_index: int = -100) -> Tensor:
    """List the positions of the flattened rows whose label counts; given their number, without a synchronisation."""
    counted = labels.flatten() != ignore_index
    if num_labels is None or labels.device.type != "cuda":
        return counted.nonzero().squeeze(1)
    return torch.nonzero_static(counted, size=num_labels).squeeze(1)


def chunk_tokens(weight: Tensor) -> int:
    """Choose how many tokens' logits are in memory at a time."""
    budget = LOSS_CHUNK_BYTES["cpu" if weight.device.type == "cpu" else "cuda"]
    return max(16, budget // (4 * weight.shape[0]))


def chunks(num_tokens: int, chunk_size: int) -> Iterator[slice]:
    """Cut ``num_tokens`` into equal slices of about ``chunk_size``: a short last one wastes a pass over the head."""
    if num_tokens == 0:
        return
    size = math.ceil(num_tokens / math.ceil(num_tokens / chunk_size))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        terms: tuple[Term, ...],
        chunk_size: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device
        compute = (
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        )
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        want_hidden = grad_enabled and ctx.needs_input_grad[0]
        want_weight = grad_enabled and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if want_weight else None
        sums = torch.zeros(len(terms), dtype=precise, device=device)

        with torch.autocast(device.type, enabled=False):
            head = weight.to(compute)
            for rows in chunks(hidden.shape[0], chunk_size):
                hidden_rows = hidden[rows].to(compute)
                logits = (hidden_rows @ head.T).to(precise)
                teacher_logits = None if teacher is None else (teacher[0][rows] @ teacher[1].T).to(precise)
                part, grad = compare(logits, teacher_logits, targets[rows], terms, want_hidden or want_weight)
                sums += part
                if grad is None:
                    continue
                grad = grad.to(compute)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad @ head).to(grad_hidden.dtype)
                if grad_weight is not None:
                    if compute == precise:
                        grad_weight.addmm_(grad.T, hidden_rows)
                    else:
                        grad_weight += grad.T @ hidden_rows

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(sums)
        return sum_terms(sums, terms), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_parts: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_total).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def sum_terms(parts: Tensor, terms: Sequence[Term]) -> Tensor:
    """Weigh and add per-term sums."""
    return sum((term.weight * part for term, part in zip(terms, parts, strict=True)), parts.new_zeros(()))


def compare(
    logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, terms: Sequence[Term], want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum every term over one chunk and differentiate the weighted sum.

    Args:
        logits, teacher_logits: ``[N, V]`` float32.
        targets: ``[N]`` int64.
    Returns:
        ``[len(terms)]`` unweighted sums, and the gradient ``[N, V]`` for ``logits``.
    """
    sums: list[Tensor] = [logits.new_zeros(()) for _ in terms]
    grad: Tensor | None = None
    for temperature in dict.fromkeys(_temperature(term) for term in terms):
        log_q = _log_softmax(logits, temperature)
        log_p = None if teacher_logits is None else _log_softmax(teacher_logits, temperature)
        for place, term in enumerate(terms):
            if _temperature(term) != temperature:
                continue
            sums[place], term_grad = _TERMS[term.kind](log_q, log_p, targets, term, want_grad)
            if term_grad is not None:
                if term.weight * temperature != 1:
                    term_grad.mul_(term.weight * temperature)
                grad = term_grad if grad is None else grad.add_(term_grad)
    return torch.stack(sums), grad


def _temperature(term: Term) -> float:
    return 1.0 if term.kind is Divergence.CE else term.temperature


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


# Each term returns its sum in nats and, if asked, the gradient of ``sum / T**2`` for ``logits / T``, T the temperature.
# P and p are the teacher's probabilities, Q and q the student's. Buffers of size [N, V] are reused where possible.
_Result = tuple[Tensor, Tensor | None]


def _forward_kl(log_q: Tensor, log_p: Tensor | None, targets: Tensor, term: Term, want_grad: bool) -> _Result:
    assert log_p is not None
    p = log_p.exp()
    value = (log_p - log_q).mul_(p).sum(-1).sum() * term.temperature**2
    return value, log_q.exp().sub_(p) if want_grad else None


def _reverse_kl(log_q: Tensor, log_p: Tensor | None, targets: Tensor, term: Term, want_grad: bool) -> _Result:
    assert log_p is not None
    q = log_q.exp()
    ratio = log_q - log_p
    rows = (q * ratio).sum(-1, keepdim=True)
    return rows.sum() * term.temperature**2, ratio.sub_(rows).mul_(q) if want_grad else None


def _jsd(log_q: Tensor, log_p: Tensor | None, targets: Tensor, term: Term, want_grad: bool) -> _Result:
    assert log_p is not None
    beta = term.beta
    # log(q / m) = -log(1 + beta (p / q - 1)) keeps full precision where q and m nearly agree; beyond exp(80) the
    # ratio's true value no longer matters, because q is zero there
    log_ratio = (log_p - log_q).clamp_(max=80.0)
    student = log_ratio.expm1().mul_(beta).log1p_().neg_()
    teacher_rows = log_ratio.add_(student).mul_(log_p.exp()).sum(-1)
    q = log_q.exp()
    student_rows = (q * student).sum(-1, keepdim=True)
    value = (beta * teacher_rows.sum() + (1 - beta) * student_rows.sum()) * term.temperature**2
    return value, student.sub_(student_rows).mul_(q).mul_(1 - beta) if want_grad else None


def _ce(log_q: Tensor, log_p: Tensor | None, targets: Tensor, term: Term, want_grad: bool) -> _Result:
    column = targets.unsqueeze(1)
    value = -log_q.gather(1, column).sum()
    if not want_grad:
        return value, None
    return value, log_q.exp().scatter_add_(1, column, -torch.ones_like(column, dtype=log_q.dtype))


_TERMS = {
    Divergence.FORWARD_KL: _forward_kl,
    Divergence.REVERSE_KL: _reverse_kl,
    Divergence.JSD: _jsd,
    Divergence.CE: _ce,
}

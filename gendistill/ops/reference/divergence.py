"""Divergences of next-token distributions from their logits: the terms, what they sum, and the gradient of the sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

# takes the place of minus infinity, of which no difference may be taken; its probability is zero at any temperature
FLOOR = -1e30


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


def compare(
    logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, terms: Sequence[Term], want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum every term over the vocabulary and differentiate the weighted sum.

    Args:
        logits, teacher_logits: ``[N, V]`` float32 or float64; what is minus infinity becomes a number.
        targets: ``[N]`` int64.
    Returns:
        ``[len(terms), N]`` unweighted terms of every row, and the gradient ``[N, V]`` for ``logits``.
    """
    logits.clamp_(min=FLOOR)
    if teacher_logits is not None:
        teacher_logits.clamp_(min=FLOOR)
    values = logits.new_zeros(len(terms), len(logits))
    grad: Tensor | None = None
    for temperature in dict.fromkeys(temperature_of(term) for term in terms):
        log_q = _log_softmax(logits, temperature)
        log_p = None if teacher_logits is None else _log_softmax(teacher_logits, temperature)
        for place, term in enumerate(terms):
            if temperature_of(term) != temperature:
                continue
            values[place], term_grad = _TERMS[term.kind](log_q, log_p, targets, term, want_grad)
            if term_grad is not None:
                if term.weight * temperature != 1:
                    term_grad.mul_(term.weight * temperature)
                grad = term_grad if grad is None else grad.add_(term_grad)
    return values, grad


def temperature_of(term: Term) -> float:
    """Return what divides the logits: 1 for cross-entropy."""
    return 1.0 if term.kind is Divergence.CE else term.temperature


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


# Each term returns its values in nats and, if asked, the gradient of ``sum / T**2`` for ``logits / T``, T the
# temperature. P and p are the teacher's probabilities, Q and q the student's. Buffers of size [N, V] are reused where
# possible.
_Result = tuple[Tensor, Tensor | None]


def _forward_kl(log_q: Tensor, log_p: Tensor | None, targets: Tensor, term: Term, want_grad: bool) -> _Result:
    assert log_p is not None
    p = log_p.exp()
    values = (log_p - log_q).mul_(p).sum(-1) * term.temperature**2
    return values, log_q.exp().sub_(p) if want_grad else None


def _reverse_kl(log_q: Tensor, log_p: Tensor | None, targets: Tensor, term: Term, want_grad: bool) -> _Result:
    assert log_p is not None
    q = log_q.exp()
    ratio = log_q - log_p
    rows = (q * ratio).sum(-1, keepdim=True)
    return rows.squeeze(1) * term.temperature**2, ratio.sub_(rows).mul_(q) if want_grad else None


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
    values = (beta * teacher_rows + (1 - beta) * student_rows.squeeze(1)) * term.temperature**2
    return values, student.sub_(student_rows).mul_(q).mul_(1 - beta) if want_grad else None


def _ce(log_q: Tensor, log_p: Tensor | None, targets: Tensor, term: Term, want_grad: bool) -> _Result:
    column = targets.unsqueeze(1)
    values = -log_q.gather(1, column).squeeze(1)
    if not want_grad:
        return values, None
    return values, log_q.exp().scatter_add_(1, column, -torch.ones_like(column, dtype=log_q.dtype))


_TERMS = {
    Divergence.FORWARD_KL: _forward_kl,
    Divergence.REVERSE_KL: _reverse_kl,
    Divergence.JSD: _jsd,
    Divergence.CE: _ce,
}


class TopK(NamedTuple):
    """What is known of a teacher that has kept only its likeliest tokens.

    Attributes:
        ids: ``[..., k]`` int64, distinct columns of the vocabulary.
        log_probs: ``[..., k]`` float32, their log-probabilities in nats; logits do as well, if ``tail`` is on the same
            scale.
        tail: ``[...]`` float32, log of the probability of all other tokens together; minus infinity for none.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor


LogSum = Callable[[Tensor], Tensor]
Spread = Callable[[Tensor, Tensor, Tensor], Tensor]


def log_sum(logits: Tensor) -> Tensor:
    """Compute the log of every row's sum of exponentials."""
    return logits.logsumexp(-1)


def spread(logits: Tensor, total: Tensor, factors: Tensor) -> Tensor:
    """Compute ``factors * exp(logits - total)``, with one factor and one total per row."""
    return (logits - total.unsqueeze(1)).exp_().mul_(factors.unsqueeze(1))


def compare_top_k(
    logits: Tensor,
    teacher: TopK,
    targets: Tensor,
    terms: Sequence[Term],
    want_grad: bool,
    *,
    log_sum: LogSum = log_sum,
    spread: Spread = spread,
) -> tuple[Tensor, Tensor | None]:
    """Compare over k tokens and a bucket for all others, and differentiate the weighted sum.

    The student's logit of the bucket is the log of the sum of its other exponentials, so that its distribution over the
    k + 1 is that of the vocabulary, with the others summed up. What the sum of terms gives for the bucket's logit is
    shared among its tokens by their probabilities in it. Cross-entropy is that of the whole vocabulary.

    Args:
        logits: ``[N, V]`` float32 or float64; changed.
        teacher: With N rows.
        targets: ``[N]`` int64.
        terms: At temperature 1.
        log_sum, spread: As the functions of these names.
    Returns:
        As :func:`compare`.
    """
    column = targets.unsqueeze(1)
    label = logits.gather(1, column)
    top = logits.gather(1, teacher.ids)
    logits.scatter_(1, teacher.ids, -math.inf)
    tail = log_sum(logits).clamp(min=FLOOR)
    buckets = torch.cat([top, tail.unsqueeze(1)], 1)
    known = torch.cat([teacher.log_probs, teacher.tail.unsqueeze(1)], 1).to(buckets.dtype)
    others = [term for term in terms if term.kind is not Divergence.CE]
    found, grad = compare(buckets, known, targets, others, want_grad)
    nll = buckets.logsumexp(-1) - label.squeeze(1)
    each = iter(found)
    values = torch.stack([nll if term.kind is Divergence.CE else next(each) for term in terms])
    if not want_grad:
        return values, None
    pull = sum(term.weight for term in terms if term.kind is Divergence.CE)
    if pull:
        q = buckets.softmax(-1).mul_(pull)
        grad = q if grad is None else grad.add_(q)
    assert grad is not None
    of_top, of_tail = grad[:, :-1], grad[:, -1]
    whole = spread(logits, tail, of_tail)
    if pull:
        # together before they are rounded: they cancel where the student knows the label
        is_label = teacher.ids == column
        of_top = of_top - pull * is_label
        alone = (label - tail.unsqueeze(1)).exp() * of_tail.unsqueeze(1) - pull
        of_label = torch.where(is_label.any(1, keepdim=True), (of_top * is_label).sum(1, keepdim=True), alone)
        whole.scatter_(1, column, of_label.to(whole.dtype))
    return values, whole.scatter_(1, teacher.ids, of_top.to(whole.dtype))

"""Inputs of the linear divergence and its float64 answers, written as textbook sums over the vocabulary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gendistill.ops.divergence import Divergence, Term, TopK

IGNORE = -100
KL, REVERSE, JSD, CE = Divergence.FORWARD_KL, Divergence.REVERSE_KL, Divergence.JSD, Divergence.CE
MIXES = {
    **{
        f"{kind.value} at {temperature}": [Term(kind, 0.7, temperature, 0.3)]
        for kind, temperature in itertools.product((KL, REVERSE, JSD), (1.0, 2.0, 4.0))
    },
    "ce": [Term(CE)],
    "kl and ce": [Term(KL, 0.9, 2.0), Term(CE, 0.1)],
    "all": [Term(KL, 0.5), Term(REVERSE, 2.0), Term(JSD, 1.5, 2.0, 0.3), Term(CE, 0.1), Term(KL, 1.0, 2.0)],
}
AT_ONE = {name: terms for name, terms in MIXES.items() if all(term.temperature == 1 for term in terms)}
AT_ONE["all"] = [Term(KL, 0.5), Term(REVERSE, 2.0), Term(JSD, 1.5, beta=0.3), Term(CE, 0.1)]


class Problem(NamedTuple):
    """Float32 or bfloat16 inputs; some labels are ignored, one whole row among them."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Return copies of the student's tensors to differentiate."""
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def double(self) -> Problem:
        """Return the same values in float64."""
        return Problem(*(part.double() for part in self[:4]), self.labels)


def draw(
    vocab: int = 211,
    tokens: tuple[int, int] = (2, 16),
    dim: int = 16,
    teacher_dim: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    size: float = 2.0,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Draw hidden states and heads whose logits are of this size; student and teacher differ altogether."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device=device)

    labels = torch.randint(0, vocab, tokens, generator=generator, device=device)
    labels[torch.rand(tokens, generator=generator, device=device) > 0.6] = IGNORE
    labels[0] = IGNORE
    parts = (
        normal(*tokens, dim),
        normal(vocab, dim) * (size * dim**-0.5),
        normal(*tokens, teacher_dim),
        normal(vocab, teacher_dim) * (size * teacher_dim**-0.5),
    )
    return Problem(*(part.to(dtype) for part in parts), labels)


def rows_of(student: Tensor, teacher: Tensor, labels: Tensor, term: Term) -> Tensor:
    """Write a divergence of every row as a sum over the vocabulary, of terms that are zero where nothing is likely."""
    if term.kind is CE:
        return F.cross_entropy(student, labels, reduction="none")
    log_q, log_p = ((logits / term.temperature).log_softmax(-1) for logits in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    # neither model can have a token: whatever stands there counts nothing
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_q, log_p = (part.masked_fill(nowhere, -1e4) for part in (log_q, log_p))
    log_m = torch.logaddexp(log_p + math.log(term.beta), log_q + math.log1p(-term.beta))

    def mean(weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
        # both may be minus infinity
        real = weights > 0
        difference = torch.where(real, first, 0.0) - torch.where(real, second, 0.0)
        return (weights * difference).sum(-1)

    value = {
        KL: lambda: mean(p, log_p, log_q),
        REVERSE: lambda: mean(q, log_q, log_p),
        JSD: lambda: term.beta * mean(p, log_p, log_m) + (1 - term.beta) * mean(q, log_q, log_m),
    }[term.kind]()
    return value * term.temperature**2


def exact(problem: Problem, terms: Sequence[Term], leaves: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Compute the total of a problem in its dtype, whose leaves may be differentiated."""
    hidden, weight = leaves or problem[:2]
    counted = problem.labels != IGNORE
    student = hidden[counted] @ weight.T
    teacher = problem.teacher_hidden[counted] @ problem.teacher_weight.T
    labels = problem.labels[counted]
    return sum(
        (term.weight * rows_of(student, teacher, labels, term).sum() for term in terms), student.new_zeros(())
    )


def top_k_of(logits: Tensor, k: int) -> TopK:
    """Keep the k likeliest tokens of a teacher and the mass of the others."""
    log_p = logits.double().log_softmax(-1)
    log_probs, ids = log_p.topk(k, -1)
    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return TopK(ids, log_probs.float(), tail.float())


def exact_top_k(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: TopK, terms: Sequence[Term]
) -> Tensor:
    """Compute the total against a teacher of k tokens: over k + 1 outcomes, but for cross-entropy."""
    counted = labels != IGNORE
    student = (hidden[counted] @ weight.T).log_softmax(-1)
    ids = teacher.ids[counted]
    tail = student.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([student.gather(-1, ids), tail], -1)
    log_p = torch.cat([teacher.log_probs[counted], teacher.tail[counted].unsqueeze(-1)], -1).double()
    total = hidden.new_zeros(())
    for term in terms:
        value = (
            F.nll_loss(student, labels[counted], reduction="none")
            if term.kind is CE
            else rows_of(log_q, log_p, labels[counted], term)
        )
        total = total + term.weight * value.sum()
    return total


def error(found: Tensor, expected: Tensor) -> float:
    """Divide the norm of the difference by the norm of the right answer."""
    expected = expected.detach()
    return ((found.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()

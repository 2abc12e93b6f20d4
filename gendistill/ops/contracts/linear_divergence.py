"""The divergence's kernels as torch ops: schema, fake and launch of each. The op around them differentiates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.library import custom_op

from gendistill.ops.eager import quick
from gendistill.ops.reference.divergence import Divergence, Term, temperature_of
from gendistill_kernels.divergence.layout import KINDS, Mix, gradient_in


class Dense(Protocol):
    """The kernel, as ``gendistill_kernels.divergence.dense`` has it."""

    def compare(
        self,
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        mix: Mix,
        *,
        grad_dtype: torch.dtype | None,
    ) -> Tensor:
        """Return every row's terms, and leave the gradient in the memory of the student's logits."""
        ...


class Tail(Protocol):
    """The kernels, as ``gendistill_kernels.divergence.tail`` has them."""

    def log_sum(self, logits: Tensor) -> Tensor:
        """Return the log of every row's sum of exponentials."""
        ...

    def spread(self, logits: Tensor, total: Tensor, factors: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return every row's share of its factor."""
        ...


@functools.cache
def dense() -> Dense:
    """Import the kernel, which needs triton."""
    from gendistill_kernels.divergence import dense

    return dense


@functools.cache
def tail() -> Tail:
    """Import the kernels, which need triton."""
    from gendistill_kernels.divergence import tail

    return tail


def compare(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    terms: Sequence[Term],
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel; as :func:`gendistill.ops.reference.divergence.compare`, but that logits become the gradient.

    Args:
        logits: ``[N, V]`` float32, contiguous; overwritten where there is a gradient.
        teacher_logits: ``[N, V]`` float32, contiguous.
        targets: ``[N]`` int64.
        terms: What to sum.
        grad_dtype: Of the gradient; None for none.
    """
    values = _compare(
        logits,
        teacher_logits,
        targets,
        [KINDS[term.kind.value] for term in terms],
        [float(term.weight) for term in terms],
        [float(temperature_of(term)) for term in terms],
        [float(term.beta) if term.kind is Divergence.JSD else 0.0 for term in terms],
        grad_dtype,
    )
    return values, None if grad_dtype is None else gradient_in(logits, grad_dtype)


def log_sum(logits: Tensor) -> Tensor:
    """Run the kernel; as :func:`gendistill.ops.reference.divergence.log_sum`."""
    return _log_sum(logits)


def spread(logits: Tensor, total: Tensor, factors: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Run the kernel; as :func:`gendistill.ops.reference.divergence.spread`, in a dtype of one's choice."""
    return _spread(logits, total, factors.contiguous(), dtype)


def _launch_compare(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    kinds: list[int],
    weights: list[float],
    temperatures: list[float],
    betas: list[float],
    grad_dtype: torch.dtype | None,
) -> Tensor:
    """Return ``[len(kinds), N]``; the gradient takes the place of the student's logits."""
    mix = Mix(tuple(kinds), tuple(weights), tuple(temperatures), tuple(betas))
    return dense().compare(logits, teacher_logits, targets, mix, grad_dtype=grad_dtype)


divergence_compare = custom_op("gendistill::divergence_compare", _launch_compare, mutates_args=("logits",))


@divergence_compare.register_fake
def _(logits, teacher_logits, targets, kinds, weights, temperatures, betas, grad_dtype):
    return logits.new_empty(len(kinds), logits.shape[0])


def _launch_log_sum(logits: Tensor) -> Tensor:
    """Return the log of every row's sum of exponentials."""
    return tail().log_sum(logits)


divergence_log_sum = custom_op("gendistill::divergence_log_sum", _launch_log_sum, mutates_args=())


@divergence_log_sum.register_fake
def _(logits):
    return logits.new_empty(logits.shape[0])


def _launch_spread(logits: Tensor, total: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``factors * exp(logits - total)``."""
    return tail().spread(logits, total, factors, dtype=dtype)


divergence_spread = custom_op("gendistill::divergence_spread", _launch_spread, mutates_args=())


@divergence_spread.register_fake
def _(logits, total, factors, dtype):
    return torch.empty_like(logits, dtype=dtype)


_compare = quick(divergence_compare, _launch_compare)
_log_sum = quick(divergence_log_sum, _launch_log_sum)
_spread = quick(divergence_spread, _launch_spread)

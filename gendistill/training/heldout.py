"""Score a student beside its teacher on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gendistill.data.batch import IGNORE, Batch
from gendistill.errors import DataError
from gendistill.losses.student import StudentLike, last_hidden, output_head
from gendistill.ops.divergence import chunk_tokens, chunks, counted_positions, unrounded
from gendistill.teachers.base import Needs, Teacher, TeacherSignals, check_vocabulary
from gendistill.training.parallel import Parallel

_SUMS = ("teacher_ce", "student_ce", "kl", "top1_agreement")
# ranges of positions, each twice as long as the one before it: 1 token read, 2 to 3, 4 to 7, up to 2**32 - 1
_NUM_RANGES = 32


@dataclass(frozen=True, slots=True)
class HeldoutMeasure:
    """A student beside its teacher on held-out text.

    Attributes:
        scores: What :func:`score_heldout` returns.
        by_position: The same means over ranges of positions within the document, those that hold any, in order:
            ``first`` and ``last`` (tokens read before the prediction, from 1), ``num_tokens``, and the four means.
    """

    scores: dict[str, float]
    by_position: list[dict[str, float]]


def score_heldout(
    student: StudentLike,
    teacher: Teacher,
    batches: Sequence[Batch],
    *,
    compute_dtype: torch.dtype | None = None,
    parallel: Parallel | None = None,
    module: nn.Module | None = None,
) -> dict[str, float]:
    """Compare next-token distributions on average; arguments and errors are those of :func:`measure_heldout`.

    Returns:
        ``teacher_ce``, ``student_ce`` and ``kl`` (teacher against student) in nats per token, ``top1_agreement``
        between 0 and 1, ``ln_vocab`` (the cross-entropy of knowing nothing) and ``num_tokens``, counted positions.
    """
    return measure_heldout(
        student, teacher, batches, compute_dtype=compute_dtype, parallel=parallel, module=module
    ).scores


@torch.no_grad()
def measure_heldout(
    student: StudentLike,
    teacher: Teacher,
    batches: Sequence[Batch],
    *,
    compute_dtype: torch.dtype | None = None,
    parallel: Parallel | None = None,
    module: nn.Module | None = None,
) -> HeldoutMeasure:
    """Compare next-token distributions at every position whose label counts, a chunk of logits at a time.

    Args:
        student: Run without dropout.
        teacher: With the student's vocabulary, on its device.
        batches: On any device; the same list on every process.
        compute_dtype: Run the student under autocast to this dtype; None: in its own.
        parallel: Share the batches among its processes.
        module: The ``DistillStep`` of a student in training, which is then run by way of it.
    Returns: The means over all counted positions, and over those equally far into their documents.
    Raises:
        DataError: No label counts.
        RecipeError: The vocabularies differ.
    """
    check_vocabulary(teacher.facts, student.config)
    device = output_head(student).device
    rank, world = (parallel.rank, parallel.world) if parallel else (0, 1)
    sums = torch.zeros(_NUM_RANGES, len(_SUMS) + 1, device=device)
    measure = partial(_batch_sums, compute_dtype=compute_dtype)
    with evaluating(student):
        for first in range(0, len(batches), world):
            # split parameters are gathered by all: who has no batch left runs another one's, which does not count
            mine = first + rank < len(batches)
            batch = batches[first + rank if mine else first].to(device)
            signals = teacher.signals(batch, Needs(hidden=True))
            found = module(batch, signals, measure) if module else measure(student, signals, batch)
            if mine:
                sums += found
    if parallel and module is not None:
        parallel.settle(module)
    if parallel:
        sums = parallel.sum(sums)
    by_range = sums.tolist()
    totals = [math.fsum(column) for column in zip(*by_range, strict=True)]
    if totals[-1] == 0:
        raise DataError("no held-out position has a label", where="heldout", hint="raise heldout.rows")
    scores = {
        **_means(totals),
        "ln_vocab": math.log(student.config.vocab_size),
        "num_tokens": int(totals[-1]),
    }
    by_position = [
        {"first": 2**power, "last": 2 ** (power + 1) - 1, "num_tokens": int(row[-1]), **_means(row)}
        for power, row in enumerate(by_range)
        if row[-1]
    ]
    return HeldoutMeasure(scores, by_position)


def _means(totals: Sequence[float]) -> dict[str, float]:
    *sums, count = totals
    return {name: total / count for name, total in zip(_SUMS, sums, strict=True)}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off, and every module back as it was."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was


def _batch_sums(
    student: StudentLike, signals: TeacherSignals, batch: Batch, *, compute_dtype: torch.dtype | None
) -> Tensor:
    index = counted_positions(batch.labels, batch.num_labels, ignore_index=IGNORE)
    targets = batch.labels.flatten()[index]
    # the exponent is exact, which a logarithm need not be
    power = torch.frexp((batch.position_ids.flatten()[index] + 1).float()).exponent - 1
    ranges = torch.arange(_NUM_RANGES, device=power.device)
    weight = output_head(student)
    dtype = compute_dtype or weight.dtype
    with torch.autocast(batch.labels.device.type, dtype=dtype, enabled=dtype != weight.dtype):
        hidden = last_hidden(student, batch)
    hidden, head = hidden.flatten(0, 1)[index].to(dtype), weight.to(dtype)
    assert signals.hidden is not None
    assert signals.head is not None
    teacher_hidden, teacher_head = signals.hidden.flatten(0, 1)[index], signals.head
    sums = torch.zeros(_NUM_RANGES, len(_SUMS) + 1, device=hidden.device)
    for rows in chunks(len(targets), chunk_tokens(head)):
        log_q, log_p = (
            unrounded(states[rows], embedding.T).log_softmax(-1)
            for states, embedding in ((hidden, head), (teacher_hidden, teacher_head))
        )
        column = targets[rows, None]
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        teacher_ce, student_ce = -log_p.gather(1, column)[:, 0], -log_q.gather(1, column)[:, 0]
        kl = (log_p - log_q).mul_(log_p.exp_()).sum(-1)
        tokens = torch.stack([teacher_ce, student_ce, kl, agree.to(kl.dtype), torch.ones_like(kl)], 1)
        # a sum over rows, not an atomic one per range: equal runs give equal numbers
        inside = (power[rows, None] == ranges)[..., None]
        sums += torch.where(inside, tokens[:, None], 0.0).sum(0)
    return sums

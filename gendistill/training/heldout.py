"""Score a student beside its teacher on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gendistill.data.batch import IGNORE, Batch, model_inputs
from gendistill.errors import DataError
from gendistill.losses.base import check_vocabulary
from gendistill.ops.divergence import chunk_tokens, chunks, counted_positions

_SUMS = ("teacher_ce", "student_ce", "kl", "top1_agreement")


@torch.no_grad()
def score_heldout(
    student: Any,
    teacher: Any,
    batches: Sequence[Batch],
    *,
    compute_dtype: torch.dtype | None = None,
    accelerator: Any = None,
) -> dict[str, float]:
    """Compare next-token distributions at every position whose label counts, a chunk of logits at a time.

    Args:
        student, teacher: Hugging Face causal language models with one vocabulary, on one device; both are run
            without dropout.
        batches: On any device; the same list on every process.
        compute_dtype: Run the student under autocast to this dtype; None: in its own.
        accelerator: Share the batches among its processes.
    Returns:
        ``teacher_ce``, ``student_ce`` and ``kl`` (teacher against student) in nats per token, ``top1_agreement``
        between 0 and 1, ``ln_vocab`` (the cross-entropy of knowing nothing) and ``num_tokens``, counted positions.
    Raises:
        DataError: No label counts.
        RecipeError: The vocabularies differ.
    """
    check_vocabulary(teacher.config, student.config)
    device = student.lm_head.weight.device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    sums = torch.zeros(len(_SUMS) + 1, device=device)
    with _evaluating(student), _evaluating(teacher):
        for batch in batches[rank::world]:
            sums += _batch_sums(student, teacher, batch.to(device), compute_dtype)
    if world > 1:
        sums = accelerator.reduce(sums, "sum")
    *totals, count = sums.tolist()
    if count == 0:
        raise DataError("no held-out position has a label", where="heldout", hint="raise heldout.rows")
    scores = {name: total / count for name, total in zip(_SUMS, totals, strict=True)}
    return {**scores, "ln_vocab": math.log(student.config.vocab_size), "num_tokens": int(count)}


@contextmanager
def _evaluating(model: Any):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _batch_sums(student: Any, teacher: Any, batch: Batch, compute_dtype: torch.dtype | None) -> Tensor:
    index = counted_positions(batch.labels, batch.num_labels, ignore_index=IGNORE)
    targets = batch.labels.flatten()[index]
    dtype = compute_dtype or student.lm_head.weight.dtype
    low_precision = dtype != student.lm_head.weight.dtype
    with torch.autocast(batch.labels.device.type, dtype=torch.bfloat16, enabled=low_precision):
        hidden = student.model(**model_inputs(batch)).last_hidden_state
    hidden = hidden.flatten(0, 1)[index].to(dtype)
    teacher_hidden = teacher.model(**model_inputs(batch)).last_hidden_state.flatten(0, 1)[index]
    head, teacher_head = student.lm_head.weight.to(dtype), teacher.lm_head.weight
    sums = torch.zeros(len(_SUMS) + 1, device=hidden.device)
    for rows in chunks(len(targets), chunk_tokens(head)):
        log_q = (hidden[rows] @ head.T).float().log_softmax(-1)
        log_p = (teacher_hidden[rows] @ teacher_head.T).float().log_softmax(-1)
        column = targets[rows, None]
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        teacher_ce, student_ce = -log_p.gather(1, column).sum(), -log_q.gather(1, column).sum()
        kl = (log_p - log_q).mul_(log_p.exp_()).sum(-1).sum()
        sums[:-1] += torch.stack([teacher_ce, student_ce, kl, agree.sum()])
    sums[-1] = len(targets)
    return sums

"""Divergences between two next-token distributions, from hidden states, without ever forming ``[B, T, V]``.

Tokens are taken in chunks. Each chunk's logits are made, compared and turned into gradients at once, in the forward
pass, so the backward pass only scales two stored tensors. Storing costs one tensor like the hidden states and, when
the head trains, one float32 tensor like the head; recomputing instead would save those and cost both logit matmuls
once more, which are most of the work here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gendistill.anatomy.cost import LOSS_CHUNK_BYTES
from gendistill.ops.reference.divergence import Divergence, Term, TopK, compare, compare_top_k
from gendistill.ops.select import Impl, contract, is_triton

# rows of a tile in products of matrices on GPUs
_GPU_TILE = 128


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
    teacher_top_k: TopK | None = None,
    num_labels: int | None = None,
    places: int | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    impl: Impl | str = Impl.REFERENCE,
) -> DivergenceOutput:
    """Compare student and teacher over the whole vocabulary at every counted position, in one pass.

    Logits are products in the dtype of the student's tensors (under autocast: in its dtype), the teacher's in its own;
    they are summed up in float32 and stay unrounded. Softmax, sums and gradients of logits are float32 (float64 for
    float64 inputs); gradients of logits are rounded to the dtype of the products, whose sums are float32 again.

    Args:
        student_hidden: ``[B, T, D]`` last hidden states.
        student_weight: ``[V, D]`` output embedding; gets a gradient if it requires one.
        labels: ``[B, T]`` already shifted: what each position predicts, or ``ignore_index``.
        terms: What to sum; at least one.
        teacher_hidden: ``[B, T, E]``, not differentiated. Needed by every term but ``ce``.
        teacher_weight: ``[V, E]``, not differentiated.
        teacher_top_k: Instead of the two: the teacher's likeliest tokens, ``[B, T, k]``, and what the others have
            together, which is compared as if it were one more token.
        num_labels: Number of labels that count, if known on the host: saves a device synchronisation.
        places: Instead of that number, one at least as large, so that shapes depend on no label and the device is never
            asked, as a captured graph needs it. The surplus adds nothing to values and gradients, and costs as much
            time as positions that count. If more labels count, what a device other than the CPU leaves out goes
            unnoticed: the caller answers for it.
        ignore_index: Label of positions that do not count.
        chunk_size: Tokens per chunk; by default from the vocabulary.
        impl: Implementation; :func:`gendistill.ops.resolve` chooses one.
    Raises:
        ValueError: No term, a term without its teacher, two teachers, vocabularies of different sizes, a
            temperature at which the mass of ``teacher_top_k``'s other tokens is not known, both ``num_labels`` and
            ``places``, or, on a CPU, fewer places than labels that count.
    Source: JSD as in arXiv 2306.13649, eq. 1.
    """
    if not terms:
        raise ValueError("linear_divergence needs at least one term")
    uses_teacher = any(term.kind is not Divergence.CE for term in terms)
    whole = teacher_hidden is not None and teacher_weight is not None
    if uses_teacher and not whole and teacher_top_k is None:
        raise ValueError("kl, reverse_kl and jsd need teacher_hidden and teacher_weight, or teacher_top_k")
    if whole and teacher_top_k is not None:
        raise ValueError("linear_divergence compares with one teacher: teacher_hidden or teacher_top_k")
    if teacher_top_k is not None:
        for term in terms:
            if term.kind is not Divergence.CE and term.temperature != 1:
                raise ValueError(
                    f"teacher_top_k holds the mass of the other tokens at temperature 1, and {term.kind} asks for "
                    f"{term.temperature:g}; set temperature 1 or give teacher_hidden and teacher_weight"
                )
    if teacher_weight is not None and teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"vocabularies differ: student {student_weight.shape[0]}, teacher {teacher_weight.shape[0]}"
        )

    if places is not None and num_labels is not None:
        raise ValueError(
            "linear_divergence takes num_labels or places: as many positions, or at least as many"
        )

    index = counted_positions(labels, num_labels, places=places, ignore_index=ignore_index)
    surplus = None if places is None else index < 0

    def counted(part: Tensor, trailing: int = 1) -> Tensor:
        rows = part.flatten(0, -1 - trailing)
        return rows.index_select(0, index) if surplus is None else _Rows.apply(rows, index, surplus)

    teacher: tuple[Tensor, ...] = ()
    if uses_teacher and teacher_top_k is not None:
        ids, log_probs, tail = (part.detach() for part in teacher_top_k)
        teacher = (counted(ids), counted(log_probs), counted(tail, 0))
    elif uses_teacher and teacher_hidden is not None and teacher_weight is not None:
        teacher = (counted(teacher_hidden.detach()), teacher_weight.detach())
    chosen = Impl.TRITON if is_triton(impl) else Impl.REFERENCE
    if chunk_size is None:
        chunk_size = chunk_tokens(student_weight, chosen)
    total, parts = _LinearDivergence.apply(
        counted(student_hidden),
        student_weight,
        counted(labels, 0),
        surplus,
        teacher,
        tuple(terms),
        chunk_size,
        chosen,
        torch.is_grad_enabled(),
    )
    if surplus is None:
        count = torch.full((), index.numel(), dtype=torch.int64, device=labels.device)
    else:
        count = surplus.logical_not().sum()
    return DivergenceOutput(total, count, parts)


def counted_positions(
    labels: Tensor, num_labels: int | None = None, *, places: int | None = None, ignore_index: int = -100
) -> Tensor:
    """List the positions of the flattened rows whose label counts; given their number, without a synchronisation.

    Args:
        labels: Of any shape.
        num_labels: Number of labels that count.
        places: Length of the list, instead; -1 is at the end of one that is longer.
        ignore_index: Label of positions that do not count.
    Raises:
        ValueError: On a CPU, more labels count than there are places. Other devices list the first.
    """
    counted = labels.flatten() != ignore_index
    if places is not None:
        if labels.device.type == "cpu" and (number := int(counted.sum())) > places:
            raise ValueError(
                f"{number} labels count, more than places={places}; it must be at least as large"
            )
        return torch.nonzero_static(counted, size=places, fill_value=-1).squeeze(1)
    if num_labels is None or labels.device.type != "cuda":
        return counted.nonzero().squeeze(1)
    return torch.nonzero_static(counted, size=num_labels).squeeze(1)


def chunk_tokens(weight: Tensor, impl: Impl = Impl.REFERENCE) -> int:
    """Choose how many tokens' logits are in memory at a time."""
    where = "cpu" if weight.device.type == "cpu" else "triton" if impl is Impl.TRITON else "cuda"
    return max(16, LOSS_CHUNK_BYTES[where] // (4 * weight.shape[0]))


def chunks(num_tokens: int, chunk_size: int, *, multiple: int = 1) -> Iterator[slice]:
    """Cut ``num_tokens`` into equal slices of at most ``chunk_size``: a short last one wastes a pass over the head.

    All but the last are a ``multiple`` where that fits, so that the tiles of a matrix product are full.
    """
    if num_tokens == 0:
        return
    if chunk_size >= multiple:
        chunk_size -= chunk_size % multiple
    size = math.ceil(num_tokens / math.ceil(num_tokens / chunk_size))
    size = min(chunk_size, math.ceil(size / multiple) * multiple)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def unrounded(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Multiply matrices and keep what the products sum up to, whatever their dtype.

    Args:
        a: ``[N, K]``.
        b: ``[K, M]``, in the dtype of a.
        out: ``[N, M]`` float32, or float64 for float64 inputs, to overwrite; None for a new one.
    """
    if out is None:
        precise = torch.float64 if a.dtype == torch.float64 else torch.float32
        out = a.new_empty(len(a), b.shape[1], dtype=precise)
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if _has_wide_products(a):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    # On a CPU products of 16 bits come rounded. A second one, less the first, returns what was lost: together they have
    # twice as many bits, at a third of the time of float32 products.
    rounded = a @ b
    lost = torch.addmm(rounded, a, b, beta=-1).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return out.copy_(rounded).add_(lost)


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a product of matrices to a sum in float32 (float64 for float64 inputs), or begin one."""
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif _has_wide_products(a) and first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif _has_wide_products(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = a.to(total.dtype) @ b.to(total.dtype)
        total.copy_(product) if first else total.add_(product)


def _has_wide_products(part: Tensor) -> bool:
    """Say whether products of 16 bits can be written as they are summed up, in float32."""
    return part.is_cuda and torch.version.hip is None


class _Rows(torch.autograd.Function):
    """Rows by their index; surplus ones are zero, whatever is there, and what they get as a gradient goes nowhere.

    Where all of a position is zero, so are all logits, and their gradients too, but for cross-entropy and a teacher of
    k tokens (all of them token 0), where they are finite: times a row of zeros, they add nothing to the head's.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, surplus: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        found = rows.index_select(0, index.clamp(min=0))
        return found.masked_fill_(surplus.view(-1, *(1,) * (rows.dim() - 1)), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        length, *sizes = ctx.shape
        # the remainder of -1 is a row past the end, which is cut off; atomic sums would queue up there
        whole = grad.new_zeros(length + 1, *sizes)
        return whole.index_copy_(0, index.remainder(length + 1), grad)[:length], None, None


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        surplus: Tensor | None,
        teacher: tuple[Tensor, ...],
        terms: tuple[Term, ...],
        chunk_size: int,
        impl: Impl,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device
        compute = (
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        )
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        want_hidden = grad_enabled and ctx.needs_input_grad[0]
        want_weight = grad_enabled and ctx.needs_input_grad[1]
        grad_dtype = compute if want_hidden or want_weight else None
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.empty_like(weight, dtype=precise) if want_weight else None
        if grad_weight is not None and not len(hidden):
            grad_weight.zero_()
        values: list[Tensor] = []
        buffer = other = hidden.new_empty(0, dtype=precise)

        with torch.autocast(device.type, enabled=False):
            head = weight.to(compute)
            for rows in chunks(len(hidden), chunk_size, multiple=_GPU_TILE if hidden.is_cuda else 1):
                number = rows.stop - rows.start
                if rows.start == 0:
                    # the first chunk is the largest
                    buffer = buffer.new_empty(number, len(weight))
                    other = torch.empty_like(buffer) if len(teacher) == 2 else other
                hidden_rows = hidden[rows].to(compute)
                logits = unrounded(hidden_rows, head.T, out=buffer[:number])
                known = None
                if len(teacher) == 2:
                    known = unrounded(teacher[0][rows], teacher[1].T, out=other[:number])
                elif teacher:
                    known = TopK(*(part[rows] for part in teacher))
                found, grad = _compare(logits, known, targets[rows], terms, grad_dtype, impl)
                values.append(found)
                if grad is None:
                    continue
                if grad_hidden is not None:
                    _product(grad, head, out=grad_hidden[rows])
                if grad_weight is not None:
                    accumulate(grad_weight, grad.T, hidden_rows, first=rows.start == 0)

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        rows = torch.cat(values, 1) if values else hidden.new_zeros(len(terms), 0, dtype=precise)
        sums = (rows if surplus is None else rows.masked_fill(surplus, 0)).sum(1)
        ctx.mark_non_differentiable(sums)
        return sum_terms(sums, terms), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_parts: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_total).to(grad_hidden.dtype)
        if grad_weight is not None:
            # rounded as it is written
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, grad_total, out=scaled)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _compare(
    logits: Tensor,
    teacher: Tensor | TopK | None,
    targets: Tensor,
    terms: tuple[Term, ...],
    grad_dtype: torch.dtype | None,
    impl: Impl,
) -> tuple[Tensor, Tensor | None]:
    """Compare one chunk; the logits' memory may become the gradient's."""
    want_grad = grad_dtype is not None
    if isinstance(teacher, TopK):
        if impl is Impl.TRITON:
            found = _contract()
            spread = partial(found.spread, dtype=grad_dtype or logits.dtype)
            return compare_top_k(
                logits, teacher, targets, terms, want_grad, log_sum=found.log_sum, spread=spread
            )
        values, grad = compare_top_k(logits, teacher, targets, terms, want_grad)
    elif impl is Impl.TRITON:
        return _contract().compare(logits, teacher, targets, terms, grad_dtype)
    else:
        values, grad = compare(logits, teacher, targets, terms, want_grad)
    return values, None if grad is None else grad.to(grad_dtype)


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Multiply matrices into a tensor of any dtype, with one rounding where the device can."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _has_wide_products(a) and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def sum_terms(parts: Tensor, terms: Sequence[Term]) -> Tensor:
    """Weigh and add per-term sums."""
    return sum((term.weight * part for term, part in zip(terms, parts, strict=True)), parts.new_zeros(()))


def _contract():
    if TYPE_CHECKING:
        import gendistill.ops.contracts.linear_divergence as found

        return found
    return contract("linear_divergence")

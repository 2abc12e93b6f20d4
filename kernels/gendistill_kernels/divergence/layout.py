"""What is compared, in words that torch alone understands: no triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# of a term: KL(P || Q), KL(Q || P), the Jensen-Shannon divergence, and -log Q[label]; P the teacher's, Q the student's
KL, REVERSE_KL, JSD, CE = range(4)
KINDS = {"kl": KL, "reverse_kl": REVERSE_KL, "jsd": JSD, "ce": CE}
# what takes the place of minus infinity: its probability is zero, and differences of two of them are zero, too
FLOOR = -1e30


class Mix(NamedTuple):
    """A weighted sum of divergences, one entry of every list for each.

    Attributes:
        kinds: Of the terms, as ``KINDS`` numbers them.
        weights: Factors in the sum.
        temperatures: Divide both models' logits; 1 for cross-entropy.
        betas: Weight of the teacher in the mixture of a Jensen-Shannon divergence.
    """

    kinds: tuple[int, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    betas: tuple[float, ...]

    @property
    def uses_teacher(self) -> bool:
        """Whether a term compares with the teacher, and not only with the label."""
        return any(kind != CE for kind in self.kinds)


def gradient_in(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient that has taken the place of logits: rows of a narrower dtype lie as far apart as theirs.

    Args:
        logits: ``[N, V]`` float32, contiguous.
        dtype: Of the gradient, no wider.
    """
    return logits.view(dtype)[:, : logits.shape[1]]

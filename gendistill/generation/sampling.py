from dataclasses import dataclass
from typing import NamedTuple
import torch


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0


class Chosen(NamedTuple):
    tokens: torch.Tensor
    log_probs: torch.Tensor
    finite: torch.Tensor


def choose(logits, *, sampling, seeds, positions):
    best, tok = logits.max(-1)
    return Chosen(tok, best - logits.logsumexp(-1), best.isfinite())

"""From logits to tokens: greedy, or by noise that only seed, position and token decide.

Everything here can stand in a CUDA graph: shapes follow from those of the logits, and nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gendistill.errors import RecipeError

# below it logits of ordinary models could overflow float32
_COLDEST = 1e-6


@dataclass(frozen=True, slots=True)
class Sampling:
    """Rules by which the next token is chosen, for all rows alike.

    Filters apply in the order in which they stand here, to logits over the temperature, as in transformers. Greedy
    choice is the same with and without them.

    Attributes:
        temperature: Logits are divided by it; 0 is greedy.
        top_k: Keep the k largest logits and those equal to the k-th; None keeps all.
        top_p: Keep the most probable tokens whose probabilities just reach this sum; None keeps all.
        min_p: Keep tokens at least this fraction as probable as the most probable one; None keeps all.
    Raises:
        RecipeError: A value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and (self.temperature == 0 or self.temperature >= _COLDEST)):
            raise _wrong(
                "temperature", f"0 or a number from {_COLDEST:g} up", self.temperature, "0 for greedy"
            )
        if self.top_k is not None and not (type(self.top_k) is int and self.top_k >= 1):
            raise _wrong("top_k", "a whole number from 1 up", self.top_k, "None to keep all tokens")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise _wrong("top_p", "above 0 and at most 1", self.top_p, "None to keep all tokens")
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise _wrong("min_p", "between 0 and 1", self.min_p, "None to keep all tokens")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is chosen, so that seeds decide nothing."""
        return self.temperature == 0


class Chosen(NamedTuple):
    """The next token of each row.

    Attributes:
        tokens: ``[N]`` int64.
        log_probs: ``[N]`` float32 natural-log probability of the token at temperature 1, before filters.
        finite: ``[N]`` bool, False where the largest logit is NaN or infinite: tokens there mean nothing.
    """

    tokens: Tensor
    log_probs: Tensor
    finite: Tensor


def choose(logits: Tensor, *, sampling: Sampling, seeds: Tensor, positions: Tensor) -> Chosen:
    """Choose the next token of every row.

    A row's choice depends on its own logits, seed and position alone: not on the other rows, and between devices only
    by the rounding of logarithms and, with ``top_p`` and ``min_p``, of sums.

    Args:
        logits: ``[N, V]`` of any floating dtype; arithmetic is in float32.
        sampling: The rules of all rows.
        seeds: ``[N]`` int64, one for each answer; greedy choice does not read them.
        positions: ``[N]`` int64 or int32, the place in its sequence of the token to be chosen.
    """
    if logits.dtype == torch.float64:
        logits = logits.float()
    # exact in half precision too, and the first of equals
    largest, tokens = logits.max(-1)
    if not sampling.greedy:
        tokens = _sample(logits, sampling, seeds, positions)
    # One kernel that reads logits in their dtype and writes float32 once. A sum of exponentials, step by step, would
    # write as much, and read and write it thrice.
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, tokens[:, None])[:, 0]
    return Chosen(tokens, log_probs, torch.isfinite(largest))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Divide logits by the temperature, and set those that the filters leave out to minus infinity.

    Args:
        logits: ``[N, V]``.
        sampling: Rules with a temperature above 0.
    Returns: ``[N, V]`` float32, another tensor than ``logits``.
    Source: the order of filters and the treatment of equals are those of ``transformers.generation.logits_process``.
    """
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        kept = scores.topk(min(sampling.top_k, scores.shape[-1])).values
        scores.masked_fill_(scores < kept[:, -1:], -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        # stable: which of equals go is the same on every device; summed in float64 for the same reason
        ascending, tokens = scores.sort(dim=-1, stable=True)
        mass = ascending.softmax(-1).cumsum(-1, dtype=torch.float64).float()
        rare = mass <= 1 - sampling.top_p
        rare[:, -1].fill_(False)
        scores.masked_fill_(torch.empty_like(rare).scatter_(-1, tokens, rare), -math.inf)
    if sampling.min_p is not None:
        probabilities = scores.softmax(-1)
        scores.masked_fill_(probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True), -math.inf)
    return scores


def uniform(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Draw numbers between 0 and 1 that seed, position and token decide, with the same bits on every device.

    Args:
        seeds, positions: ``[N]`` integers of any width.
        num_tokens: V.
    Returns: ``[N, V]`` float32, above 0 and below 1; odd multiples of 2**-31, rounded to 24 bits.
    Source: seed and position become 64 bits by the finaliser of SplitMix64 (Steele, Lea, Flood 2014, with the constants
        of Stafford's Mix13); with their halves, tokens are mixed by the 32-bit finaliser of least bias in
        github.com/skeeto/hash-prospector. Steps are 2**64 and 2**32 over the golden ratio.
    """
    key = _mix_64(_mix_64(seeds.long() + _GOLDEN_64) + positions.long() * _GOLDEN_64)
    low, high = key.to(torch.int32)[:, None], (key >> 32).to(torch.int32)[:, None]
    # 32-bit integers wrap around
    bits = torch.arange(num_tokens, dtype=torch.int32, device=seeds.device).mul_(_GOLDEN_32) ^ low
    _xor_shifted(bits, 16, width=32).mul_(_FIRST_32).bitwise_xor_(high)
    _xor_shifted(bits, 15, width=32).mul_(_SECOND_32)
    # odd 31-bit numbers: the middles of 2**30 cells, and never 0
    _xor_shifted(bits, 15, width=32).bitwise_and_(0x7FFFFFFF).bitwise_or_(1)
    return bits.float().mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def _sample(logits: Tensor, sampling: Sampling, seeds: Tensor, positions: Tensor) -> Tensor:
    scores = filtered(logits, sampling)
    # The largest of scores plus Gumbel noise is distributed as their softmax. The noise is minus the logarithm of an
    # exponential variable, whose small values win: they come from small uniform ones, which float32 tells well apart.
    exponential = uniform(seeds, positions, scores.shape[-1]).neg_().log1p_().neg_()
    return scores.sub_(exponential.log_()).argmax(-1)


def _mix_64(x: Tensor) -> Tensor:
    x = _xor_shifted(x, 30, width=64) * _FIRST_64
    x = _xor_shifted(x, 27, width=64) * _SECOND_64
    return _xor_shifted(x, 31, width=64)


def _xor_shifted(x: Tensor, shift: int, *, width: int) -> Tensor:
    """Combine signed integers, in place, with themselves shifted right; zeros come in from the left."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (width - shift)) - 1))


def _signed(value: int, width: int) -> int:
    """Read the bits of an unsigned number as a signed one."""
    return value - (value >> (width - 1) << width)


_GOLDEN_64, _GOLDEN_32 = _signed(0x9E3779B97F4A7C15, 64), _signed(0x9E3779B9, 32)
_FIRST_64, _SECOND_64 = _signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64)
_FIRST_32, _SECOND_32 = _signed(0x21F0AAAD, 32), _signed(0x735A2D97, 32)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, allowed: str, given: object, neutral: str) -> RecipeError:
    return RecipeError(
        f"{name} must be {allowed}, got {given!r}",
        where="sampling",
        hint=f"use a {name} in that range, or {neutral}",
    )

"""What comes back from the backward pass, in words that torch alone understands: no triton here."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Gradients(NamedTuple):
    """The gradients of the inputs, in their shapes and dtypes; None where there was no input."""

    o: Tensor
    weight: Tensor | None
    gate: Tensor | None

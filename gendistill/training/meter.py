"""Running sums that stay on the device, so that steps between two log lines need not wait for it; and a watch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gendistill.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Reading:
    """What the meter says at one step.

    Attributes:
        losses: Loss and parts, averaged over the steps since the last reset.
        tokens: Tokens since the start of the stage.
        grad_norm: Of the latest step, before clipping.
        bad_step: First step whose loss or gradient was not finite, or None.
    """

    losses: list[float]
    tokens: int
    grad_norm: float
    bad_step: int | None


class Meter:
    """Sums over steps, kept on the device.

    Args:
        num_losses: Loss and parts.
        device: Where the sums live.
        tokens: Tokens before the first step.
        window: ``sums`` of an earlier meter, to continue in the middle of a log interval.
    Raises:
        CheckpointError: The window is of another number of losses.
    """

    def __init__(
        self, num_losses: int, device: torch.device, *, tokens: int = 0, window: Sequence[float] = ()
    ) -> None:
        if window and len(window) != 1 + num_losses:
            raise CheckpointError(
                f"the checkpoint's window has {len(window)} sums, this stage's loss has {1 + num_losses}",
                hint="delete the stage's checkpoints to start the stage again",
            )
        # number of steps, then losses
        self._window = torch.tensor(list(window) or [0.0] * (1 + num_losses), device=device)
        self._tokens = torch.tensor(tokens, device=device)
        self._norm = torch.zeros((), device=device)
        self._bad_step = torch.tensor(-1, device=device)

    def add(self, step: int, losses: Tensor, tokens: Tensor, grad_norm: Tensor) -> Tensor:
        """Take in one step.

        Args:
            step: Its number, from 1.
            losses: ``[num_losses]`` float32.
            tokens: Int64 scalar.
            grad_norm: Float32 scalar.
        Returns:
            Float32 scalar, 1 from the first step on that was not finite, else 0.
        """
        failed = ~torch.isfinite(grad_norm + losses[0])
        self._bad_step = torch.where((self._bad_step < 0) & failed, step, self._bad_step)
        self._window[0] += 1
        self._window[1:] += losses
        self._tokens += tokens
        self._norm = grad_norm
        return (self._bad_step >= 0).float()

    def read(self) -> Reading:
        """Wait for the device and return the sums."""
        steps, *losses = self._window.tolist()
        bad_step = int(self._bad_step)
        return Reading(
            losses=[loss / max(steps, 1) for loss in losses],
            tokens=int(self._tokens),
            grad_norm=float(self._norm),
            bad_step=bad_step if bad_step >= 0 else None,
        )

    def reset(self) -> None:
        """Start a new average."""
        self._window.zero_()

    @property
    def window(self) -> list[float]:
        """The sums since the last reset, exact in JSON."""
        return self._window.tolist()


class Stopwatch:
    """The time spent in steps; what happens under ``paused`` does not count."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the last lap."""
        return time.perf_counter() - self._mark

    def lap(self) -> float:
        """Return the seconds since the last lap and start the next one."""
        elapsed = self.elapsed
        self._mark += elapsed
        return elapsed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - started

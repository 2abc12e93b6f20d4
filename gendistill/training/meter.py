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
        losses: Loss and parts, averaged over the finite steps since the last reset; None if there was none.
        tokens: Tokens since the start of the stage.
        grad_norm: Of the latest finite step, before clipping.
        in_a_row: Latest steps in a row that were not finite.
        skipped: Steps since the start of the stage that changed nothing, because they were not finite.
        stuck_at: Step with which too many in a row were not finite, or None. All later ones change nothing.
    """

    losses: list[float] | None
    tokens: int
    grad_norm: float
    in_a_row: int
    skipped: int
    stuck_at: int | None


class Meter:
    """Sums over steps, kept on the device.

    Args:
        num_losses: Loss and parts.
        device: Where the sums live.
        in_a_row: Steps in a row without a finite loss or gradient from which on none may change anything.
        tokens: Tokens before the first step.
        window: ``window`` of an earlier meter, to continue in the middle of a log interval.
        unfinished: ``unfinished`` of an earlier meter, to continue among steps that are not finite.
    Raises:
        CheckpointError: The window is of another number of losses.
    """

    def __init__(
        self,
        num_losses: int,
        device: torch.device,
        *,
        in_a_row: int = 1,
        tokens: int = 0,
        window: Sequence[float] = (),
        unfinished: Sequence[int] = (),
    ) -> None:
        if window and len(window) != 1 + num_losses:
            raise CheckpointError(
                f"the checkpoint's window has {len(window)} sums, this stage's loss has {1 + num_losses}",
                hint="delete the stage's checkpoints to start the stage again",
            )
        self._in_a_row = in_a_row
        # number of finite steps, then losses
        self._window = torch.tensor(list(window) or [0.0] * (1 + num_losses), device=device)
        self._norm = torch.zeros((), device=device)
        run, skipped = unfinished or (0, 0)
        self._tokens, self._run, self._skipped, self._stuck_at = (
            torch.tensor(value, device=device) for value in (tokens, run, skipped, -1)
        )

    def add(self, step: int, losses: Tensor, tokens: Tensor, grad_norm: Tensor) -> Tensor:
        """Take in one step.

        Args:
            step: Its number, from 1.
            losses: ``[num_losses]`` float32.
            tokens: Int64 scalar.
            grad_norm: Float32 scalar.
        Returns:
            Float32 scalar, 1 if this step must change nothing: it is not finite, or too many before it were not.
        """
        failed = ~torch.isfinite(grad_norm + losses[0])
        self._run = (self._run + 1) * failed
        stuck = (self._stuck_at < 0) & (self._run >= self._in_a_row)
        self._stuck_at = torch.where(stuck, step, self._stuck_at)
        void = failed | (self._stuck_at >= 0)
        self._skipped += void
        self._window[0] += ~void
        self._window[1:] += torch.where(void, 0.0, losses)
        self._tokens += tokens
        self._norm = torch.where(void, self._norm, grad_norm)
        return void.float()

    def read(self) -> Reading:
        """Wait for the device and return the sums."""
        steps, *losses, norm = torch.cat([self._window, self._norm[None]]).tolist()
        counts = torch.stack([self._tokens, self._run, self._skipped, self._stuck_at])
        tokens, in_a_row, skipped, stuck_at = counts.tolist()
        return Reading(
            losses=[loss / steps for loss in losses] if steps else None,
            tokens=tokens,
            grad_norm=norm,
            in_a_row=in_a_row,
            skipped=skipped,
            stuck_at=stuck_at if stuck_at >= 0 else None,
        )

    def reset(self) -> None:
        """Start a new average."""
        self._window.zero_()

    @property
    def window(self) -> list[float]:
        """The sums since the last reset, exact in JSON."""
        return self._window.tolist()

    @property
    def unfinished(self) -> list[int]:
        """How many steps in a row were not finite up to now, and how many were skipped in all."""
        return torch.stack([self._run, self._skipped]).tolist()


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

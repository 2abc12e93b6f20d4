"""Products of few rows, which cost the bytes of their weights: linear layers, and gated MLPs with the norm before."""

from __future__ import annotations

import torch

from gendistill_kernels.runtime.hardware import obstacle_on


def obstacle(device: torch.device) -> str | None:
    """Say what keeps these kernels from running on a device; None if nothing does."""
    return obstacle_on(device, majors=(9,))

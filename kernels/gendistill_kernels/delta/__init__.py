"""The gated delta rule: chunked kernels forwards and backwards, and a decode step.

README.md beside this file, in the repository, has the formulas and a glossary.
"""

from __future__ import annotations

import torch

from gendistill_kernels.runtime.hardware import obstacle_on


def obstacle(device: torch.device) -> str | None:
    """Say what keeps these kernels from running on a device; None if nothing does."""
    return obstacle_on(device, majors=(9,))

"""How the processes of one run share a stage: alone, or with the data split among them."""

from __future__ import annotations

from accelerate import Accelerator

from gendistill.training.parallel.base import Parallel
from gendistill.training.parallel.ddp import DataParallel, check_accelerator
from gendistill.training.parallel.single import Single

__all__ = ["DataParallel", "Parallel", "Single", "choose_parallel"]


def choose_parallel(accelerator: Accelerator) -> Parallel:
    """Choose how to train from how the process was launched.

    Args:
        accelerator: Without mixed precision and without gradient accumulation.
    Raises:
        TrainingError: Accelerate is set up in a way that would change losses or gradients.
    """
    check_accelerator(accelerator)
    return Single(accelerator.device) if accelerator.num_processes == 1 else DataParallel(accelerator)

"""The time of a step is estimated without taking one."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from gendistill.config.schema import StageConfig
from gendistill.training.lock import num_steps, time_step
from gendistill.training.parallel import Single
from gendistill.training.step import StepRunner


class Parallel(Single):
    """Two processes, of which the other is imagined; to share gradients takes a while."""

    world = 2
    seconds = 0.3

    def __init__(self):
        super().__init__(torch.device("cpu"))

    @contextmanager
    def accumulating(self, module, *, last):
        yield
        if last:
            time.sleep(self.seconds)


def estimate(parallel, micro_batches):
    student = torch.nn.Linear(10, 1)
    objective, teacher = SimpleNamespace(part_names=()), SimpleNamespace(model=None)
    runner = StepRunner(student, objective, teacher, parallel)

    def passes(batch, module=None):
        time.sleep(0.01)
        return torch.zeros(1)

    runner._passes = passes
    return time_step(
        runner.rehearse,
        micro_batches,
        torch.optim.AdamW([student.weight], fused=True),
        lambda groups: torch.optim.AdamW(groups, fused=True),
        slowest=parallel.largest,
        shares=parallel.world > 1,
    )


@pytest.mark.parametrize("number", [1, 4])
def test_sharing_gradients_is_in_the_time_of_a_step_once(number):
    found = estimate(Parallel(), [SimpleNamespace(places=None)] * number)
    assert Parallel.seconds + 0.01 * number < found < Parallel.seconds + 0.01 * number + 0.15


def test_one_process_shares_nothing():
    assert 0.04 < estimate(Single(torch.device("cpu")), [SimpleNamespace(places=None)] * 4) < 0.15


def test_a_longer_step_leaves_fewer_of_them():
    stage = StageConfig(
        data="d", minutes=1.0, seq_len=8, batch_size=1, micro_batch_size=1, lr=1e-3, train=["mixer"]
    )
    assert [num_steps(stage, seconds) for seconds in (0.5, 1.0)] == [120, 60]

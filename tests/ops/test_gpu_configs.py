"""Every launch configuration that the running GPU's architecture has, forced in turn, against float64.

``pytest -s`` prints the errors that were measured.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

from gendistill.bench.launches import TABLES, watch
from gendistill_kernels.runtime.hardware import architecture
from gendistill_kernels.runtime.lookup import forced

pytestmark = pytest.mark.gpu
# relative rms error; rounding the output alone costs 1.7e-3 in bfloat16; the gate has chunks that go level by level
TOLERANCE = {2: 6e-3, 4: 2e-3}
# sums over all tokens, in which most of the gradient cancels
SUMMED = {"d A_log": 5e-2, "d dt_bias": 2e-2}
ROWS = [row for table in TABLES for row in table.rows[architecture(torch.device("cuda", 0))]]


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.kernel}-{n}") for n, row in enumerate(ROWS)])
def test_every_entry_gives_the_right_results_and_gradients(cases, config_cases, row):
    for save in config_cases.saves(row):
        call, answer = config_cases.make(cases, row, save=save)
        with forced(row.kernel, row.config), watch(row.kernel) as launches:
            found = call()
        assert launches, "the kernel was not launched"
        errors = {name: cases.error(found[name], part) for name, part in answer().items()}
        print(
            f"\n{row.kernel}, saving {save}: "
            + "  ".join(f"{name} {off:.1e}" for name, off in errors.items())
        )
        assert set(found) == set(errors)
        assert not [name for name, off in errors.items() if not off < SUMMED.get(name, TOLERANCE[row.size])]

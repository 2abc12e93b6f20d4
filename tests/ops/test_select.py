"""Which implementation an op takes, and who says what keeps the kernels from running."""

from __future__ import annotations

import os

import pytest
import torch

from gendistill.ops import Impl, resolve
from gendistill.ops.select import obstacle

CPU = torch.device("cpu")
OPS = ("delta_rule", "conv", "norm", "block", "paged", "thin", "linear_divergence")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("op", OPS)
def test_the_reference_runs_everywhere(op):
    assert resolve("reference", op=op, device=CPU) is Impl.REFERENCE
    assert resolve("auto", op=op, device=CPU) is Impl.REFERENCE


@pytest.mark.skipif(interpreted, reason="the interpreter runs kernels on the CPU")
@pytest.mark.parametrize("op", OPS)
def test_a_family_says_what_keeps_its_kernels_from_running(op):
    pytest.importorskip("triton", reason="without triton that is the obstacle")
    with pytest.raises(
        ValueError, match=f'"triton" is not available for {op} on cpu: .* NVIDIA GPUs; use "auto"'
    ):
        resolve("triton", op=op, device=CPU)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_kernels_run_where_their_family_was_tested(monkeypatch, capability):
    pytest.importorskip("triton", reason="without triton that is the obstacle")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    obstacle.cache_clear()
    found = {op: obstacle(op, torch.device("cuda", 7)) for op in OPS}
    obstacle.cache_clear()
    expected = None if capability == (9, 0) else f"this GPU has {capability[0]}.{capability[1]}"
    for reason in found.values():
        assert reason is None if expected is None else expected in (reason or "")


def test_an_op_without_kernels_says_so():
    assert obstacle("attention", CPU) == "attention has no kernels yet"
    with pytest.raises(ValueError, match="attention on cpu: attention has no kernels yet"):
        resolve("triton", op="attention", device=CPU)

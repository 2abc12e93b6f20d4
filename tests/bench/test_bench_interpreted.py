"""The checks of ``gendistill bench ops`` on our kernels, interpreted on the CPU."""

from __future__ import annotations

import os

import pytest

from gendistill.cli.main import main

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is off: make interpret", allow_module_level=True)

from gendistill.bench import peers
from gendistill.ops import OpOutput

pytestmark = pytest.mark.interpret


def test_our_kernels_are_green(capsys):
    assert main(["bench", "ops", "--interpret-smoke", "--gate", "bounded"]) == 0
    assert "RED" not in capsys.readouterr().out


def test_a_broken_op_is_red(capsys, monkeypatch):
    real = peers.chunk_kda

    def broken(*tensors, **settings):
        result = real(*tensors, **settings)
        return OpOutput(result.out, result.state * float("nan"))

    monkeypatch.setattr(peers, "chunk_kda", broken)
    assert main(["bench", "ops", "--interpret-smoke", "--gate", "softplus"]) == 1
    assert "RED" in capsys.readouterr().out

"""An exported student under lm-eval's own command line, where nothing of ours can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from gendistill.interop.lm_eval import GendistillLM

STOCK = """
    import sys
    class Forbid:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("gendistill", "gendistill_kernels", "gendistill_evals"):
                raise ImportError(f"{name} is forbidden here")
    sys.meta_path.insert(0, Forbid())
    from pathlib import Path
    from lm_eval.tasks import _index
    # reading the tasks that lm-eval ships takes long, and none is asked
    _index.TaskIndex.build = staticmethod(lambda paths: {})
    from lm_eval import evaluator
    evaluator.add_env_info = lambda storage: None
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
"""


@pytest.mark.parametrize("batch", [1, 5])
def test_an_exported_student_runs_under_the_stock_hf_model(
    student, choice_task, answer_task, tmp_path, batch
):
    tasks, out = [choice_task(), answer_task()], tmp_path / "out"
    words = ["--model", "hf", "--model_args", f"pretrained={student},trust_remote_code=True,dtype=float32"]
    words += ["--tasks", ",".join(map(str, tasks)), "--device", "cpu", "--batch_size", str(batch)]
    words += ["--output_path", str(out), "--log_samples"]
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "PYTHONSAFEPATH") if name in os.environ}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STOCK), *words],
        capture_output=True,
        text=True,
        check=False,
        env={
            **{"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
            **{"OMP_NUM_THREADS": "1", **kept},
        },
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = {}
    for path in out.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name.split("_2")[0]] = sorted(rows, key=lambda row: row["doc_id"])
    ours = GendistillLM(str(student), device="cpu")
    from lm_eval import simple_evaluate

    expected = simple_evaluate(ours, tasks=list(map(str, tasks)), bootstrap_iters=0, log_samples=True)[
        "samples"
    ]
    ours.close()
    assert [row["resps"] for row in found["samples_tiny_answer"]] == [
        row["resps"] for row in expected["tiny_answer"]
    ]
    for row, other in zip(found["samples_tiny_choice"], expected["tiny_choice"], strict=True):
        assert (row["acc"], row["acc_norm"]) == (other["acc"], other["acc_norm"])
        for one, its in zip(row["resps"], other["resps"], strict=True):
            assert float(one[0][0]) == pytest.approx(its[0][0], abs=1e-3)

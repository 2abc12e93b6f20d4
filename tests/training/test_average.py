"""Two processes that average gradients after the passes, as beside CUDA graphs, train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gendistill.config.objectives import KLConfig
from gendistill.losses.logits import compare_logits
from gendistill.teachers.live import LiveTeacher
from gendistill.training.parallel.ddp import DataParallel
from gendistill.training.parallel.single import Single
from gendistill.training.step import StepRunner

# one process; then with gradients that stay where they are, alone and on two processes, whole or sharded; and without
# graphs
KINDS = {
    "two micro-batches each": ["one", "one held", "ddp", "fsdp2", "averaged"],
    "one micro-batch each": ["one", "ddp", "fsdp2", "averaged"],
    "fused bfloat16": ["one", "one held", "ddp", "fsdp2"],
    "adapters": ["one", "ddp", "fsdp2"],
    "tied": ["one", "ddp", "fsdp2"],
    "rewound": ["one", "ddp", "fsdp2", "averaged"],
    "minutes": ["ddp", "fsdp2"],
}
# numbers are rounded to bfloat16 in another order
ROUNDED = ("fused bfloat16", "adapters")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    script = Path(__file__).with_name("average_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(KINDS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "codes.json").read_text()), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, (one, *kinds) in KINDS.items() if one == "one" for kind in kinds],
)
def test_averaged_gradients_are_those_of_one_process(tiny, averaged, name, kind):
    folder, codes, output = averaged
    assert codes[f"{name}, one"] == codes[f"{name}, {kind}"] == 0, output[-3000:]
    one, two = (tiny.rows(folder / name / each) for each in ("one", kind))
    rel = 5e-3 if name in ROUNDED else 1e-5
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert one[-1]["step"] == 6
    for mine, theirs in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=rel)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * rel)
        assert mine.get("rewinds") == theirs.get("rewinds")
    assert any("rewinds" in row for row in one) == (name == "rewound")


@pytest.mark.parametrize("kind", KINDS["minutes"])
def test_a_stage_in_minutes_ends(tiny, averaged, kind):
    folder, codes, output = averaged
    assert codes[f"minutes, {kind}"] == 0, output[-3000:]
    assert tiny.rows(folder / "minutes" / kind)


def test_a_process_that_gives_up_alone_says_so(averaged):
    *_, output = averaged
    said = "tiny: goes on without CUDA graphs (what only this process has met)"
    warnings = {line for line in output.splitlines() if "without CUDA graphs" in line}
    assert warnings == {f"warning: rank 1: {said}"}


def test_only_what_does_not_overlap_is_averaged(monkeypatch):
    shared = []
    monkeypatch.setattr("torch.distributed.all_reduce", shared.append)
    process, gradients = object.__new__(DataParallel), torch.full((3,), 4.0)
    process.world = 2
    for averages in (False, True):
        process.averages = averages
        process.average(gradients)
    assert shared == [gradients]
    assert gradients.tolist() == [2.0, 2.0, 2.0]


class Two(Single):
    """The first of two processes, of which the other one has no gradients."""

    world = 2

    def average(self, gradients):
        gradients /= self.world


def test_whoever_runs_a_step_has_its_gradients_averaged(tiny):
    """A loss is divided by the labels of all processes: what a process computes is ``world`` times its share."""

    def norm(parallel):
        student = tiny.make_student()
        runner = StepRunner(student, compare_logits(KLConfig()), LiveTeacher(tiny.make_teacher()), parallel)
        runner.accumulate([tiny.batch_of([1, 2])])
        return torch.nn.utils.get_total_norm([each.grad for each in student.parameters()])

    one, two = norm(Single(torch.device("cpu"))), norm(Two(torch.device("cpu")))
    assert two.item() == pytest.approx(one.item(), rel=1e-5)

"""A micro-batch never asks the device for a number: what steers Python is known on the host."""

import traceback

import numpy as np
import pytest
import torch

from gendistill.config.objectives import BlockOutputConfig, CEConfig, KLConfig, MixerOutputConfig
from gendistill.conversion.probe import probe_student
from gendistill.data.packing import build_batch
from gendistill.data.render import TokenizedSample
from gendistill.losses.build import build_objective
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import tiny_student, tiny_teacher
from gendistill.training.heldout import score_heldout
from gendistill.training.parallel import Single
from gendistill.training.step import StepRunner

READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
# transformers asks once in every forward pass whether positions restart
ALLOWED = {"find_packed_sequence_indices"}


@pytest.fixture
def reads(monkeypatch):
    """Functions that read a number from a tensor, in the order in which they did."""
    found = []

    def watch(name):
        real = getattr(torch.Tensor, name)

        def read(self, *arguments):
            place = traceback.extract_stack(limit=2)[0]
            found.append(f"{place.filename.split('site-packages/')[-1]}: {place.name}")
            return real(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in READS:
        watch(name)
    return found


def batch_of(*rows, seq_len=16, seed=0):
    """Pack documents of these lengths as training does."""
    rng = np.random.default_rng(seed)
    documents = [
        [TokenizedSample(rng.integers(3, 97, length), np.ones(length, dtype=bool)) for length in row]
        for row in rows
    ]
    return build_batch(documents, seq_len=seq_len, pad_id=0)


def ours(reads):
    return [read for read in reads if read.split(": ")[-1] not in ALLOWED]


def test_the_watch_sees_what_a_batch_without_host_lengths_costs(reads):
    """The guard itself: ends alone are read back from the device."""
    batch = batch_of([5, 7], [16])
    student = tiny_student()
    ends = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
    student.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False, **ends)
    assert any(read.endswith("models/sequences.py: _segments") for read in reads)


@pytest.mark.parametrize("config", [KLConfig(), CEConfig(), MixerOutputConfig(), BlockOutputConfig()])
@pytest.mark.parametrize("placement", ["mixed", "pure"])
def test_a_micro_batch_of_every_objective_asks_nothing(reads, config, placement):
    student, teacher = tiny_student(placement=placement), LiveTeacher(tiny_teacher())
    objective = build_objective(config)
    objective.bind(student.config, teacher.facts)
    objective.calibrate(teacher, batch_of([9, 3], [2, 14]))
    runner = StepRunner(student, objective, teacher, Single(torch.device("cpu")))
    reads.clear()
    losses, _ = runner.accumulate([batch_of([5, 7], [16])])
    assert ours(reads) == []
    # two models at most, once each; the pure student has no attention to ask for
    assert len(reads) <= 2
    assert torch.isfinite(losses).all()


def test_held_out_scores_and_the_probe_ask_for_no_lengths(reads):
    student, teacher = tiny_student(), LiveTeacher(tiny_teacher())
    batches = [batch_of([5, 7], [16]), batch_of([4, 4, 8], [3])]
    score_heldout(student, teacher, batches)
    assert [read.split(": ")[-1] for read in ours(reads)] == ["measure_heldout"]
    probe_student(student, teacher, batches)
    assert not [read for read in reads if "ops/" in read or "models/" in read or "mixers/" in read]

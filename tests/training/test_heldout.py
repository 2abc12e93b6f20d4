"""Held-out scores against dense logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from gendistill.errors import DataError, RecipeError
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import tiny_student, tiny_teacher
from gendistill.training.heldout import measure_heldout, score_heldout


def test_scores_match_dense_logits(tiny):
    student, teacher = tiny.make_student(), tiny.make_teacher()
    batches = tiny.heldout()
    scores = score_heldout(student, LiveTeacher(teacher), batches)
    sums = dict.fromkeys(("teacher_ce", "student_ce", "kl", "top1_agreement"), 0.0)
    count = 0
    for batch in batches:
        counted = batch.labels != -100
        inputs = {"position_ids": batch.position_ids, "use_cache": False}
        with torch.no_grad():
            s = student(batch.input_ids, **inputs).logits[counted].double().log_softmax(-1)
            t = teacher(batch.input_ids, **inputs).logits[counted].double().log_softmax(-1)
        sums["teacher_ce"] += F.nll_loss(t, batch.labels[counted], reduction="sum").item()
        sums["student_ce"] += F.nll_loss(s, batch.labels[counted], reduction="sum").item()
        sums["kl"] += F.kl_div(s, t, log_target=True, reduction="sum").item()
        sums["top1_agreement"] += (s.argmax(-1) == t.argmax(-1)).sum().item()
        count += int(counted.sum())
    assert scores["num_tokens"] == count
    assert scores["ln_vocab"] == pytest.approx(math.log(97))
    for name, value in sums.items():
        assert scores[name] == pytest.approx(value / count, rel=1e-5), name


def test_means_by_position_are_those_of_dense_logits(tiny):
    """Ranges of tokens read, each twice as long as the one before it, from the first token of every document."""
    student, teacher = tiny.make_student(), tiny.make_teacher()
    batches = tiny.heldout()
    measured = measure_heldout(student, LiveTeacher(teacher), batches)
    found: dict[int, list[float]] = {}
    for batch in batches:
        counted = batch.labels != -100
        inputs = {"position_ids": batch.position_ids, "use_cache": False}
        with torch.no_grad():
            s = student(batch.input_ids, **inputs).logits[counted].double().log_softmax(-1)
            t = teacher(batch.input_ids, **inputs).logits[counted].double().log_softmax(-1)
        kl = F.kl_div(s, t, log_target=True, reduction="none").sum(-1)
        for read, value in zip((batch.position_ids[counted] + 1).tolist(), kl.tolist(), strict=True):
            found.setdefault(len(bin(read)) - 3, []).append(value)
    assert len(found) > 2
    assert [row["first"] for row in measured.by_position] == [2**power for power in sorted(found)]
    for row, power in zip(measured.by_position, sorted(found), strict=True):
        assert row["last"] == 2 ** (power + 1) - 1
        assert row["num_tokens"] == len(found[power])
        assert row["kl"] == pytest.approx(sum(found[power]) / len(found[power]), rel=1e-5)
    for name in ("kl", "student_ce", "teacher_ce", "top1_agreement"):
        total = sum(row[name] * row["num_tokens"] for row in measured.by_position)
        assert total / measured.scores["num_tokens"] == pytest.approx(measured.scores[name], rel=1e-6), name


def test_a_teacher_against_itself_has_no_gap(tiny):
    teacher = tiny.make_teacher()
    scores = score_heldout(teacher, LiveTeacher(teacher), tiny.heldout())
    assert scores["kl"] == 0.0
    assert scores["top1_agreement"] == 1.0
    assert scores["student_ce"] == scores["teacher_ce"]


def test_scoring_leaves_the_model_in_training_mode(tiny):
    student, teacher = tiny.make_student().train(), tiny.make_teacher().train()
    score_heldout(student, LiveTeacher(teacher), tiny.heldout())
    assert student.training
    assert teacher.training


def test_nothing_to_score_and_other_vocabularies_are_refused(tiny):
    with pytest.raises(DataError, match="no held-out position"):
        score_heldout(tiny.make_student(), LiveTeacher(tiny.make_teacher()), [])
    with pytest.raises(RecipeError, match=r"98.*97"):
        score_heldout(tiny_student(), LiveTeacher(tiny_teacher(vocab_size=98)), tiny.heldout())

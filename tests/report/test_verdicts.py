"""The headline says what the data allow: every sentence, and when it is said."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
from rich.console import Console

from gendistill.report import render_terminal, write_report
from gendistill.report.gap import Estimate, Flips, GapReport, Kept, TaskGap
from gendistill.report.retention import bootstrapped, paired_means, retention
from gendistill.report.run_files import read_run
from gendistill.report.verdicts import (
    items_needed,
    kept_sentence,
    stage_remarks,
    verdict_sentences,
    warnings,
)
from gendistill.report.write import gap_report
from gendistill_evals import ProtocolFamily

LEADS = {ProtocolFamily.LIKELIHOOD: "likelihood", ProtocolFamily.GENERATION: "generation"}


def task(name, gap, low, high, n, *, kept=None, at_chance=(), chance=0.0, teacher=80.0):
    """A task of which only generation was measured."""

    def only(value):
        return {"likelihood": None, "generation": value}

    return TaskGap(
        task=name,
        kind="exact_match",
        metric="accuracy",
        n=n,
        limit=None,
        items_sha256="a",
        prompt_sha256="b",
        reasons={},
        teacher=only(Estimate(teacher, teacher - 1, teacher + 1, n)),
        student=only(Estimate(teacher + gap, teacher + gap - 1, teacher + gap + 1, n)),
        gap=only(Estimate(gap, low, high, n)),
        flips=only(Flips(0, 0)),
        chance=chance,
        kept=only(kept),
        at_chance=at_chance,
        hidden=None,
    )


def report(*tasks, kept=None):
    return GapReport(
        name="run",
        teacher="t",
        student="s",
        placement=None,
        settings={},
        leads=LEADS,
        tasks=tasks,
        kept={"likelihood": None, "generation": kept},
    )


HEADLINES = {
    "a gap that is told from noise": (
        [("quiz", -8.0, -10.0, -6.0, 800)],
        "Writing its answers, the student scores 8.0 points below its teacher (95% interval -10.0 to -6.0, 800 items).",
    ),
    "a gain that is told from noise": (
        [("quiz", 3.0, 1.0, 5.0, 2000)],
        "Writing its answers, the student scores 3.0 points above its teacher (95% interval +1.0 to +5.0, 2,000 items)"
        ".",
    ),
    "few items show that it is worse and not by how much": (
        [("quiz", -50.0, -70.0, -25.0, 24)],
        "Writing its answers, the student scores 50.0 points below its teacher (95% interval -70.0 to -25.0, 24 items)"
        ": too few items to say by how much, about 490 would say it to 5 points.",
    ),
    "24 items are not a verdict": (
        [("quiz", -8.0, -28.0, 12.0, 24)],
        "Writing its answers, no verdict: 8.0 points below its teacher (95% interval -28.0 to +12.0, 24 items) may be "
        "noise; about 310 items would tell a gap of this size from none.",
    ),
    "a gap of zero on few items is not the same score": (
        [("quiz", 0.0, -13.0, 13.0, 24)],
        "Writing its answers, no verdict: no difference is seen (95% interval -13.0 to +13.0, 24 items), and a gap of "
        "13.0 points would not show.",
    ),
    "a gap of zero on many items is the same score, to what they can tell": (
        [("quiz", 0.0, -0.42, 0.35, 9000)],
        "Writing its answers, the student scores like its teacher, to within 0.5 points (95% interval -0.4 to +0.3, "
        "9,000 items).",
    ),
    "two tasks that surely go opposite ways are not the same score": (
        [("sums", -10.0, -14.0, -6.0, 500), ("quiz", 10.0, 6.0, 14.0, 500)],
        "Writing its answers, the student is not the same as its teacher: worse on sums (-10.0) and better on quiz "
        "(+10.0); the mean, 0.0 points (95% interval -2.8 to +2.8, 1,000 items of 2 tasks), says nothing of either.",
    ),
    "two tasks that may go opposite ways": (
        [("sums", -10.0, -25.0, 5.0, 60), ("quiz", 10.0, -5.0, 25.0, 60)],
        "Writing its answers, no verdict: tasks from -10.0 points on sums to +10.0 points on quiz (95% interval -10.6 "
        "to +10.6, 120 items of 2 tasks), and a gap of 10.6 points would not show.",
    ),
    "a mean that is a loss beside a task that is surely a gain": (
        [("sums", -30.0, -34.0, -26.0, 500), ("quiz", 10.0, 6.0, 14.0, 500)],
        "Writing its answers, the student scores 10.0 points below its teacher (95% interval -12.8 to -7.2, 1,000 items"
        " of 2 tasks); worse on sums (-30.0) and better on quiz (+10.0).",
    ),
    "a small mean of tasks on both sides": (
        [("sums", -5.0, -15.0, 5.0, 100), ("quiz", 3.0, -7.0, 13.0, 100)],
        "Writing its answers, no verdict: 1.0 points below its teacher (95% interval -8.1 to +6.1, 200 items of 2 "
        "tasks) may be noise, with tasks from -5.0 points on sums to +3.0 points on quiz; about 21,000 items would "
        "tell a gap of this size from none.",
    ),
    "one item": (
        [("quiz", -100.0, -100.0, 40.0, 1)],
        "Writing its answers, no verdict: 100.0 points below its teacher (95% interval -100.0 to +40.0, 1 item) may be "
        "noise; about 2 items would tell a gap of this size from none.",
    ),
    "nothing": ([], "The generation gap is not measured."),
}


@pytest.mark.parametrize(("tasks", "sentence"), HEADLINES.values(), ids=list(HEADLINES))
def test_the_headline_says_what_the_data_allow(tasks, sentence):
    assert verdict_sentences(report(*(task(*each) for each in tasks)))[0] == sentence


@pytest.mark.parametrize(("tasks", "sentence"), HEADLINES.values(), ids=list(HEADLINES))
def test_no_headline_claims_more_than_its_interval(tasks, sentence):
    """Derived from the intervals alone: below or above only beyond zero, alike only within a point."""
    gap = report(*(task(*each) for each in tasks)).mean_gap("generation")
    said = verdict_sentences(report(*(task(*each) for each in tasks)))[0]
    assert ("the student scores" not in said) or gap.excludes_zero or max(-gap.low, gap.high) <= 1
    assert ("no verdict" not in said) or not gap.excludes_zero
    assert "the same as its teacher (" not in said
    assert "scores the same" not in said


def kept(plain, above=None):
    return Kept(Estimate(*plain, 100), above and Estimate(*above, 100), None, None)


RETENTION = {
    "plain": (
        report(task("quiz", -8, -9, -7, 800, kept=kept((90, 85, 95))), kept=kept((90, 85, 95))),
        "It keeps 90% of what its teacher gets right (95% interval 85% to 95%).",
    ),
    "above chance": (
        report(task("quiz", -8, -9, -7, 800, kept=kept((90, 85, 95))), kept=kept((90, 85, 95), (80, 70, 91))),
        "It keeps 90% of what its teacher gets right (95% interval 85% to 95%; above chance 80%, 95% interval 70% to "
        "91%).",
    ),
    "a teacher at chance makes it meaningless": (
        report(task("quiz", -8, -9, -7, 800, at_chance=("generation",))),
        "What it keeps cannot be said: on quiz the teacher itself is not surely above chance.",
    ),
    "one task of two is left out": (
        report(
            task("quiz", -8, -9, -7, 800, at_chance=("generation",)),
            task("sums", -8, -9, -7, 800, kept=kept((90, 85, 95))),
            kept=kept((90, 85, 95)),
        ),
        "It keeps 90% of what its teacher gets right (95% interval 85% to 95%), without quiz, where the teacher itself "
        "is not surely above chance.",
    ),
    "not measured": (report(), ""),
}


@pytest.mark.parametrize(("found", "sentence"), RETENTION.values(), ids=list(RETENTION))
def test_what_is_kept_is_said_where_it_means_something(found, sentence):
    assert kept_sentence(found) == sentence


@pytest.mark.parametrize(
    ("chance", "teacher", "says"),
    [
        (
            25.0,
            26.0,
            "by generation the teacher scores 26.0%, not surely above a guess (25.0%), so neither the gap",
        ),
        (0.0, 1.0, "by generation the teacher scores 1.0%, too little to say more, so neither the gap"),
    ],
)
def test_a_teacher_at_chance_is_warned_of(chance, teacher, says):
    found = report(task("quiz", 0, -5, 5, 100, at_chance=("generation",), chance=chance, teacher=teacher))
    assert [line for line in warnings(found) if line.startswith(f"quiz: {says}")]


def test_the_number_of_items_needed_tells_the_gap_four_times_in_five():
    """By simulation of differences -1, 0 and 1: of the intervals at that n, about 80% exclude zero."""
    generator = random.Random(0)
    lost, won, seen = 0.14, 0.06, 100
    variance = lost + won - (lost - won) ** 2
    half = 196 * (variance / seen) ** 0.5
    needed = items_needed(Estimate(-8.0, -8.0 - half, -8.0 + half, seen))
    told = 0
    for _ in range(1000):
        draws = [generator.random() for _ in range(needed)]
        values = [-1 if draw < lost else 1 if draw < lost + won else 0 for draw in draws]
        mean = sum(values) / needed
        error = (sum((value - mean) ** 2 for value in values) / needed**2) ** 0.5
        told += abs(mean) > 1.96 * error
    assert 0.76 < told / 1000 < 0.84


@pytest.mark.parametrize(
    ("before", "after", "remarked"),
    [
        (0.8, 2.0, True),
        (0.8, 0.805, True),
        (0.8, 0.8, False),
        (0.8, 0.801, False),
        (2.0, 0.8, False),
        (0.0, 0.1, True),
    ],
)
def test_a_stage_that_made_the_kl_worse_is_remarked_on(make_run, edit_json, before, after, remarked):
    run_dir = make_run()
    for stage, kl in (("project", before), ("distill", after)):
        edit_json(
            run_dir / f"stages/{stage}/result.json", lambda content, kl=kl: content["heldout"].update(kl=kl)
        )
    found = [line for line in stage_remarks(read_run(run_dir)) if "distill" in line]
    assert found == (
        [
            f"stage distill made the held-out KL to the teacher worse: {after:.3g} nats per token after it, "
            f"{before:.3g} after project"
        ]
        if remarked
        else []
    )


def test_remarks_are_in_the_page_and_the_terminal(make_run, edit_json):
    run_dir = make_run()
    edit_json(run_dir / "stages/distill/result.json", lambda content: content["heldout"].update(kl=9.0))
    assert "stage distill made the held-out KL" in write_report(run_dir).page.read_text()
    console = Console(file=io.StringIO(), width=200)
    render_terminal(run_dir, console=console)
    assert "warn     stage distill made the held-out KL" in console.file.getvalue()


# --- what is kept ---------------------------------------------------------------------------------------------------


def planted(generator, size, teacher, student, copied, *, members=1):
    """Draw right and wrong of both models, the student copying the teacher now and then; groups answer alike."""
    own = (student - copied * teacher) / (1 - copied)
    pairs, groups = [], []
    for group in range(size // members):
        right = generator.random() < teacher
        answer = right if generator.random() < copied else generator.random() < own
        pairs += [(float(right), float(answer))] * members
        groups += [str(group)] * members
    first, second = zip(*pairs, strict=True)
    return first, second, groups


@pytest.mark.parametrize(
    ("size", "members", "floor"), [(24, 1, 0.0), (100, 1, 0.25), (400, 4, 0.25), (1000, 1, 0.5)]
)
def test_intervals_of_what_is_kept_hold_the_truth(size, members, floor):
    generator = random.Random(size)
    teacher, student = 0.85, 0.7
    held = known = 0
    for _ in range(600):
        first, second, groups = planted(generator, size, teacher, student, 0.5, members=members)
        ratio = retention([paired_means(first, second, floor=[floor] * size, groups=groups)])
        if ratio is not None:
            known += 1
            held += ratio.low <= (student - floor) / (teacher - floor) <= ratio.high
    assert known > 590
    assert 0.925 < held / known < 0.985


def test_groups_widen_the_interval():
    first, second, groups = planted(random.Random(0), 400, 0.8, 0.6, 0.3, members=8)
    alone = retention([paired_means(first, second)])
    grouped = retention([paired_means(first, second, groups=groups)])
    assert alone.value == grouped.value
    assert 2 < (grouped.high - grouped.low) / (alone.high - alone.low) < 4


def test_a_teacher_at_chance_keeps_nothing_to_divide_by():
    half = [1.0, 0.0] * 20
    assert retention([paired_means(half, half, floor=[0.5] * 40)]) is None
    assert retention([paired_means([0.0] * 40, half)]) is None
    assert retention([paired_means(half, half)]).value == 1


def test_bootstrap_of_what_is_kept_agrees_with_brute_force_and_with_fieller():
    generator = np.random.default_rng(0)
    teacher = (generator.random(300) < 0.7).astype(float)
    student = np.where(generator.random(300) < 0.8, teacher, 0.0)
    groups = [str(item // 3) for item in range(300)]
    part = paired_means(teacher, student, groups=groups)
    found = bootstrapped([part], resamples=4000)
    blocks = np.column_stack([teacher, student]).reshape(100, 3, 2)
    drawn = blocks[generator.integers(0, 100, size=(4000, 100))].sum(axis=(1, 2))
    low, high = np.percentile(drawn[:, 1] / drawn[:, 0], [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    fieller = retention([part])
    assert found.value == fieller.value
    assert (found.low, found.high) == pytest.approx((fieller.low, fieller.high), abs=0.02)
    assert bootstrapped([part], resamples=4000) == found


def test_bootstrap_has_no_ratio_where_the_teacher_may_be_at_chance():
    half = [0.0, 1.0] * 20
    assert bootstrapped([paired_means(half, half, floor=[0.5] * 40)], resamples=500) is None
    assert bootstrapped([paired_means([0.0] * 40, half)], resamples=500) is None
    same = bootstrapped([paired_means(half, half)], resamples=500)
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("lists", [([], []), ([1.0], [1.0, 0.0])])
def test_scores_of_other_items_have_no_ratio(lists):
    with pytest.raises(ValueError, match="same items"):
        paired_means(*lists)


def test_what_is_kept_counts_every_task_once_and_survives_the_file(make_run):
    """quiz 16 of 20 to 8 (two options), sums 3 of 4 to 2 (none)."""
    found = gap_report(read_run(make_run()))
    quiz, sums = found.tasks
    assert quiz.kept["generation"].plain.value == pytest.approx(50)
    assert quiz.kept["generation"].above_chance.value == pytest.approx(100 * (0.4 - 0.5) / (0.8 - 0.5))
    assert quiz.chance == 50
    assert (quiz.flips["generation"].lost, quiz.flips["generation"].won) == (8, 0)
    assert sums.kept["likelihood"] is None
    assert GapReport.from_json(json.loads(json.dumps(found.to_json()))) == found

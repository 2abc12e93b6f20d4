"""Laws of the gap: what it counts, when it is exactly zero, and when it is refused."""

from __future__ import annotations

import json
import random

import pytest

from gendistill.errors import ReportError
from gendistill.report import GapReport, rank_inversions
from gendistill.report.run_files import read_run
from gendistill.report.write import gap_report


def test_gaps_are_differences_of_counted_items(make_run):
    """20 items: 12 / 12 right by likelihood, 16 / 8 by generation."""
    quiz, sums = gap_report(read_run(make_run())).tasks
    assert (quiz.teacher["likelihood"].value, quiz.student["likelihood"].value) == pytest.approx((60, 60))
    assert (quiz.teacher["generation"].value, quiz.student["generation"].value) == pytest.approx((80, 40))
    assert quiz.gap["likelihood"].value == 0
    assert quiz.gap["generation"].value == pytest.approx(-40)
    assert quiz.hidden.value == pytest.approx(quiz.gap["generation"].value - quiz.gap["likelihood"].value)
    assert quiz.hidden.n == 20
    assert sums.gap["likelihood"] is None
    assert sums.hidden is None
    assert sums.gap["generation"].value == pytest.approx(-25)


def test_intervals_pair_the_items(make_run):
    """Ten losses of ten leave less room than two models that are resampled on their own would, but not none."""
    teacher, student = {"quiz": ([1] * 10, [1] * 10)}, {"quiz": ([1] * 10, [0] * 10)}
    (quiz,) = gap_report(read_run(make_run(teacher=teacher, student=student))).tasks
    gap = quiz.gap["generation"]
    assert gap.value == gap.low == -100
    assert -50 < gap.high < -40
    # Independent resampling of both models would give this case a far wider interval.
    flips = {"quiz": ([1, 0] * 10, [1, 0] * 10)}
    (same,) = gap_report(read_run(make_run("same", teacher=flips, student=flips))).tasks
    assert same.teacher["generation"].high - same.teacher["generation"].low > 20
    room = 100 * 1.959964**2 / (20 + 1.959964**2)
    assert same.gap["generation"].value == 0
    assert (same.gap["generation"].low, same.gap["generation"].high) == pytest.approx((-room, room), abs=1e-3)


def test_teacher_against_itself_is_exactly_zero(make_run):
    generator = random.Random(0)
    vectors = {name: ([generator.randint(0, 1) for _ in range(63)],) * 2 for name in ("a", "b")}
    report = gap_report(read_run(make_run(teacher=vectors, student=vectors)))
    means = [report.mean_gap("likelihood"), report.mean_gap("generation"), report.mean_hidden]
    for gap in [
        *means,
        *(gap for t in report.tasks for gap in (t.gap["likelihood"], t.gap["generation"], t.hidden)),
    ]:
        assert gap.value == 0
        assert gap.low == -gap.high < 0


def test_order_of_samples_is_irrelevant(make_run):
    run_dir = make_run()
    before = gap_report(read_run(run_dir))
    path = run_dir / "eval/student/samples.jsonl"
    lines = path.read_text().splitlines()
    random.Random(1).shuffle(lines)
    path.write_text("\n".join(lines) + "\n")
    assert gap_report(read_run(run_dir)) == before


@pytest.mark.parametrize("field", ["items_sha256", "prompt_sha256", "limit", "metric", "kind"])
def test_other_items_or_prompts_are_refused(make_run, edit_json, field):
    run_dir = make_run()
    edit_json(
        run_dir / "eval/student/results.json",
        lambda content: content["tasks"][0].update({field: 5 if field == "limit" else "other"}),
    )
    with pytest.raises(ReportError, match=field) as caught:
        gap_report(read_run(run_dir))
    assert caught.value.where == "task quiz"
    assert caught.value.hint


@pytest.mark.parametrize("field", ["max_new_tokens", "do_sample", "chat_template_sha256"])
def test_other_settings_are_refused(make_run, edit_json, field):
    run_dir = make_run()
    edit_json(
        run_dir / "eval/student/results.json", lambda content: content["settings"].update({field: "other"})
    )
    with pytest.raises(ReportError, match=field):
        gap_report(read_run(run_dir))


def test_batch_size_may_differ(make_run, edit_json):
    run_dir = make_run()
    before = gap_report(read_run(run_dir)).tasks
    edit_json(run_dir / "eval/student/results.json", lambda content: content["settings"].update(batch_size=1))
    assert gap_report(read_run(run_dir)).tasks == before


def test_samples_of_another_evaluation_are_refused(make_run, edit_json):
    run_dir = make_run()
    edit_json(
        run_dir / "eval/student/results.json",
        lambda content: content["tasks"][0]["generation"].update(value=0.9),
    )
    with pytest.raises(ReportError, match=r"0\.9000 over 20 items, samples.jsonl gives 0\.4000"):
        gap_report(read_run(run_dir))


@pytest.mark.parametrize("change", ["rename", "repeat"])
def test_samples_that_do_not_pair_are_refused(make_run, change):
    run_dir = make_run()
    path = run_dir / "eval/student/samples.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    lines[0] = json.dumps({**row, "id": "other"}) if change == "rename" else lines[1]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ReportError, match="task quiz"):
        gap_report(read_run(run_dir))


def test_one_model_alone_has_scores_but_no_gap(make_run):
    report = gap_report(read_run(make_run(teacher=None)))
    assert report.teacher is None
    assert report.mean_gap("generation") is None
    assert report.tasks[0].student["generation"].value == pytest.approx(40)


def test_gap_json_gives_the_same_report_back(make_run):
    report = gap_report(read_run(make_run()))
    assert GapReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("change", [{"schema": 99}, {"surprise": 1}, {"tasks": [{}]}])
def test_gap_json_of_another_schema_is_refused(make_run, change):
    content = {**gap_report(read_run(make_run())).to_json(), **change}
    with pytest.raises(ReportError, match="schema"):
        GapReport.from_json(content)


def test_rank_inversion_names_the_pair_that_changes_places(make_run):
    """By likelihood a > b > c; by generation b > a > c."""
    scores = {"a": (9, 5), "b": (8, 7), "c": (2, 1)}
    reports = [
        gap_report(read_run(make_run(name, teacher={"quiz": ([1] * 10, [1] * 10)}, student={"quiz": tuple(
            [1] * right + [0] * (10 - right) for right in pair
        )})))
        for name, pair in scores.items()
    ]  # fmt: skip
    (found,) = rank_inversions(reports)
    assert (found.task, found.best) == ("quiz", {"likelihood": "a", "generation": "b"})
    assert found.margin == pytest.approx({"likelihood": 10, "generation": 20})
    assert rank_inversions([reports[0], reports[0]]) == []


def test_runs_scored_on_other_items_are_not_ranked(make_run, edit_json):
    first, second = make_run("first"), make_run("second")
    for role in ("teacher", "student"):
        edit_json(
            second / f"eval/{role}/results.json", lambda content: content["tasks"][0].update(items_sha256="z")
        )
    with pytest.raises(ReportError, match=r"first and second were not scored alike.*items_sha256"):
        rank_inversions([gap_report(read_run(run_dir)) for run_dir in (first, second)])


@pytest.mark.parametrize(("limit", "shown"), [(20, 20), (21, None), (10**9, None), (None, None), (5, 5)])
def test_a_limit_that_left_nothing_out_is_none(make_run, edit_json, limit, shown):
    """quiz has 20 scored items: only a limit of at most 20 can have left any out."""
    run_dir = make_run()
    for role in ("teacher", "student"):
        edit_json(
            run_dir / f"eval/{role}/results.json", lambda content: content["tasks"][0].update(limit=limit)
        )
    assert gap_report(read_run(run_dir)).tasks[0].limit == shown


def test_a_limit_that_left_nothing_out_does_not_part_teacher_and_student(make_run, edit_json):
    run_dir = make_run()
    edit_json(
        run_dir / "eval/student/results.json", lambda content: content["tasks"][0].update(limit=500, n=20)
    )
    assert gap_report(read_run(run_dir)).tasks[0].limit is None


@pytest.mark.parametrize("correct", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 63])
def test_scores_without_spread_have_intervals_with_a_width(make_run, count, correct):
    vectors = {"quiz": ([correct] * count, [1] * count)}
    (quiz,) = gap_report(read_run(make_run(teacher=vectors, student=vectors))).tasks
    found = quiz.student["likelihood"]
    assert (found.value, found.n) == (100 * correct, count)
    assert found.high - found.low == pytest.approx(100 * 1.959964**2 / (count + 1.959964**2), abs=1e-3)
    assert quiz.hidden.value == 0
    assert quiz.hidden.low < 0 < quiz.hidden.high


def test_scores_without_samples_are_refused(make_run):
    run_dir = make_run()
    for name, change in (
        ("empty", lambda path: path.write_text("")),
        ("missing", lambda path: path.unlink()),
    ):
        change(run_dir / "eval/student/samples.jsonl")
        with pytest.raises(ReportError, match=r"samples\.jsonl gives no such score") as caught:
            gap_report(read_run(run_dir))
        assert caught.value.hint, name


def test_a_task_without_scores_has_no_gap(make_run, edit_json):
    run_dir = make_run()
    edit_json(
        run_dir / "eval/student/results.json",
        lambda content: content["tasks"][0].update(likelihood=None, generation=None),
    )
    quiz = gap_report(read_run(run_dir)).tasks[0]
    assert (quiz.student["likelihood"], quiz.gap["generation"], quiz.hidden) == (None, None, None)
    assert quiz.teacher["likelihood"].value == pytest.approx(60)

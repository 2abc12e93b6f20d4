"""What an evaluation says about itself is on the page; whatever else stands in its place is left out."""

from __future__ import annotations

import json

import pytest

from gendistill.report.diagnostics import answer_rows, length_tables, order_rows, subject_tables
from gendistill.report.html import render_page
from gendistill.report.run_files import read_run
from gendistill.report.write import gap_report
from gendistill_evals.synthetic import heat_table

ATTACK = '<script>alert("x")</script>'
ORDER = {"n": 20, "answered": 18, "stickiness": 0.75, "pairs": 20, "content_changes": 0.4, "flips": 0.25}
ANSWERS = {
    "n": 20,
    "unread": 0.1,
    "unread_examples": [
        {"id": f"{number:03d}", "text": f"{ATTACK} {number}", "ended": True} for number in range(9)
    ],
    "ended": 0.5,
    "looping": 0.15,
    "looping_ids": ["001"],
    "num_tokens": {"mean": 4.0, "p5": 1, "p50": 3, "p95": 11, "max": 12},
}
CELLS = [(length, depth) for length, depth in ((512, 0), (512, 100), (4096, 0)) for _ in range(10)]
LENGTHS = {
    "teacher": heat_table(CELLS, [1] * 20 + [1] * 9 + [0]),
    "student": heat_table(CELLS, [1] * 19 + [0] + [0] * 9 + [1]),
}


@pytest.fixture
def described(make_run, edit_json):
    run_dir = make_run()
    for role in ("teacher", "student"):
        generation = {"answers": ANSWERS, "order": ORDER, "lengths": LENGTHS[role]}
        edit_json(
            run_dir / f"eval/{role}/results.json",
            lambda content, generation=generation: content.update(
                diagnostics={
                    "permutations": 1,
                    "tasks": {"quiz": {"generation": generation, "likelihood": {}}},
                }
            ),
        )
        path = run_dir / f"eval/{role}/samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if row["task"] == "quiz":
                row["subject"] = "early" if int(row["id"]) < 10 else ATTACK
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_rows_hold_what_the_evaluation_found(described):
    run = read_run(described)
    report = gap_report(run)
    teacher, student = order_rows(run)
    assert (teacher.role, student.role) == ("teacher", "student")
    assert (student.task, student.protocol, student.n) == ("quiz", "generation", 20)
    assert (student.stickiness, student.content_changes, student.flips) == (0.75, 0.4, 0.25)
    (answered,) = [row for row in answer_rows(run, report) if (row.task, row.role) == ("quiz", "student")]
    assert (answered.looping, answered.middle, answered.long) == (0.15, 3, 11)
    assert [name for name, _ in answered.examples] == ["000", "001", "002", "003", "004"]
    (table,) = length_tables(run)
    assert table.depths == (0, 100)
    assert table.rows == ((512, ((1.0, 1.0), (1.0, 0.9))), (4096, ((0.9, 0.1), (None, None))))


def test_subjects_are_scored_on_the_items_of_both_and_the_greatest_loss_is_first(described):
    """By generation the teacher has items 0 to 15 of 20, the student 0 to 7; items 0 to 9 are early."""
    run = read_run(described)
    tables = {(task, protocol): rows for task, protocol, rows in subject_tables(run, gap_report(run))}
    late, early = tables["quiz", "generation"]
    assert (late.subject, late.n, late.teacher, late.student, late.gap) == (ATTACK, 10, 60, 0, -60)
    assert (early.subject, early.n, early.teacher, early.student) == ("early", 10, 100, 80)
    assert early.gap == pytest.approx(-20)
    assert late.low < -60 < late.high


def test_the_page_shows_it_and_runs_none_of_it(described):
    run = read_run(described)
    page = render_page(run, gap_report(run), {})
    for shown in (
        "Options in another order",
        '<td data-label="stickiness" class="flag">75%</td>',
        "half ≤ 3, 95% ≤ 11",
        '<td data-label="in a loop" class="flag">15%</td>',
        "where no answer was found",
        "By subject",
        "By length",
        '<td data-label="at 0%" class="flag">90% → 10%</td>',
        '<td data-label="at 100%">\u2013 → \u2013</td>',
    ):
        assert shown in page, shown
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12


def test_a_page_without_diagnostics_has_no_empty_sections(make_run):
    run = read_run(make_run())
    page = render_page(run, gap_report(run), {})
    for absent in ("Options in another order", "By subject", "By length", "where no answer was found"):
        assert absent not in page


ODD = [
    None,
    7,
    "text",
    [],
    {"tasks": 3},
    {"tasks": {"quiz": []}},
    {"tasks": {"quiz": {"generation": None}}},
] + [
    {"tasks": {"quiz": {"generation": entry}}}
    for entry in (
        {"order": [], "answers": 3, "lengths": "x"},
        {
            "order": {"n": "many", "stickiness": True},
            "answers": {"unread_examples": {"id": 1}, "num_tokens": []},
        },
        {"order": {"n": 3, "stickiness": "x", "flips": None}, "answers": {"unread_examples": [1, {"id": 2}]}},
        {"lengths": {"lengths": [1, "x", None], "depths": [None, 5], "values": [[1, 2, 3], 7, [None]]}},
        {"lengths": {"lengths": 3, "depths": [0], "values": [[1]]}},
    )
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_diagnostics_are_left_out_and_the_rest_is_shown(make_run, edit_json, odd):
    run_dir = make_run()
    edit_json(run_dir / "eval/student/results.json", lambda content: content.update(diagnostics=odd))
    run = read_run(run_dir)
    page = render_page(run, gap_report(run), {})
    assert "How generation ended" in page
    assert 'data-label="no answer found"' in page

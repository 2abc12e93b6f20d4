"""The gap table says the same in every form, and never hides a limit or an interval."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from gendistill.errors import ReportError
from gendistill.report import compare_reports, render_terminal
from gendistill.report.run_files import read_run
from gendistill.report.tables import (
    raw_rows,
    render_csv,
    render_markdown,
    render_rich,
    signed,
)
from gendistill.report.verdicts import verdict, warnings
from gendistill.report.write import gap_report


@pytest.fixture
def limited(make_run, edit_json):
    """A report whose tasks are both limited."""
    run_dir = make_run()

    def limit(content):
        for task in content["tasks"]:
            task["limit"] = task["n"]

    for role in ("teacher", "student"):
        edit_json(run_dir / f"eval/{role}/results.json", limit)
    return gap_report(read_run(run_dir))


def terminal(*content, width=120):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(*content)
    return console.file.getvalue()


def test_every_form_shows_the_same_numbers(limited):
    quiz = limited.tasks[0].gap["generation"]
    for text in (render_markdown([limited]), terminal(render_rich(limited))):
        for shown in (
            "60.0 / 80.0",
            "60.0 / 40.0",
            "-40.0",
            f"[{signed(quiz.low)}, {signed(quiz.high)}]",
            "-40.0 !!",
        ):
            assert shown in text
    rows = list(csv.DictReader(io.StringIO(render_csv([limited]))))
    assert [float(row["gap_generation"]) for row in rows] == pytest.approx([-40, -25])
    assert float(rows[0]["hidden_gap_low"]) == limited.tasks[0].hidden.low
    assert rows[1]["hidden_gap"] == ""


def test_limit_is_on_every_row(limited):
    lines = render_markdown([limited]).splitlines()[2:]
    assert [("LIMIT 20" in line, "LIMIT 4" in line) for line in lines] == [(True, False), (False, True)]
    assert any(line.startswith("LIMIT 4, 20") for line in warnings(limited))
    assert [row["limit"] for row in raw_rows(limited, limited.protocols)] == [20, 4]


def test_hidden_gap_is_said_in_words_and_missing_likelihood_has_its_reason(limited):
    found = warnings(limited)
    assert found[0].startswith("quiz: likelihood hides 40.0 pp of the generation gap")
    assert "sums: no likelihood score (the answer is a number)" in found


def test_a_hidden_gap_within_noise_is_not_flagged(make_run):
    teacher, student = {"quiz": ([1, 1] * 5, [1, 1] * 5)}, {"quiz": ([1, 1] * 5, [0, 1, *[1, 1] * 4])}
    report = gap_report(read_run(make_run(teacher=teacher, student=student)))
    assert report.tasks[0].hidden.value == pytest.approx(-10)
    assert "!!" not in render_markdown([report])
    assert warnings(report) == []
    assert "no verdict: 10.0 points below its teacher (95% interval" in verdict(report)


def test_verdict_names_what_is_missing(make_run):
    alone = verdict(gap_report(read_run(make_run("alone", teacher=None))))
    assert alone == "The generation gap is not measured. The likelihood gap is not measured."


@pytest.mark.parametrize(
    ("points", "shown"), [(0.0, "0.0"), (-0.04, "0.0"), (0.04, "0.0"), (-7.46, "-7.5"), (3, "+3.0")]
)
def test_rounded_zero_has_no_sign(points, shown):
    assert signed(points) == shown


def test_terminal_shows_table_verdict_and_warnings(make_run):
    console = Console(file=io.StringIO(), color_system=None)
    render_terminal(make_run(), console=console)
    text = console.file.getvalue()
    for shown in ("quiz", "-40.0 !!", "points below its teacher", "warn     quiz: likelihood hides"):
        assert shown in text


def test_markup_in_a_task_name_is_printed_as_it_is(make_run):
    scores = {"[bold]a|b[/bold]": ([1, 0], [1, 0])}
    report = gap_report(read_run(make_run(teacher=scores, student=scores)))
    assert "[bold]a|b[/bold]" in terminal(render_rich(report))
    assert r"[bold]a\|b[/bold]" in render_markdown([report])


def test_comparison_lists_runs_and_inversions(make_run):
    def run(name, likelihood, generation):
        student = {
            "quiz": ([1] * likelihood + [0] * (10 - likelihood), [1] * generation + [0] * (10 - generation))
        }
        return make_run(name, teacher={"quiz": ([1] * 10, [1] * 10)}, student=student)

    comparison = compare_reports([run("a", 9, 3), run("b", 7, 6)])
    text = comparison.to_markdown()
    assert "| a | quiz" in text
    assert "| b | quiz" in text
    assert "likelihood prefers a (by 20.0 pp), generation prefers b (by 30.0 pp)" in text


def test_runs_of_one_name_are_told_apart_by_folder(make_run, edit_json):
    first, second = make_run("first"), make_run("second")
    edit_json(second / "manifest.json", lambda content: content.update(name="first"))
    assert [report.name for report in compare_reports([first, second]).reports] == [str(first), str(second)]


def test_one_run_is_no_comparison(make_run):
    with pytest.raises(ReportError, match="at least two"):
        compare_reports([make_run()])

"""Many students on a page: what they chose, what each choice did, and where the protocols disagree."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from gendistill.cli.main import main
from gendistill.errors import RecipeError, ReportError
from gendistill.gates import GateError, parse_gate
from gendistill.report import compare_reports
from gendistill.report.choices import differing_settings, single_effects
from gendistill.report.diagnostics import subject_tables
from gendistill.report.many import disagreements, headline, write_comparison
from gendistill.report.measures import MEASURES, check_gates, measure
from gendistill.report.run_files import read_run
from gendistill.report.tables import latex_text
from gendistill.report.write import gap_report
from gendistill_evals import ProtocolFamily

LIKELIHOOD, GENERATION = ProtocolFamily.LIKELIHOOD, ProtocolFamily.GENERATION
TEACHER = {"quiz": ([1] * 200, [1] * 200)}
# ranks well and writes badly, and the other way around: 40 items apart under each protocol
ONE = {"quiz": ([1] * 20, [1] * 20), "sums": (None, [1] * 4)}
RANKS = {"quiz": ([1] * 180 + [0] * 20, [1] * 100 + [0] * 100)}
WRITES = {"quiz": ([1] * 140 + [0] * 60, [1] * 140 + [0] * 60)}


def recipe(mixer="kda", lr=0.001, stages="distill"):
    return f"schema: 1\nname: x\nstudent: {{mixer: {mixer}}}\nstages:\n  {stages}: {{lr: {lr}}}\n"


@pytest.fixture
def two(make_run):
    """Two runs that differ in their mixer alone."""
    folders = [
        make_run("kda-3", teacher=TEACHER, student=RANKS),
        make_run("gdn_3", teacher=TEACHER, student=WRITES),
    ]
    for folder, mixer in zip(folders, ("kda", "gdn"), strict=True):
        (folder / "recipe.yaml").write_text(recipe(mixer))
    return folders


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (recipe(), recipe(), {}),
        (recipe(), recipe().replace("name: x", "name: y"), {}),
        (recipe(), recipe("gdn"), {"student.mixer": ("kda", "gdn")}),
        (recipe(), recipe(lr=0.5), {"stages.distill.lr": ("0.001", "0.5")}),
        (recipe(), recipe(stages="project"), {"stages": ("distill", "project")}),
        (recipe(), recipe() + "seed: 7\n", {"seed": ("default", "7")}),
    ],
)
def test_settings_that_differ_are_found(make_run, first, second, found):
    runs = []
    for name, text in (("a", first), ("b", second)):
        folder = make_run(name)
        (folder / "recipe.yaml").write_text(text)
        runs.append(read_run(folder))
    assert {setting.name: setting.values for setting in differing_settings(runs)} == found


def test_the_effect_of_a_choice_is_the_difference_of_the_two_students(two):
    runs = [read_run(folder) for folder in two]
    reports = [gap_report(run) for run in runs]
    (effect,) = single_effects(runs, reports, differing_settings(runs))
    assert (effect.setting, effect.change) == ("student.mixer", ("kda", "gdn"))
    assert effect.by_family[LIKELIHOOD].value == pytest.approx(-20)
    assert effect.by_family[GENERATION].value == pytest.approx(20)
    assert effect.by_family[GENERATION].low > 0


def test_runs_that_differ_in_two_settings_have_no_effect_of_one(two):
    (two[1] / "recipe.yaml").write_text(recipe("gdn", lr=0.5))
    runs = [read_run(folder) for folder in two]
    assert single_effects(runs, [gap_report(run) for run in runs], differing_settings(runs)) == []


def test_an_inversion_beyond_noise_is_said(two):
    comparison = compare_reports(two)
    found = disagreements(comparison)
    assert [each.sure for each in found] == [True]
    first, second, last = headline(comparison, found)
    assert first.startswith("Writing their answers, gdn_3 comes first (-30.0 points to its teacher")
    assert first.endswith("surely before kda-3.")
    assert second.startswith("By log-likelihood, kda-3 comes first (-10.0 points to its teacher")
    assert last.startswith("1 of 1 pair of students change places")
    assert last.endswith("1 of them beyond noise.")


def test_an_inversion_within_noise_is_not_claimed(make_run):
    close = {"quiz": ([1] * 179 + [0] * 21, [1] * 101 + [0] * 99)}
    folders = [make_run("a", teacher=TEACHER, student=RANKS), make_run("b", teacher=TEACHER, student=close)]
    comparison = compare_reports(folders)
    found = disagreements(comparison)
    assert [each.sure for each in found] == [False]
    sentences = headline(comparison, found)
    assert "b comes first" in sentences[0]
    assert sentences[0].endswith("which a cannot be told from.")
    assert sentences[-1].endswith("none of them beyond noise.")


def test_every_form_is_written_and_names_stay_as_they_are(two, tmp_path):
    paths = write_comparison(compare_reports(two), tmp_path / "out", serif=True, width=3.3)
    page = paths.page.read_text()
    assert "kda-3" in page
    assert "kda\N{MINUS SIGN}3" not in page
    assert "\N{MINUS SIGN}30.0" in page
    assert {path.name for path in paths.figures} == {
        f"{name}.{kind}" for name in ("scatter", "effects") for kind in ("png", "svg", "pdf")
    }
    rows = list(csv.DictReader(io.StringIO(paths.csv.read_text())))
    assert [row["student.mixer"] for row in rows] == ["kda", "gdn"]
    assert float(rows[1]["gap_generation"]) == pytest.approx(-30)
    latex = paths.latex.read_text()
    assert "\\toprule" in latex
    assert "\\bottomrule" in latex
    assert "gdn\\_3" in latex
    assert "kda-3" in latex
    assert "$-$30.0" in latex
    assert "student.mixer" in paths.markdown.read_text()


def test_figures_have_the_width_that_is_asked_for(two, tmp_path):
    paths = write_comparison(compare_reports(two), tmp_path / "out", width=3.3)
    for path in paths.figures:
        if path.suffix == ".svg":
            width = re.search(r'<svg[^>]* width="([0-9.]+)pt"', path.read_text(), re.DOTALL)
            assert width
            assert float(width[1]) == pytest.approx(3.3 * 72)
        if path.suffix == ".pdf":
            box = re.search(rb"/MediaBox \[ ?0 0 ([0-9.]+) ", path.read_bytes())
            assert box
            assert float(box[1]) == pytest.approx(3.3 * 72)


def test_serifs_change_the_letters(two, tmp_path):
    plain = write_comparison(compare_reports(two), tmp_path / "plain")
    serif = write_comparison(compare_reports(two), tmp_path / "serif", serif=True)
    drawn = zip(plain.figures, serif.figures, strict=True)
    assert all(one.read_bytes() != other.read_bytes() for one, other in drawn)
    assert any(b"STIX" in path.read_bytes() for path in serif.figures if path.suffix == ".pdf")


def test_the_page_of_several_is_not_written_into_a_run(two):
    with pytest.raises(ReportError, match="a run's own"):
        write_comparison(compare_reports(two), two[0])


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("50% & a_b #1 $x$ {y}", r"50\% \& a\_b \#1 \$x\$ \{y\}"),
        ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"),
        ("-3.0 [-4, +1]", "$-$3.0 {[}$-$4, +1{]}"),
        ("gdn-3of4", "gdn-3of4"),
    ],
)
def test_latex_sets_text_as_it_is(text, written):
    assert latex_text(text) == written


MEASURED = {
    "gap": 50.0,
    "quiz.gap": 50.0,
    "likelihood_gap": 10.0,
    "hidden_gap": 40.0,
    "kept": 50.0,
    "accuracy": 50.0,
    "kl": 0.8,
    "perplexity_ratio": 2.2255,
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_gate_measures_what_it_names(make_run, name):
    run = read_run(make_run(teacher=TEACHER, student=RANKS))
    value = measure(parse_gate(f"{name}<=1", MEASURES), run, gap_report(run))
    assert value == pytest.approx(MEASURED[name], rel=1e-3)


@pytest.mark.parametrize(
    ("gates", "error", "says"),
    [
        (["gap<=50", "kl<1"], None, ""),
        (["gap<=49.9"], GateError, "gap"),
        (["kl<1", "quiz.kept>=90"], GateError, "kept"),
        (["sums.gap<=3"], RecipeError, 'no task "sums"; tasks: quiz'),
        (["quiz.kl<=3"], RecipeError, "of the whole run"),
        (["gpa<=3"], RecipeError, 'did you mean "gap"'),
    ],
)
def test_gates_hold_or_say_why_not(make_run, gates, error, says):
    run = read_run(make_run(teacher=TEACHER, student=RANKS))
    if error is None:
        assert len(check_gates(gates, run, gap_report(run))) == len(gates)
        return
    with pytest.raises(error) as raised:
        check_gates(gates, run, gap_report(run))
    assert says in str(raised.value)


@pytest.mark.parametrize(("gate", "code"), [("gap<=50", 0), ("gap<=3", 3), ("gpa<=3", 2), ("quiz.gap<=3", 3)])
def test_the_command_ends_with_three_where_a_gate_is_not_met(make_run, capsys, gate, code):
    folder = make_run(teacher=TEACHER, student=RANKS)
    assert main(["report", str(folder), "--gate", gate]) == code
    said = capsys.readouterr()
    assert (folder / "report/index.html").exists() == (code != 2)
    if code == 3:
        assert "gate not met" in said.err


def test_the_command_writes_the_page_of_several_beside_them(two, capsys):
    assert main(["report", *map(str, two)]) == 0
    assert str(two[0].parent / "comparison" / "index.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "x"], "--out is for the page of several runs, and one is given"),
        (["--out", "x", "--json"], "with --json none is written"),
    ],
)
def test_a_folder_that_nothing_would_be_written_to_is_refused(make_run, words, says, capsys):
    assert main(["report", str(make_run()), *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("width", ["0.5", "nan", "wide"])
def test_a_width_that_is_none_is_refused(make_run, width, capsys):
    assert main(["report", str(make_run()), "--width", width]) == 2
    assert "a width of 1 to 40 inches" in capsys.readouterr().err


def test_every_run_and_gate_that_is_not_met_is_named(make_run, capsys):
    runs = [make_run("one"), make_run("two"), make_run("three", teacher=ONE, student=ONE)]
    assert main(["report", *map(str, runs), "--gate", "gap<=3", "--gate", "kept>=99"]) == 3
    said = capsys.readouterr().err
    assert "2 of 3 runs" in said
    for run in runs[:2]:
        assert f"{run}: gap<=3: gap is 32.5; kept>=99: kept is" in said
    assert str(runs[2]) not in said


def test_items_that_all_share_a_question_are_refused(make_run):
    run = make_run()
    for role in ("teacher", "student"):
        share(run, role, "one")
    with pytest.raises(ReportError, match="all 20 items share one question"):
        gap_report(read_run(run))


def test_subjects_of_few_questions_have_wide_intervals(make_run):
    run = make_run()
    (before,) = [rows for task, protocol, rows in tables_of(run, "a") if protocol == "generation"]
    for role in ("teacher", "student"):
        share(run, role, None)
    (after,) = [rows for task, protocol, rows in tables_of(run, "a") if protocol == "generation"]
    assert after[0].high - after[0].low > 1.1 * (before[0].high - before[0].low)


def share(run, role, group):
    path = run / "eval" / role / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["group"] = group or f"{place // 2}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tables_of(run, subject):
    files = read_run(run)
    for row in files.samples["student"]:
        row["subject"] = subject
    return [each for each in subject_tables(files, gap_report(files)) if each[0] == "quiz"]


def test_runs_that_wrote_under_other_protocols_are_not_ranked(two):
    for role in ("teacher", "student"):
        folder = two[1] / "eval" / role
        for path in (folder / "results.json", folder / "samples.jsonl"):
            path.write_text(path.read_text().replace('"generation"', '"generation_letter"'))
    with pytest.raises(ReportError, match="generation by generation / generation_letter"):
        compare_reports(two)

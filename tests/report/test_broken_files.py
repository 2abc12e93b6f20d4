"""Whatever the files of a run folder hold, the report is written or refused by name; it never breaks."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest

from gendistill.errors import ReportError
from gendistill.report import GapReport, compare_reports, render_terminal, write_report
from gendistill.report.html import render_page
from gendistill.report.plots import plot_run
from gendistill.report.run_files import read_run
from gendistill.report.tables import render_csv, render_markdown
from gendistill.report.write import gap_report

pytestmark = pytest.mark.usefixtures("quick_figures")

DEEP = "[" * 100_000
HUGE = 10**400
JSON_FILES = (
    "manifest.json",
    "convert/plan.json",
    "convert/probe.json",
    "stages/distill/result.json",
    "eval/teacher/results.json",
    "eval/student/results.json",
)
LINE_FILES = (
    "stages/distill/metrics.jsonl",
    "eval/student/samples.jsonl",
    "eval/teacher/transcripts.jsonl",
)
PLAN = {
    "tensors": [{"name": "a", "origin": "copied", "sources": ["x"]}],
    "dropped": [{"name": "z", "reason": "unused"}],
}


@pytest.fixture
def run_dir(make_run):
    """A complete run."""
    run_dir = make_run()
    (run_dir / "convert/plan.json").write_text(json.dumps(PLAN))
    return run_dir


def everything(run_dir: Path, *, figures: bool = False) -> None:
    """Do what ``gendistill report`` does, without writing."""
    run = read_run(run_dir)
    report = gap_report(run)
    text = render_page(run, report, plot_run(run, report) if figures else {})
    text += render_markdown([report, report]) + render_csv([report])
    text.encode("utf-8", errors="replace")
    json.dumps(report.to_json(), allow_nan=False)


def refused(run_dir: Path, name: str) -> ReportError:
    with pytest.raises(ReportError) as caught:
        everything(run_dir)
    assert (caught.value.where or "").startswith(str(run_dir / name))
    assert caught.value.hint
    return caught.value


def change(content, path, value):
    """Set what is at a path; ``...`` deletes it."""
    *parents, last = path
    for step in parents:
        content = content[step]
    if value is ...:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"half": ',
        "[1, 2]",
        '"text"',
        "7",
        "true",
        DEEP,
        '{"a":' * 100_000,
        "NaN",
        "\x00\x01",
        "{}{}",
    ],
    ids=["empty", "brace", "cut", "list", "text", "number", "bool", "deep", "deeper", "nan", "binary", "two"],
)
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_that_is_not_an_object_is_named(run_dir, name, text):
    (run_dir / name).write_text(text)
    refused(run_dir, name)


@pytest.mark.parametrize("name", [*JSON_FILES, *LINE_FILES[1:], "recipe.yaml"])
@pytest.mark.parametrize("kind", ["binary", "folder"])
def test_a_file_that_cannot_be_read_is_named(run_dir, name, kind):
    (run_dir / name).unlink()
    if kind == "folder":
        (run_dir / name).mkdir()
    else:
        (run_dir / name).write_bytes(b"\xff\xfe\x00{}\n")
    refused(run_dir, name)


@pytest.mark.parametrize("line", ["{", "[]", "1", '"x"', "null", DEEP, "NaN", "{}", '{"id": 1}', "\x00"])
@pytest.mark.parametrize("name", LINE_FILES[1:])
def test_a_broken_line_is_named_with_its_number(run_dir, name, line):
    lines = (run_dir / name).read_text().splitlines()
    (run_dir / name).write_text("\n".join([*lines, "", line]) + "\n")
    error = refused(run_dir, name)
    assert str(len(lines) + 2) in f"{error.where} {error.message}"


WRONG = [
    ("manifest.json", ("name",), 7),
    ("manifest.json", ("teacher",), "org/teacher"),
    ("manifest.json", ("teacher", "spec"), ["org/teacher"]),
    ("manifest.json", ("teacher", "num_parameters"), "135M"),
    ("manifest.json", ("teacher", "num_parameters"), True),
    ("manifest.json", ("teacher", "num_layers"), -4),
    ("manifest.json", ("teacher", "num_layers"), ...),
    ("manifest.json", ("student",), []),
    ("manifest.json", ("student", "placement"), "kda"),
    ("manifest.json", ("student", "placement"), ["kda", "gdn"]),
    ("manifest.json", ("student", "placement"), [["kda"]]),
    ("manifest.json", ("student", "placement"), [0]),
    ("manifest.json", ("student", "placement"), ["kda"] * 100_000),
    ("manifest.json", ("student", "num_parameters"), 1.5e8),
    ("manifest.json", ("cache_bytes",), {}),
    ("manifest.json", ("cache_bytes", 0), 512),
    ("manifest.json", ("cache_bytes", 0, "teacher"), 0),
    ("manifest.json", ("cache_bytes", 0, "student"), HUGE),
    ("manifest.json", ("cache_bytes", 0, "tokens"), "512"),
    ("manifest.json", ("versions",), ["torch"]),
    ("manifest.json", ("versions", "torch"), 2.13),
    ("manifest.json", ("warnings",), "one"),
    ("manifest.json", ("warnings",), [1]),
    ("manifest.json", ("command",), ["gendistill", "run"]),
    ("manifest.json", ("date",), 20260102),
    ("convert/probe.json", ("kl",), "4.0"),
    ("convert/probe.json", ("kl",), True),
    ("convert/probe.json", ("kl",), None),
    ("convert/probe.json", ("kl",), ...),
    ("convert/probe.json", ("kl",), math.nan),
    ("convert/probe.json", ("student_ce",), math.inf),
    ("convert/probe.json", ("ln_vocab",), HUGE),
    ("convert/probe.json", ("num_tokens",), -1),
    ("convert/probe.json", ("num_tokens",), 1.5),
    ("convert/probe.json", ("layers",), {"0": {}}),
    ("convert/probe.json", ("layers", 0), 0),
    ("convert/probe.json", ("layers", 0, "layer"), "0"),
    ("convert/probe.json", ("layers", 0, "cosine"), "half"),
    ("convert/plan.json", ("tensors",), {}),
    ("convert/plan.json", ("tensors", 0), "a"),
    ("convert/plan.json", ("tensors", 0, "origin"), ["copied"]),
    ("convert/plan.json", ("tensors", 0, "sources"), "x"),
    ("convert/plan.json", ("dropped",), ...),
    ("convert/plan.json", ("dropped", 0, "name"), 3),
    ("stages/distill/result.json", ("objective",), None),
    ("stages/distill/result.json", ("steps",), "10"),
    ("stages/distill/result.json", ("steps",), True),
    ("stages/distill/result.json", ("tokens",), [5120]),
    ("stages/distill/result.json", ("seconds",), ...),
    ("stages/distill/result.json", ("loss_first",), None),
    ("stages/distill/result.json", ("loss_last",), 1e300),
    ("stages/distill/result.json", ("heldout",), [1]),
    ("stages/distill/result.json", ("heldout", "kl"), {}),
    ("stages/distill/result.json", ("heldout", "top1_agreement"), "0.5"),
    ("eval/student/results.json", ("schema",), 99),
    ("eval/student/results.json", ("schema",), [1]),
    ("eval/student/results.json", ("model",), 1),
    ("eval/student/results.json", ("settings",), "greedy"),
    ("eval/student/results.json", ("settings", "deep"), json.loads("[" * 400 + "]" * 400)),
    ("eval/student/results.json", ("tasks",), {}),
    ("eval/student/results.json", ("tasks",), None),
    ("eval/student/results.json", ("tasks", 0), "quiz"),
    ("eval/student/results.json", ("tasks", 0, "task"), ["quiz"]),
    ("eval/student/results.json", ("tasks", 0, "task"), ...),
    ("eval/student/results.json", ("tasks", 1, "task"), "quiz"),
    ("eval/student/results.json", ("tasks", 0, "metric"), 3),
    ("eval/student/results.json", ("tasks", 0, "n"), "20"),
    ("eval/student/results.json", ("tasks", 0, "n"), 0),
    ("eval/student/results.json", ("tasks", 0, "n"), -20),
    ("eval/student/results.json", ("tasks", 0, "limit"), "20"),
    ("eval/student/results.json", ("tasks", 0, "limit"), 0),
    ("eval/student/results.json", ("tasks", 0, "limit"), True),
    ("eval/student/results.json", ("tasks", 0, "likelihood"), 0.6),
    ("eval/student/results.json", ("tasks", 0, "likelihood"), [0.6]),
    ("eval/student/results.json", ("tasks", 0, "likelihood", "value"), "0.6"),
    ("eval/student/results.json", ("tasks", 0, "likelihood", "value"), None),
    ("eval/student/results.json", ("tasks", 0, "likelihood", "n"), ...),
    ("eval/student/results.json", ("tasks", 0, "likelihood_reason"), {}),
    ("eval/student/results.json", ("tasks", 0, "generation", "value"), math.nan),
    ("eval/student/results.json", ("tasks", 0, "generation", "eos_rate"), None),
    ("eval/student/results.json", ("tasks", 0, "generation", "truncated"), "2"),
    ("eval/student/results.json", ("tasks", 0, "generation", "mean_new_tokens"), ...),
]
WRONG_LINES = [
    ("eval/student/samples.jsonl", ("task",), None),
    ("eval/student/samples.jsonl", ("id",), [1]),
    ("eval/student/samples.jsonl", ("id",), ...),
    ("eval/student/samples.jsonl", ("prompt",), 5),
    ("eval/student/samples.jsonl", ("options",), "alpha beta"),
    ("eval/student/samples.jsonl", ("options",), [1, 2]),
    ("eval/student/samples.jsonl", ("likelihood",), True),
    ("eval/student/samples.jsonl", ("likelihood", "correct"), "yes"),
    ("eval/student/samples.jsonl", ("likelihood", "correct"), 1),
    ("eval/student/samples.jsonl", ("likelihood", "correct"), ...),
    ("eval/student/samples.jsonl", ("generation",), []),
    ("eval/student/samples.jsonl", ("generation", "text"), None),
    ("eval/student/samples.jsonl", ("generation", "extracted"), {}),
    ("eval/teacher/transcripts.jsonl", ("question",), ["What?"]),
    ("eval/teacher/transcripts.jsonl", ("answer",), None),
    ("eval/teacher/transcripts.jsonl", ("answer",), ...),
    ("eval/teacher/transcripts.jsonl", ("num_tokens",), "3"),
    ("eval/teacher/transcripts.jsonl", ("truncated",), 0),
    ("eval/teacher/transcripts.jsonl", ("repeated_4gram_share",), None),
    ("eval/teacher/transcripts.jsonl", ("teacher_nll",), "0.25"),
    ("eval/teacher/transcripts.jsonl", ("teacher_nll",), ...),
]


def case_id(case):
    name, path, value = case
    shown = "missing" if value is ... else repr(value)
    return f"{name}:{'.'.join(map(str, path))}={shown:.20}"


@pytest.mark.parametrize("case", WRONG, ids=case_id)
def test_a_value_of_another_type_is_named(run_dir, case):
    name, path, value = case
    content = json.loads((run_dir / name).read_text())
    change(content, path, value)
    (run_dir / name).write_text(json.dumps(content))
    refused(run_dir, name)


@pytest.mark.parametrize("case", WRONG_LINES, ids=case_id)
def test_a_value_of_another_type_in_a_line_is_named(run_dir, case):
    name, path, value = case
    rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    change(rows[-1 if "transcripts" in name else 3], path, value)
    (run_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert f"line {len(rows) if 'transcripts' in name else 4}." in refused(run_dir, name).message


def test_the_message_gives_file_place_and_next_step(run_dir, edit_json):
    edit_json(run_dir / "manifest.json", lambda content: content["student"].update(placement=["kda", "gdn"]))
    error = refused(run_dir, "manifest.json")
    assert "student.placement.1" in error.message
    assert "gdn" in error.message


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("manifest.json", ("unknown",), {"deep": [1, "\ud800", None]}),
        ("manifest.json", ("name",), "half \ud800 of a pair"),
        ("manifest.json", ("teacher",), None),
        ("manifest.json", ("student", "placement"), []),
        ("manifest.json", ("cache_bytes",), []),
        ("manifest.json", ("warnings",), []),
        ("manifest.json", ("versions",), {}),
        ("convert/probe.json", ("kl",), 4),
        ("convert/probe.json", ("kl",), 0),
        ("convert/probe.json", ("layers",), []),
        ("convert/probe.json", ("layers", 0, "cosine"), None),
        ("convert/probe.json", ("layers", 0, "layer"), 99),
        ("stages/distill/result.json", ("heldout",), None),
        ("stages/distill/result.json", ("heldout",), ...),
        ("stages/distill/result.json", ("loss_first",), 1),
        ("stages/distill/result.json", ("steps",), 0),
        ("eval/student/results.json", ("tasks",), []),
        ("eval/student/results.json", ("more",), [1]),
        ("eval/student/results.json", ("tasks", 0, "likelihood"), None),
        ("eval/student/results.json", ("model",), "\udfff"),
        ("eval/student/results.json", ("transcripts",), 3),
    ],
)
def test_what_may_be_absent_or_whole_is_reported(run_dir, name, path, value):
    content = json.loads((run_dir / name).read_text())
    change(content, path, value)
    (run_dir / name).write_text(json.dumps(content))
    paths = write_report(run_dir)
    GapReport.from_json(json.loads(paths.gap.read_text()))
    assert paths.page.read_bytes().decode("utf-8")


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe\x00",
        b"[1]",
        b"NaN",
        DEEP.encode(),
        b'{"loss": 1.0}',
        b'{"step": "5", "loss": 1.0}',
        b'{"step": true, "loss": 1.0}',
        b'{"step": -1}',
        b'{"step": 1.5}',
        b'{"step": 5, "loss": "high"}',
        b'{"step": 5, "loss": NaN}',
        b'{"step": 5, "loss": 1e999}',
        b'{"step": 5, "heldout": 3}',
        b'{"step": 5, "heldout": {"kl": null}}',
    ],
)
def test_a_broken_line_of_metrics_is_left_out_and_counted(run_dir, line):
    path = run_dir / "stages/distill/metrics.jsonl"
    whole = read_run(run_dir).stages[1].metrics
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:4], line, line, *lines[4:]]))
    run = read_run(run_dir)
    assert run.stages[1].metrics == whole
    (said,) = run.warnings
    assert "stage distill: 2 of 12 lines of metrics.jsonl could not be read" in said
    assert said in render_page(run, gap_report(run), {})


@pytest.mark.parametrize(
    "text",
    [
        "stages: [project, distill]",
        "stages: 3",
        "- a\n- b",
        "eval: all",
        "eval: [bootstrap]",
        "a: [",
        "a: !!python/name:os.system x",
        "a: 1\na: 2",
        "[" * 100_000,
        "\x00",
        "{? [a] : b}",
    ],
)
def test_a_broken_recipe_is_named(run_dir, text):
    (run_dir / "recipe.yaml").write_text(text)
    refused(run_dir, "recipe.yaml")


@pytest.mark.parametrize(
    "text", ["", "stages:\n", "eval:\n", "stages: {}\neval: {}\n", "stages: {2020-01-01: {}}"]
)
def test_a_recipe_may_lack_what_the_report_uses(run_dir, text):
    (run_dir / "recipe.yaml").write_text(text)
    everything(run_dir)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("name",), 1),
        (("name",), ...),
        (("tasks",), {}),
        (("tasks", 0), []),
        (("tasks", 0, "n"), "20"),
        (("tasks", 0, "gap"), None),
        (("tasks", 0, "gap", "likelihood"), 0.5),
        (("tasks", 0, "gap", "likelihood", "low"), "x"),
        (("tasks", 0, "gap", "likelihood", "low"), ...),
        (("tasks", 0, "hidden", "extra"), 1),
        (("settings",), []),
        (("schema",), None),
    ],
)
def test_a_changed_gap_file_is_refused(run_dir, path, value):
    content = gap_report(read_run(run_dir)).to_json()
    content = json.loads(json.dumps(content))
    change(content, path, value)
    with pytest.raises(ReportError, match=r"gap\.json"):
        GapReport.from_json(content)


@pytest.mark.parametrize("content", [[], None, "text", 3])
def test_a_gap_file_that_is_not_an_object_is_refused(content):
    with pytest.raises(ReportError, match="schema"):
        GapReport.from_json(content)


VALUES = [
    *(None, True, False, 0, 1, -1, 7, 10**18, HUGE, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf),
    *("", "x", "\ud800", "\x1b[31m", "[/red]", "$\\frac", [], {}, [[]], [None], {"a": 1}),
]


def mutate(value, chance: random.Random):
    """Return JSON content with one place changed, and whether a place was found."""
    places = [()]
    pending = [((), value)]
    while pending:
        path, current = pending.pop()
        pairs = current.items() if isinstance(current, dict) else enumerate(current)
        for key, child in pairs:
            places.append((*path, key))
            if isinstance(child, dict | list):
                pending.append(((*path, key), child))
    path = chance.choice(places)
    if not path:
        return chance.choice(VALUES)
    changed = copy.deepcopy(value)
    *parents, last = path
    parent = changed
    for step in parents:
        parent = parent[step]
    how = chance.choice(["replace", "replace", "delete", "twice", "swap"])
    if how == "delete":
        del parent[last]
    elif how == "twice" and isinstance(parent, list):
        parent.append(parent[last])
    elif how == "swap":
        parent[last] = [parent[last]] if chance.random() < 0.5 else str(parent[last])
    else:
        parent[last] = chance.choice(VALUES)
    return changed


def mutate_file(path: Path, chance: random.Random) -> None:
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        row = chance.randrange(len(lines))
        lines[row] = json.dumps(mutate(json.loads(lines[row]), chance))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(mutate(json.loads(path.read_text()), chance)))
    else:
        text = path.read_text()
        at = chance.randrange(len(text))
        path.write_text(
            text[:at] + chance.choice([":", "[", "- ", "\n", "&a *a", "?", "\t", "x"]) + text[at + 1 :]
        )


def test_random_changes_are_reported_or_refused(run_dir):
    """400 changes of one place; a refusal names something of the run and says what to do."""
    chance = random.Random(14)
    names = [*JSON_FILES, *LINE_FILES, "recipe.yaml"]
    whole = {name: (run_dir / name).read_bytes() for name in names}
    refused, unclear = 0, []
    for number in range(400):
        name = names[number % len(names)]
        mutate_file(run_dir / name, chance)
        try:
            everything(run_dir, figures=number % 40 == 0)
        except ReportError as error:
            unclear += [] if error.where and error.hint else [str(error)]
            refused += 1
        (run_dir / name).write_bytes(whole[name])
    assert unclear == []
    assert 50 < refused < 350


def test_comparisons_and_terminal_name_a_broken_file_too(run_dir, make_run):
    other = make_run("other")
    (other / "manifest.json").write_text("[]")
    for act in (lambda: compare_reports([run_dir, other]), lambda: render_terminal(other)):
        with pytest.raises(ReportError) as caught:
            act()
        assert caught.value.where == str(other / "manifest.json")


@pytest.mark.parametrize("link", ["convert", "stages/distill", "eval/student", "manifest.json", "stages"])
def test_links_are_followed_and_dangling_ones_are_named(run_dir, tmp_path, link):
    before = gap_report(read_run(run_dir))
    store = tmp_path / ".store"
    store.mkdir()
    shutil.move(run_dir / link, store / "moved")
    (run_dir / link).symlink_to(store / "moved")
    run = read_run(run_dir)
    assert gap_report(run) == before
    assert len(run.heldout) == 3
    shutil.move(store / "moved", store / "gone")
    error = refused(run_dir, link)
    assert "output is gone" in error.message
    assert "same command" in error.hint


def test_a_pipe_in_a_files_place_is_not_waited_for(run_dir):
    (run_dir / "manifest.json").unlink()
    os.mkfifo(run_dir / "manifest.json")
    assert "not a regular file" in refused(run_dir, "manifest.json").message

"""Text of models, data and people is shown as it is written, and steers neither terminal, page nor table."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from rich.console import Console

from gendistill.report import compare_reports, plots, render_terminal, write_report
from gendistill.report.run_files import read_run
from gendistill.report.tables import render_csv, render_markdown
from gendistill.report.write import gap_report
from gendistill.text import printable

HOSTILE = [
    "[red]x[/red]",
    "[/]",
    "[/bold]",
    "[link=file:///x]y[/link]",
    "back\\",
    ":smile:",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "nul\x00nul",
    "two\nlines",
    "tab\tand\rreturn",
    "\u202eright to left",
    "half \ud800 of a pair",
    "line\u2028separator",
    "<script>alert(1)</script>",
    "</title></style>",
    '" onload="x',
    "{{ 7 * 7 }}{% raw %}",
    "a|b\\|c",
    "=1+1",
    "@sum",
    "-1+1",
    "+cmd|' /C calc'!A0",
    '"quoted", and, commas',
    "$\\frac{",
    "%s %d {task}",
    "!!",
    "日本語 🙂",
    "x" * 100_000,
]


def rename(run_dir, edit_json, text):
    """Put a text in place of every name, answer and question."""
    for role in ("teacher", "student"):
        folder = run_dir / "eval" / role

        def change(content):
            content["model"] = text
            content["settings"]["stop"] = text
            content["tasks"][0].update(task=text, likelihood_reason=text, metric=text)

        edit_json(folder / "results.json", change)
        for name in ("samples.jsonl", "transcripts.jsonl"):
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for row in rows:
                row.update({key: text for key in ("prompt", "question", "answer") if key in row})
                if row.get("task") == "quiz":
                    row.update(task=text, options=[text, text])
                    row["generation"].update(text=text, extracted=text)
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit_json(
        run_dir / "manifest.json",
        lambda content: content.update(name=text, command=text, device=text, warnings=[text]),
    )
    edit_json(run_dir / "manifest.json", lambda content: content["teacher"].update(spec=text))
    edit_json(run_dir / "stages/distill/result.json", lambda content: content.update(objective=text))


def terminal(run_dir):
    console = Console(file=io.StringIO(), width=200, color_system=None, force_terminal=False)
    render_terminal(run_dir, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:24])
def test_hostile_text_is_shown_and_obeyed_nowhere(make_run, edit_json, monkeypatch, text):
    monkeypatch.setattr(plots, "plot_run", lambda run, report, look: {})
    run_dir = make_run()
    rename(run_dir, edit_json, text)
    shown = printable(text)

    lines = terminal(run_dir)
    assert "\x1b" not in lines
    assert "\x00" not in lines
    assert "\u202e" not in lines
    flat = re.sub(r"\s+", "", lines)
    assert re.sub(r"\s+", "", shown)[:60] in flat

    run = read_run(run_dir)
    report = gap_report(run)
    markdown = render_markdown([report])
    assert len(markdown.splitlines()) == 2 + len(report.tasks)
    assert "<script" not in markdown
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines()]
    assert len(set(cells)) == 1

    rows = list(csv.DictReader(io.StringIO(render_csv([report]), newline="")))
    assert [row["task"] for row in rows] == [text, "sums"]
    assert all(row["run"] == text for row in rows)

    paths = write_report(run_dir)
    page = paths.page.read_text()
    assert "<script" not in page
    assert page.count("</title>") == page.count("</style>") == 1
    assert ' onload="' not in page
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", page, re.DOTALL)[0]
    assert json.loads(paths.gap.read_text())["name"] == text.replace("\ud800", "?")


def test_a_run_and_folder_of_markup_can_be_compared(make_run, edit_json):
    first, second = make_run("[red]x[[]red]"), make_run("\x1b[31m<b>|")
    for run_dir in (first, second):
        edit_json(run_dir / "manifest.json", lambda content: content.update(name="[red]x[/red]"))
    text = compare_reports([first, second]).to_markdown()
    assert "[red]x[[]red]" in text
    assert "\x1b" not in text
    assert "<b>" not in text


@pytest.mark.parametrize("text", ["$\\frac{", "$x$", "\x1b[31m\x00", "日本語 🙂 \ud800", "x" * 1000])
def test_names_are_no_formulas_in_figures(make_run, edit_json, text, recwarn):
    run_dir = make_run()
    rename(run_dir, edit_json, text)
    run = read_run(run_dir)
    assert plots.plot_gap(gap_report(run))
    assert plots.plot_stage(run.stages[1])
    assert [str(one.message) for one in recwarn if "Glyph" in str(one.message)] == []


@pytest.mark.parametrize("name", ["[red] $x$ -ünï", "\x1b[31m", "x" * 120])
def test_a_stage_of_any_name_has_its_figure(make_run, name):
    run_dir = make_run()
    (run_dir / "stages/distill").rename(run_dir / "stages" / name)
    paths = write_report(run_dir)
    assert all(path.is_file() for path in paths.figures)
    assert paths.page.read_text().count('alt="Training loss of stage') == 2


def test_a_folder_whose_name_is_not_text_is_reported(make_run):
    run_dir = make_run()
    (run_dir / "manifest.json").write_text("{}")
    odd = run_dir.with_name("odd \udcff name")
    run_dir.rename(odd)
    assert json.loads(write_report(odd).gap.read_text())["name"] == "odd \\udcff name"


def test_many_tasks_have_a_figure_that_says_what_it_leaves_out(make_run):
    scores = {f"task {number}": ([1, 0], [1, 0]) for number in range(400)}
    run = read_run(make_run(teacher=scores, student=scores))
    gap = plots.plot_gap(gap_report(run))
    assert int.from_bytes(gap.png[20:24]) < 2**16


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [red] text", "plain [red] text"),
        ("a\nb\tc\x00\x1b", "a\\nb\\tc\\x00\\x1b"),
        ("\u202eabc\u2028", "\\u202eabc\\u2028"),
        ("\ud800\udcff", "\\ud800\\udcff"),
        ("日本語 🙂 é", "日本語 🙂 é"),
        ("ab" * 5000, "ab" * 100 + "… (10,000 characters)"),
    ],
)
def test_printable_keeps_letters_and_escapes_what_steers(text, shown):
    assert printable(text) == shown

"""Odd run folders: what is not one, what lacks parts, what cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gendistill.cli.main import main
from gendistill.errors import OutputError, ReportError
from gendistill.report import compare_reports, plots, write_report
from gendistill.report.run_files import read_run


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take most of the time and are tested elsewhere."""
    monkeypatch.setattr(
        plots, "plot_run", lambda run, report, look: {"gap": plots.Drawing(b"png", b"svg", b"pdf")}
    )


@pytest.mark.parametrize("kind", ["file", "nothing", "empty", "dangling", "loop", "long"])
def test_what_is_not_a_run_folder_is_said(tmp_path, kind):
    folder = tmp_path / ("x" * 5000 if kind == "long" else "run")
    if kind == "file":
        folder.write_text("{}")
    elif kind == "empty":
        folder.mkdir()
    elif kind in ("dangling", "loop"):
        folder.symlink_to("nowhere" if kind == "dangling" else "run")
    with pytest.raises(ReportError) as caught:
        read_run(folder)
    assert str(folder)[:200] in caught.value.where
    assert caught.value.hint


def test_a_folder_that_may_not_be_looked_at_is_said(make_run, monkeypatch):
    run_dir = make_run()
    real = Path.stat

    def stat(path, **options):
        if path.name == "probe.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(ReportError, match="Permission denied") as caught:
        read_run(run_dir)
    assert caught.value.where.endswith("probe.json")


@pytest.mark.parametrize(
    "missing", ["eval", "eval/student", "eval/teacher", "stages", "convert", "recipe.yaml"]
)
def test_a_run_that_lacks_a_part_is_reported(make_run, missing, capsys):
    run_dir = make_run()
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["report", str(run_dir)]) == 0
    assert main(["report", str(run_dir), "--json"]) == 0
    assert "wrote" in capsys.readouterr().out


def test_a_linked_run_folder_is_reported_through_the_link(make_run, tmp_path):
    run_dir = make_run()
    (run_dir / "manifest.json").write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    assert write_report(link).page == link / "report/index.html"
    assert read_run(link).name == "demo"


def test_one_run_twice_is_not_a_comparison(make_run, tmp_path):
    run_dir = make_run()
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    for other in (run_dir, run_dir / ".." / "demo", link):
        with pytest.raises(ReportError, match="twice"):
            compare_reports([run_dir, other])


@pytest.mark.parametrize(
    ("field", "value"), [("limit", 3), ("metric", "other"), ("items_sha256", "z"), ("settings", {"x": 1})]
)
def test_runs_scored_otherwise_are_not_compared(make_run, edit_json, field, value, capsys):
    first, second = make_run("first"), make_run("second")
    for role in ("teacher", "student"):
        edit_json(
            second / f"eval/{role}/results.json",
            lambda content: (content if field == "settings" else content["tasks"][0]).update({field: value}),
        )
    assert main(["report", str(first), str(second)]) == 1
    assert "were not scored alike" in capsys.readouterr().err


def test_runs_with_other_tasks_share_a_table(make_run):
    first = make_run("first")
    second = make_run("second", student={"more": ([1, 0], [1, 1])}, teacher={"more": ([1, 0], [1, 0])})
    third = make_run("third", student=None)
    text = compare_reports([first, second, third]).to_markdown()
    for row in ("| first | quiz", "| second | more", "| third | quiz", "both protocols rank"):
        assert row in text


def block_with_file(run_dir):
    (run_dir / "report").write_text("a file")


def block_with_dangling_link(run_dir):
    (run_dir / "report").symlink_to("nowhere/at/all")


def block_page_with_folder(run_dir):
    (run_dir / "report/index.html").mkdir(parents=True)


def block_gap_with_folder(run_dir):
    (run_dir / "report/gap.json/x").mkdir(parents=True)


@pytest.mark.parametrize(
    "block", [block_with_file, block_with_dangling_link, block_page_with_folder, block_gap_with_folder]
)
def test_a_report_folder_that_cannot_be_written_is_named(make_run, block):
    run_dir = make_run()
    block(run_dir)
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(OutputError, match="report") as caught:
        write_report(run_dir)
    assert caught.value.hint
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP]
)
def test_a_failed_write_leaves_the_old_report_whole(make_run, edit_json, monkeypatch, number):
    run_dir = make_run()
    write_report(run_dir)
    before = {path.name: path.read_bytes() for path in (run_dir / "report").iterdir()}
    edit_json(run_dir / "manifest.json", lambda content: content.update(name="another"))
    real = Path.write_bytes

    def write(path, content):
        if "table.md" in path.name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OutputError):
        write_report(run_dir)
    assert {path.name: path.read_bytes() for path in (run_dir / "report").iterdir()} == before


def test_a_new_report_replaces_its_own_files_and_no_others(make_run):
    run_dir = make_run()
    write_report(run_dir)
    folder = run_dir / "report"
    for name in ("loss-gone.png", "cache.png", "cache.svg", "mine.png", "notes.md"):
        (folder / name).write_bytes(b"old")
    write_report(run_dir)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("index.html", "gap.json", "table.md", "table.csv", "table.tex", "gap.png", "gap.svg", "gap.pdf"),
        *("mine.png", "notes.md"),
    }


def test_what_the_run_warned_of_is_on_the_page_and_in_the_terminal(make_run, edit_json, capsys):
    run_dir = make_run()
    said = ["seq_len 32 is longer than the 16 positions", "the chat model is trained outside its template"]
    edit_json(run_dir / "manifest.json", lambda content: content.update(warnings=said))
    assert main(["report", str(run_dir)]) == 0
    shown, page = capsys.readouterr().out, (run_dir / "report/index.html").read_text()
    for warning in said:
        assert f"warn     {warning}" in shown
        assert f'<p class="warning">{warning}</p>' in page


def test_warnings_are_shown_without_scores_and_in_comparisons_too(make_run, edit_json, capsys):
    first, second = make_run("first", teacher=None, student=None), make_run("second")
    edit_json(first / "manifest.json", lambda content: content.update(warnings=["look out"]))
    assert main(["report", str(first), str(second)]) == 0
    assert "warn     first: look out" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_cannot_show_every_letter_is_no_failure(make_run, edit_json, encoding):
    run_dir = make_run()
    edit_json(run_dir / "manifest.json", lambda content: content.update(warnings=["日本語"]))
    done = subprocess.run(
        [sys.executable, "-m", "gendistill", "report", str(run_dir)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u65e5" in done.stdout


def test_a_backend_that_matplotlib_does_not_know_is_named(make_run):
    done = subprocess.run(
        [sys.executable, "-m", "gendistill", "report", str(make_run())],
        env={**os.environ, "MPLBACKEND": "abc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "next: unset MPLBACKEND" in done.stderr
    assert "internal error" not in done.stderr


def test_json_output_is_the_gap_of_every_run(make_run, capsys):
    first, second = make_run("first"), make_run("second")
    assert main(["report", str(first), str(second), "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["first", "second"]


def test_an_error_that_quotes_a_hostile_name_steers_no_terminal(tmp_path, capsys):
    assert main(["report", str(tmp_path / "\x1b[31m\u202e[red]")]) == 1
    shown = capsys.readouterr().err
    assert "\\x1b[31m\\u202e[red]" in shown
    assert "\x1b" not in shown

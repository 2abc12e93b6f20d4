"""Tables of measured results follow their files, and a stale document fails the check."""

from __future__ import annotations

import json
import re

import pytest

from gendistill.errors import ReportError
from gendistill.results import table as results_table
from gendistill.results.table import ResultRow, load_results, main, render_results, write_results_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = (
    ResultRow(
        name="held-out KL left", value=15.2, unit="%", better="lower", bar=25.0, n=64, ci95=(14.0, 16.5)
    ),
    ResultRow(
        name="speed | decode",
        value=1200,
        unit="tok/s",
        better="higher",
        bar=1500,
        peer="other",
        peer_value=900,
    ),
)


@pytest.fixture
def folder(tmp_path):
    fixed = {"command": "make demo", "commit": COMMIT, "date": "2026-01-02", "device": "2 CPU cores"}
    write_results_json(tmp_path / "demo.json", rows=ROWS, versions={"torch": "2.13.0"}, **fixed)
    return tmp_path


def document(folder, inside="old\n"):
    path = folder / "README.md"
    path.write_text(f"# Title\n<!-- results:demo -->\n{inside}<!-- /results -->\ntext after\n")
    return path


def test_written_results_read_back(folder):
    assert load_results(folder / "demo.json").rows == ROWS
    content = json.loads((folder / "demo.json").read_text())
    assert content["schema"] == 1
    assert set(content) == {"schema", "command", "commit", "date", "device", "versions", "rows"}
    row_fields = {"name", "value", "unit", "better", "bar", "peer", "peer_value", "n", "ci95", "note"}
    assert all(set(row) == row_fields for row in content["rows"])


def test_table_marks_bars_met_and_missed(folder):
    text = render_results(load_results(folder / "demo.json"))
    header, _, first, second = text.splitlines()[:4]
    assert "note" not in header
    assert first == "| held-out KL left | 15.2 % | 14 to 16.5 | 64 | ≤ 25 | met |  |"
    assert second == r"| speed \| decode | 1,200 tok/s |  |  | ≥ 1,500 | **missed** | 900 (other) |"
    assert "2 CPU cores with torch 2.13.0, commit 0123456789" in text
    assert "`make demo`" in text


def test_check_fails_exactly_while_a_document_is_stale(folder, capsys):
    path = document(folder)
    arguments = [str(path), "--folder", str(folder)]
    assert main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert "old" in path.read_text()
    assert main(arguments) == 0
    filled = path.read_text()
    assert "15.2 %" in filled
    assert filled.startswith("# Title\n")
    assert filled.endswith("text after\n")
    assert main([*arguments, "--check"]) == 0
    path.write_text(filled.replace("15.2 %", "9.9 %"))
    assert main([*arguments, "--check"]) == 1


def test_a_block_may_choose_its_rows(folder, capsys):
    path = document(folder)
    chosen = path.read_text().replace("results:demo", "results:demo rows=^held-out|^no such")
    path.write_text(chosen)
    arguments = [str(path), "--folder", str(folder)]
    assert main(arguments) == 0
    filled = path.read_text()
    assert "15.2 %" in filled
    assert "decode" not in filled
    assert main([*arguments, "--check"]) == 0
    for rows, problem in (("nothing", "found in the name of no row"), ("(", "not a regular expression")):
        path.write_text(chosen.replace("^held-out|^no such", rows))
        assert main(arguments) == 1
        assert problem in capsys.readouterr().err


def test_a_marker_without_partner_is_refused(folder, capsys):
    path = document(folder)
    path.write_text(path.read_text().replace("<!-- /results -->", ""))
    assert main([str(path), "--folder", str(folder)]) == 1
    assert "no partner" in capsys.readouterr().err


def test_single_numbers_stand_in_sentences(folder, capsys):
    page = folder / "page.md"
    page.write_text(
        "Left: <!-- value:demo held-out KL left -->?<!-- /value -->%,\n"
        "and <!-- peer:demo speed | decode --> <!-- /value -->.\n"
    )
    words = [str(page), "--folder", str(folder)]
    assert main([*words, "--check"]) == 1
    assert main(words) == 0
    text = page.read_text()
    assert "-->15.2<!-- /value -->%" in text
    assert "-->900<!-- /value -->." in text
    assert main([*words, "--check"]) == 0
    page.write_text("<!-- value:demo nothing -->1<!-- /value -->\n")
    assert main(words) == 1
    assert 'has no single row "nothing"' in capsys.readouterr().err
    page.write_text("<!-- value:demo held-out KL left -->1\n")
    assert main(words) == 1
    assert "has no partner" in capsys.readouterr().err


def test_a_missing_results_file_is_named(folder, capsys):
    path = document(folder)
    path.write_text(path.read_text().replace("results:demo", "results:other"))
    assert main([str(path), "--folder", str(folder)]) == 1
    assert "other.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": 2}, "schema"),
        ({"commit": "not a commit"}, "commit"),
        ({"date": "yesterday"}, "date"),
        ({"rows": []}, "rows"),
        ({"extra": 1}, "extra"),
    ],
)
def test_results_outside_the_schema_are_refused(folder, edit_json, change, problem):
    edit_json(folder / "demo.json", lambda content: content.update(change))
    with pytest.raises(ReportError, match=problem):
        load_results(folder / "demo.json")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"value": "15"}, "value"),
        ({"better": "big"}, "better"),
        ({"ci95": [20.0, 30.0]}, "does not contain"),
        ({"peer": "someone"}, "together"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_rows_outside_the_schema_are_refused(folder, edit_json, change, problem):
    edit_json(folder / "demo.json", lambda content: content["rows"][0].update(change))
    with pytest.raises(ReportError, match=problem):
        load_results(folder / "demo.json")


def test_commit_date_and_versions_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "source_commit", lambda: COMMIT)
    results = write_results_json(tmp_path / "new.json", command="make demo", device="CPU", rows=ROWS)
    assert results.commit == COMMIT
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results.date)
    assert {"gendistill", "torch", "transformers"} <= results.versions.keys()


def test_code_without_a_commit_makes_no_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "source_commit", lambda: None)
    with pytest.raises(ReportError, match="git does not know the commit"):
        write_results_json(tmp_path / "new.json", command="make demo", device="CPU", rows=ROWS)

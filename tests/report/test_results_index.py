"""The index of the results lists every file, and a stale or silent index fails the check."""

import json
from pathlib import Path

import pytest

from gendistill.results.index import main
from gendistill.results.table import ResultRow, write_results_json

ROOT = Path(__file__).parents[2]
EMPTY = "# Results\n<!-- index -->\n<!-- /index -->\nafter\n"


@pytest.fixture
def page(tmp_path):
    write_results_json(
        tmp_path / "demo.json",
        command="make demo",
        device="2 CPU cores",
        rows=[
            ResultRow(name="kl", value=1.0, unit="nats/token", better="lower", bar=2.0),
            ResultRow(name="speed", value=1.0, unit="tok/s", better="higher", bar=2.0),
            ResultRow(name="time", value=1.0, unit="s", better="lower"),
        ],
        commit="0123456789abcdef",
        date="2026-01-02",
        versions={},
    )
    page = tmp_path / "README.md"
    page.write_text(EMPTY)
    return page


def test_the_index_of_this_repository_is_up_to_date():
    page = ROOT / "docs" / "results" / "README.md"
    assert main([str(page), "--check"]) == 0
    text = page.read_text(encoding="utf-8")
    assert all(f"({path.name})" in text for path in page.parent.glob("*.json"))


def test_a_row_says_what_the_file_holds(page, capsys):
    assert main([str(page)]) == 1
    assert "nothing is said about demo.json" in capsys.readouterr().err
    row = page.read_text().splitlines()[4]
    assert (
        row == "| [demo.json](demo.json) |  | 3 | 1 met, 1 missed | 2 CPU cores | 2026-01-02 | 0123456789 |"
    )


def test_what_is_written_by_hand_stays(page):
    main([str(page)])
    page.write_text(page.read_text().replace("(demo.json) |  |", "(demo.json) | the demo |"))
    assert main([str(page), "--check"]) == 0
    (page.parent / "tuning.json").write_text(json.dumps({"device": "a GPU"}))
    assert main([str(page), "--check"]) == 1
    main([str(page)])
    assert "| the demo | 3 |" in page.read_text()
    assert "| [tuning.json](tuning.json) |  |  |  | a GPU |  |  |" in page.read_text()
    assert page.read_text().endswith("<!-- /index -->\nafter\n")

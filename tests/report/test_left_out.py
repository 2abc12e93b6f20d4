"""The page shows the rows that a stage left out."""

import json

from gendistill.report.html import render_page
from gendistill.report.run_files import read_run
from gendistill.report.write import gap_report

DATA = {
    "sources": {
        "chat": {"rows": 1200, "left_out": {"a message is blank": 300, "<b>odd</b>": 7}},
        "text": {"rows": 90, "left_out": {}},
    },
    "notes": ["data.chat: 3 of 3 samples do not begin with <s>"],
}


def test_rows_left_out_are_on_the_page_with_their_reasons(make_run):
    folder = make_run()
    path = next(folder.rglob("result.json"))
    plain = render_page(run := read_run(folder), gap_report(run), {})
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": DATA}))
    page = render_page(run := read_run(folder), gap_report(run), {})
    assert "rows left out by" not in plain
    assert page.count("rows left out by") == 1
    assert "1,200" in page
    assert "307" in page
    assert "300 a message is blank, 7 &lt;b&gt;odd&lt;/b&gt;" in page
    assert "do not begin with &lt;s&gt;" in page

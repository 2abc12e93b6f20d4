"""What a stage says of the rows that it did not train on: on the screen and in its result."""

import io
import json
from dataclasses import asdict

import pytest

from gendistill.training.left_out import data_record, heavy_losses, left_out_lines


class Stream:
    """Rows of three sources."""

    notes = ("data.a: odd",)
    dropped = {  # noqa: RUF012
        "a": {"rows": 100, "a message is blank": 10},
        "b": {"rows": 100, "blank text": 8, "a row is not JSON": 3},
        "c": {"rows": 50},
    }


def test_losses_are_listed_with_reasons_and_are_a_warning_beyond_a_tenth():
    assert left_out_lines(Stream()) == [
        "data.a: 10 of 100 rows read are left out: 10 a message is blank",
        "data.b: 11 of 100 rows read are left out: 3 a row is not JSON, 8 blank text",
    ]
    assert heavy_losses(Stream()) == left_out_lines(Stream())[1:]
    assert data_record(Stream()) == {
        "sources": {
            "a": {"rows": 100, "left_out": {"a message is blank": 10}},
            "b": {"rows": 100, "left_out": {"blank text": 8, "a row is not JSON": 3}},
            "c": {"rows": 50, "left_out": {}},
        },
        "notes": ["data.a: odd"],
    }


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_a_stage_says_and_records_what_it_left_out(tiny, tmp_path, monkeypatch, share):
    class Losing(tiny.TinyStream):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.notes = ["data.d: it lacks its first token"]

        def __next__(self):
            step = super().__next__()
            read = 100 * self.step
            self.dropped = {
                "d": {"rows": read, **({"a message is blank": int(share * read)} if share else {})}
            }
            return step

    monkeypatch.setattr(tiny, "TinyStream", Losing)
    out = io.StringIO()
    result, _ = tiny.run_stage(tmp_path, out=out, steps=3, log_every_steps=1)
    (path,) = tmp_path.rglob("result.json")
    assert json.loads(path.read_text()) == asdict(result)
    left_out = {"a message is blank": int(share * 300)} if share else {}
    assert result.data["sources"] == {"d": {"rows": 300, "left_out": left_out}}
    said = out.getvalue()
    assert said.count("warning: tiny: data.d: it lacks its first token") == 1
    assert said.count("rows read are left out: ") == (share > 0) + (share > 0.1)
    assert said.count("warning: tiny: data.d: 50 of 100") == (share > 0.1)

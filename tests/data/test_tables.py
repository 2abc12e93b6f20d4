"""Tables in text: the rows of csv, by number, and what is said of files that are not quite tables."""

import csv
import gzip
import io
import itertools
import json
import random

import pytest

from gendistill.config.schema import SourceConfig
from gendistill.data import files, lines, tables
from gendistill.data.files import open_line_file
from gendistill.data.sources import open_source
from gendistill.errors import DataError


def _all(path) -> list[dict]:
    rows = open_line_file(path, where="data.x")
    return [rows[index] for index in range(len(rows))]


def _table(rows: list[dict], delimiter: str, ending: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=ending)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_rows_equal_those_written(tmp_path, monkeypatch, suffix, delimiter, ending, zipped, chunk):
    monkeypatch.setattr(lines, "CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    pieces = ['"', ",", "\t", "\n", "\r\n", "é", "😀", " ", "x", "\n\n", "\ufeff"]
    rows = [
        {"text": "".join(rng.choices(pieces, k=rng.randrange(9))), "n": str(index), "ö b": ""}
        for index in range(60)
    ]
    data = b"\xef\xbb\xbf" * (chunk == 7) + _table(rows, delimiter, ending)
    path = tmp_path / ("rows" + suffix + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert _all(path) == rows


def test_a_table_is_a_source_like_any_other(tmp_path):
    for part, rows in enumerate([range(5), range(5, 9)]):
        table = [{"prompt": f"{row}?", "completion": f"{row}!"} for row in rows]
        (tmp_path / f"{part}.csv").write_bytes(_table(table, ",", "\n"))
    config = SourceConfig(path=str(tmp_path), format="prompt_completion", shuffle=False)
    source = open_source(config, name="x", seed=0, skip_rows=2)
    assert [row["prompt"] for row in itertools.islice(source, 8)] == [f"{row}?" for row in (*range(2, 9), 2)]


def test_a_long_field_is_read_and_the_limit_of_the_process_stays(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert len(_all(tmp_path / "rows.csv")[0]["text"]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text;n\na;1\n", "separated by ';'"),
        ("a.csv", "text\tn\na\t1\n", r"separated by '\\t'"),
        ("a.tsv", "text,n\na,1\n", "separated by ','"),
        ("a.csv", "text,n\na,1\nb,2,3\nc,3\n", "record 2 of .* has 3 fields and the header 2"),
        ("a.csv", "text,n\na,1\nb\nc,3\n", "record 2 of .* has 1 fields and the header 2"),
        ("a.csv", "text,\na,1\n", "must name the columns, and its field 2 is blank"),
        ("a.csv", "text,text\na,1\n", "'text' stands in it twice"),
        ("a.csv", 'text\n"a"b\n', "expected after"),
        ("a.csv", 'text\n"a\n' + "b\n" * 2000, "unexpected end of data .*line 2"),
        ("a.csv", "text,n\ra,1\r", "new-line character"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_before_training(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(DataError, match=message) as caught:
        open_line_file(tmp_path / name, where="data.x")
    assert caught.value.where == "data.x"
    assert caught.value.hint


def test_a_table_without_a_header_is_told_from_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("hello there,1\ngood day,2\n")
    with pytest.raises(DataError, match='no column "text"; it has: hello there, 1') as caught:
        open_source(SourceConfig(path=str(tmp_path / "a.csv")), name="x", seed=0)
    assert "first line of a table must name its columns" in caught.value.hint


@pytest.mark.parametrize("content", ["", "\n\n", "text,n\n", "text,n"])
def test_a_table_without_rows_is_empty(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        open_source(SourceConfig(path=str(tmp_path / "a.csv")), name="x", seed=0)


def test_a_table_cut_inside_a_row_yields_the_whole_rows(tmp_path, caplog):
    whole = 'text,n\n"a\nb",1\n"c ""d"" ",2\n'
    for tail in ('"e', '"e\nf', "e", '"e"'):
        path = tmp_path / "rows.csv"
        path.write_text(whole + tail)
        caplog.clear()
        files.warn_once.cache_clear()
        assert [row["n"] for row in _all(path)] == ["1", "2"]
        assert "is cut off at its end" in caplog.text


def test_bytes_that_are_not_utf8_stay_in_their_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,n\na,1\n\xe9,2\n")
    assert _all(tmp_path / "a.csv") == [{"text": "a", "n": "1"}, {"text": "\udce9", "n": "2"}]
    assert json.dumps("\udce9") == '"\\udce9"'


def test_blank_lines_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MOST_BLANK_LINES", 50)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\na" + b"\n" * 60 + b"b\n"))
    with pytest.raises(DataError, match="more than 50 blank lines"):
        open_line_file(tmp_path / "a.csv.gz", where="data.x")

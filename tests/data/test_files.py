"""Local row files: one big JSON array, JSON Lines, text, plain or gzipped."""

import gzip
import io
import json
import logging
import random

import pytest

from gendistill.data import files
from gendistill.data.files import JoinedRows, JsonArrayRecords, open_line_file
from gendistill.errors import DataError


def _random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([0, -3, 12345678901234567890, 1.5e-7, -0.25])
    if kind <= 4:
        return "".join(
            rng.choices(
                ['"', "\\", "\n", "\r", "]", "}", ",", "é", "😀", "\u2028", " ", "ab"], k=rng.randrange(8)
            )
        )
    if kind == 5:
        return [_random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {f"k{index}": _random_value(rng, depth + 1) for index in range(rng.randrange(4))}


def _array(rng: random.Random, count: int, *, ascii_only: bool) -> tuple[list[dict], list[bytes]]:
    records = [{"n": index, "v": _random_value(rng)} for index in range(count)]
    return records, [json.dumps(record, indent=1, ensure_ascii=ascii_only).encode() for record in records]


@pytest.mark.parametrize("chunk", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_array_records_equal_json_loads(monkeypatch, chunk, ascii_only):
    monkeypatch.setattr(files, "_CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    for count in (0, 1, 2, 25):
        records, parts = _array(rng, count, ascii_only=ascii_only)
        text = b"\xef\xbb\xbf \n[ " + b" ,\r\n ".join(parts) + b"\n ] \n"
        reader = JsonArrayRecords(io.BytesIO(text))
        assert [json.loads(record) for record in reader] == records
        assert not reader.cut


def test_array_cut_at_any_byte_yields_the_whole_records(monkeypatch):
    monkeypatch.setattr(files, "_CHUNK_BYTES", 16)
    records, parts = _array(random.Random(3), 6, ascii_only=False)
    text, ends = b"[", []
    for index, part in enumerate(parts):
        text += (b"," if index else b"") + part
        ends.append(len(text))
    for cut in range(1, len(text) + 1):
        reader = JsonArrayRecords(io.BytesIO(text[:cut]))
        assert [json.loads(record) for record in reader] == records[: sum(end <= cut for end in ends)]
        assert reader.cut
    assert not JsonArrayRecords(io.BytesIO(text + b"]")).cut


def test_array_is_read_in_constant_memory(monkeypatch):
    monkeypatch.setattr(files, "_CHUNK_BYTES", 256)
    reader = JsonArrayRecords(io.BytesIO(b"[" + b",".join([b'{"text": "abcdefgh"}'] * 2000) + b"]"))
    longest = max(len(reader._buffer) for _ in reader)
    assert longest < 600


@pytest.mark.parametrize("broken", ['{"a": 1} {"a": 2}', '{"a": oops}', '{"a": 1},, {"a": 2}', '{"a" 1}'])
def test_array_broken_in_the_middle_is_an_error_with_the_record(tmp_path, broken):
    path = tmp_path / "broken.json"
    path.write_text('[{"a": 0},\n' + broken + ',\n{"a": "' + "x" * 100 + '"}]')
    with pytest.raises(DataError, match=r"record [23] of .*broken\.json is broken") as caught:
        open_line_file(path, where="data.chat")
    assert caught.value.where == "data.chat"
    assert not list((tmp_path / "cache").rglob("rows.jsonl"))


def test_cut_array_is_reported_once_with_its_count(tmp_path, caplog):
    path = tmp_path / "cut.json"
    path.write_text(json.dumps([{"a": index, "b": "x" * 20} for index in range(9)], indent=2)[:-10])
    with caplog.at_level(logging.WARNING):
        rows = open_line_file(path, where="data.cut")
        open_line_file(path, where="data.cut")
    assert [rows[index]["a"] for index in range(len(rows))] == list(range(8))
    assert [record.getMessage() for record in caplog.records] == [
        "data.cut: cut.json is cut off at its end; its 8 whole records are used, the broken last one is left out"
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "array.json", "array.json.gz"])
def test_every_spelling_of_json_gives_the_same_rows(tmp_path, name):
    rows = [{"n": index, "text": "line\n" * index + "é"} for index in range(5)]
    if name.startswith("array"):
        data = json.dumps(rows, indent=4).encode()
    else:
        data = b"\n" + b"\n\n".join(json.dumps(row).encode() for row in rows) + b"\n \n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    opened = open_line_file(path, where="data.x")
    assert [opened[index] for index in range(len(opened))] == rows


def test_second_open_reads_the_index_only(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"a": 1}, {"a": 2}]))
    open_line_file(path, where="data.x")
    monkeypatch.setattr(files, "_index", None)
    assert open_line_file(path, where="data.x")[1] == {"a": 2}
    # a changed file is another file
    monkeypatch.undo()
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    path.write_text(json.dumps([{"a": 1}, {"a": 2}, {"a": 3}]))
    assert len(open_line_file(path, where="data.x")) == 3


def test_text_file_has_one_row_per_line_without_blank_ones(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("first\n\n  \nsecond é\r\nlast")
    rows = open_line_file(path, where="data.x")
    assert [rows[index]["text"] for index in range(len(rows))] == ["first", "second é", "last"]


def test_joined_files_number_rows_consecutively(tmp_path):
    parts = []
    for part, count in enumerate([2, 0, 3]):
        path = tmp_path / f"{part}.jsonl"
        path.write_text("".join(json.dumps({"id": [part, index]}) + "\n" for index in range(count)))
        parts.append(open_line_file(path, where="data.x"))
    joined = JoinedRows.of(parts)
    assert [joined[index]["id"] for index in range(len(joined))] == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]


def test_broken_line_names_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n[1]\n')
    rows = open_line_file(path, where="data.x")
    with pytest.raises(DataError, match=r"row 2 of .*rows\.jsonl is no JSON"):
        rows[1]
    with pytest.raises(DataError, match=r"row 3 .* is a list, expected an object"):
        rows[2]

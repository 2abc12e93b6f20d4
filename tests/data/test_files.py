"""Local row files: one big JSON array, JSON Lines, text, plain or gzipped."""

import gzip
import io
import json
import logging
import os
import random

import numpy as np
import pytest

from gendistill.data import files, tables
from gendistill.data import lines as lines_module
from gendistill.data.files import BadRow, JoinedRows, JsonArrayRecords, open_line_file
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
    with pytest.raises(DataError, match=r"row 2 of .*rows\.jsonl is not JSON"):
        rows[1]
    with pytest.raises(DataError, match=r"row 3 .* is a list, expected an object"):
        rows[2]


RECORDS = [{"n": index, "text": "é😀 line\n" * index} for index in range(6)]
LINES = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)


def _all(path) -> list[dict]:
    rows = open_line_file(path, where="data.x")
    return [rows[index] for index in range(len(rows))]


def test_lines_cut_at_any_byte_yield_the_whole_rows(tmp_path, caplog):
    ends = [index + 1 for index, byte in enumerate(LINES) if byte == ord("\n")]
    path = tmp_path / "rows.jsonl"
    for cut in range(1, len(LINES) + 1):
        path.write_bytes(LINES[:cut])
        caplog.clear()
        files.warn_once.cache_clear()
        # a row without the line break after it is whole
        whole = [end for end in ends if end - 1 <= cut]
        assert _all(path) == RECORDS[: len(whole)]
        reached = whole[-1] if whole else 0
        assert bool(caplog.records) == (cut > reached)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.txt.gz", "rows.csv.gz"])
def test_a_zipped_file_that_ends_early_yields_the_whole_rows(tmp_path, caplog, name):
    records = [{"text": f"{random.Random(index).random()}"} for index in range(3000)]
    content = {
        "rows.jsonl.gz": "".join(json.dumps(each) + "\n" for each in records),
        "rows.json.gz": json.dumps(records),
        "rows.txt.gz": "".join(each["text"] + "\n" for each in records),
        "rows.csv.gz": "text\n" + "".join(each["text"] + "\n" for each in records),
    }[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode())[:-3000])
    rows = _all(path)
    assert 0 < len(rows) < 3000
    assert rows == records[: len(rows)]
    assert "is cut off at its end" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:500] + b"\0\1\2\3" + data[504:],
        lambda data: data[:-8] + b"zzzz" + data[-4:],
        lambda data: LINES,
        lambda data: data + b"more",
    ],
    ids=["stream", "checksum", "not zipped", "tail"],
)
def test_a_damaged_zipped_file_is_a_data_error(tmp_path, damage):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(LINES * 200 + os.urandom(3000).hex().encode())))
    with pytest.raises(DataError, match="the gzip stream is damaged") as caught:
        open_line_file(path, where="data.x")
    assert caught.value.hint


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
def test_blanks_cost_neither_memory_nor_rows(tmp_path, monkeypatch, kind, zipped):
    for module, name in ((lines_module, "CHUNK_BYTES"), (files, "CHUNK_BYTES"), (files, "_CHUNK_BYTES")):
        monkeypatch.setattr(module, name, 64)
    for module in (lines_module, files):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 512)
    first, second = b'{"text": "a"}', b'{"text": "b"}'
    for blank in (b"\n", b"\r\n", b" \n"):
        data = {
            "jsonl": blank * 3000 + first + blank * 3000 + second + blank * 3000,
            "json": blank * 3000
            + b"["
            + blank * 3000
            + first
            + blank * 3000
            + b","
            + blank * 3000
            + second
            + b"]\n",
            "txt": blank * 3000 + b"a" + blank * 3000 + b"b" + blank * 3000,
        }[kind]
        path = tmp_path / (f"rows{len(blank)}.{kind}" + (".gz" if zipped else ""))
        path.write_bytes(gzip.compress(data) if zipped else data)
        rows = open_line_file(path, where="data.x")
        assert [rows[index]["text"].strip() for index in range(len(rows))] == ["a", "b"]
        assert (rows.spans[:, 1] - rows.spans[:, 0]).max() < 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"text": "' + b"x" * 2000 + b'"}\n'),
        ("rows.jsonl", b'{"text": "a"}' + b" " * 2000 + b"\n"),
        ("rows.json", b'[{"text": "a"}, {"text": ' + b" " * 2000 + b'"b"}]'),
        ("rows.json", b'[{"text": "' + b"x" * 2000 + b'"}]'),
        ("rows.txt", b"x" * 2000),
        ("rows.csv", b"text\n" + b"x" * 2000),
        ("rows.csv", b'text\n"' + b"x\n" * 2000 + b'"\n'),
        ("rows.json", b"[" * 100_000),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_row_beyond_the_limit_is_refused(tmp_path, monkeypatch, name, content, zipped):
    monkeypatch.setattr(lines_module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(files, "_CHUNK_BYTES", 64)
    for module in (lines_module, files, tables):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 512)
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DataError, match=r"longer than|larger than|nested too deeply") as caught:
        open_line_file(path, where="data.x")
    assert caught.value.hint


def test_deep_rows_and_odd_numbers_spoil_no_other_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    path.write_bytes(b'{"a": 1e999}\n' + deep + b'{"a": ' + b"1" * 5000 + b'}\n{"a": 1, "a": 2}\n')
    rows = open_line_file(path, where="data.x")
    assert rows[0] == {"a": float("inf")}
    for index in (1, 2):
        with pytest.raises(BadRow, match=f"row {index + 1} of"):
            rows[index]
    assert rows[3] == {"a": 2}


def test_array_with_a_number_of_many_digits_keeps_its_other_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": ' + "1" * 5000 + '}, {"a": NaN, "b": 3}]')
    rows = open_line_file(path, where="data.x")
    assert (len(rows), rows[0], rows[2]["b"]) == (3, {"a": 1}, 3)
    with pytest.raises(BadRow):
        rows[1]


@pytest.mark.parametrize("text", ['[{"a": 1}][{"a": 2}]', '[{"a": 1}] {"a": 2}', '[{"a": 1}]]'])
def test_what_follows_an_array_is_not_left_out_silently(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r'something follows the "\]"'):
        open_line_file(path, where="data.x")


def test_text_that_is_not_utf8_is_a_bad_row_and_utf16_a_bad_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\n\0\0\0\n\xff\xfe\xfd\n  last\n")
    rows = open_line_file(path, where="data.x")
    assert (rows[0], rows[3]) == ({"text": "first"}, {"text": "  last"})
    for index, message in ((1, "holds NUL characters"), (2, "is not UTF-8")):
        with pytest.raises(BadRow, match=message):
            rows[index]
    for name in ("a.txt", "a.jsonl", "a.csv"):
        (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-16")
        with pytest.raises(DataError, match="UTF-16"):
            open_line_file(tmp_path / name, where="data.x")


@pytest.mark.parametrize("damage", ["info", "type", "cut", "kind", "places", "rows"])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(RECORDS))
    assert _all(path) == RECORDS
    (folder,) = (each.parent for each in (tmp_path / "cache").rglob("info.json"))
    spans = np.load(folder / "spans.npy")
    if damage == "info":
        (folder / "info.json").write_text('{"rows": ')
    elif damage == "type":
        (folder / "info.json").write_text('["rows"]')
    elif damage == "cut":
        (folder / "spans.npy").write_bytes((folder / "spans.npy").read_bytes()[:-9])
    elif damage == "kind":
        np.save(folder / "spans.npy", spans.astype(float))
    elif damage == "places":
        np.save(folder / "spans.npy", spans + 1000)
    else:
        (folder / "rows.jsonl").write_bytes(b"{}\n")
    assert _all(path) == RECORDS


@pytest.mark.parametrize("how", ["rewritten", "renamed"])
def test_a_file_of_equal_size_and_restored_time_is_indexed_anew(tmp_path, how):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert _all(path) == [{"a": 1}, {"a": 2}]
    before, other = path.stat(), tmp_path / "other"
    other.write_text('[{"a": 3}, {"a": 4}]')
    if how == "renamed":
        other.rename(path)
    else:
        path.write_text(other.read_text())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert _all(path) == [{"a": 3}, {"a": 4}]


def test_a_file_that_changes_or_goes_while_it_is_read_is_a_data_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    rows = open_line_file(path, where="data.x")
    path.write_bytes(LINES[:-9])
    with pytest.raises(DataError, match="has changed since it was opened"):
        rows[0]
    path.unlink()
    with pytest.raises(DataError, match="it does not exist"):
        rows[0]


def test_a_zipped_file_of_nothing_is_one_that_was_cut_off(tmp_path, caplog):
    path = tmp_path / "part.jsonl.gz"
    path.write_bytes(b"")
    assert len(open_line_file(path, where="data.d")) == 0
    assert "part.jsonl.gz is cut off at its end" in caplog.text
    path.write_bytes(gzip.compress(b""))
    caplog.clear()
    assert len(open_line_file(path, where="data.d")) == 0
    assert not caplog.text

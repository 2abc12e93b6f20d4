"""What a source holds: its content and its order, not its names."""

import gzip
import json
import os

import datasets
import pytest

from gendistill import digests
from gendistill.config.schema import SourceConfig
from gendistill.data.identity import source_identity
from gendistill.digests import file_digest
from gendistill.errors import DataError

ROWS = [{"text": f"row {index}"} for index in range(9)]


def _identity(path, **settings):
    return source_identity(SourceConfig(path=str(path), **settings), where="data.a")


def _lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_names_and_places_do_not_matter_but_content_order_and_kind_do(tmp_path):
    contents = {"a": _lines(ROWS[:4]), "b": _lines(ROWS[4:])}
    for folder, names in {"one": "ab", "two": "ab", "renamed": "xy", "swapped": "yx"}.items():
        (tmp_path / folder).mkdir()
        for content, name in zip(contents.values(), names, strict=True):
            (tmp_path / folder / f"{name}.jsonl").write_text(content)
    first = _identity(tmp_path / "one")
    assert json.loads(json.dumps(first)) == first
    assert _identity(tmp_path / "two" / "*.jsonl") == first
    assert _identity(tmp_path / "renamed") == first
    assert _identity(tmp_path / "swapped") != first
    (tmp_path / "two" / "a.jsonl").rename(tmp_path / "two" / "a.json")
    assert _identity(tmp_path / "two") == first
    (tmp_path / "two" / "a.json").rename(tmp_path / "two" / "a.txt")
    assert _identity(tmp_path / "two") != first
    (tmp_path / "renamed" / "x.jsonl").write_text(_lines([*ROWS[:3], {"text": "row 8"}]))
    assert _identity(tmp_path / "renamed") != first


def test_a_replaced_file_of_equal_size_and_restored_time_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines(ROWS))
    stat, first = path.stat(), _identity(path)
    path.write_text(_lines(ROWS[::-1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert _identity(path) != first


def test_a_digest_is_remembered_only_of_a_file_that_rests(tmp_path, monkeypatch):
    path = tmp_path / "rows.bin"
    path.write_bytes(b"first")
    digest = file_digest(path)
    assert not list((tmp_path / "cache").rglob("digests/*"))
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    assert file_digest(path) == digest
    (memo,) = (tmp_path / "cache").rglob("digests/*")
    monkeypatch.setattr(digests.hashlib, "file_digest", None)
    assert file_digest(path) == digest
    monkeypatch.undo()
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    for damage in (b"", b"half", b"\xff" * 64):
        memo.write_bytes(damage)
        assert file_digest(path) == digest


def test_saved_datasets_and_parquet_and_gz_have_an_identity(tmp_path):
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[::-1])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(_lines(ROWS).encode()))
    for path in ("both", "rows.parquet", "rows.jsonl.gz"):
        assert len(_identity(tmp_path / path)["files"]) == 1
    assert _identity(tmp_path / "both") != _identity(tmp_path / "both", split="test")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123456789abcdef0123456789abcdef01234567"])
def test_hub_datasets_are_named_without_the_network(monkeypatch, revision):
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert _identity("org/name", revision=revision) == {"hub": "org/name", "revision": revision}


def test_missing_files_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        _identity(tmp_path / "nothing.jsonl")

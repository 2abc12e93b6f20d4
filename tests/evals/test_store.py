"""The store of single results: what was added is found, and what is damaged is neither found nor in the way."""

from __future__ import annotations

import json
import os
import random
import tracemalloc

import pytest

from gendistill_evals import EvalError
from gendistill_evals import store as store_module
from gendistill_evals.store import KEY_BYTES, ResultStore


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def fill(folder, numbers, name="kind", result=lambda number: {"n": number, "text": "x" * number}):
    store = ResultStore(folder, name)
    for number in numbers:
        store.add(key(number), result(number))
    store.close()
    return max(folder.glob(f"{name}-*.jsonl"))


def found(folder, numbers, name="kind"):
    return {
        int.from_bytes(one, "big"): result
        for one, result in ResultStore(folder, name).read(map(key, numbers))
    }


def test_what_was_added_is_found_by_this_and_later_stores(tmp_path):
    store = ResultStore(tmp_path / "a" / "b", "kind")
    assert not (tmp_path / "a").exists()
    store.add(key(1), {"n": 1})
    store.add(key(2), None)
    assert dict(store.read([key(2), key(1), key(3)])) == {key(1): {"n": 1}, key(2): None}
    store.close()
    store.add(key(3), 3.5)
    # Not closed: every line is with the operating system at once.
    assert found(tmp_path / "a" / "b", range(5)) == {1: {"n": 1}, 2: None, 3: 3.5}
    assert len(list((tmp_path / "a" / "b").iterdir())) == 2
    for path in (tmp_path / "a" / "b").iterdir():
        assert all(
            json.loads(line).keys() == {"key", "crc32", "result"} for line in path.read_text().splitlines()
        )


def test_a_store_without_additions_writes_nothing(tmp_path):
    store = ResultStore(tmp_path / "a", "kind")
    assert list(store.read([key(1)])) == []
    store.close()
    assert not (tmp_path / "a").exists()


def test_stores_of_other_names_and_other_files_are_left_alone(tmp_path, capsys):
    fill(tmp_path, [1], name="kind")
    fill(tmp_path, [1], name="other", result=lambda number: "other")
    (tmp_path / "kind-1.json").write_text("{")
    (tmp_path / "kind-folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "kind-pipe.jsonl")
    assert found(tmp_path, [1]) == {1: {"n": 1, "text": "x"}}
    assert capsys.readouterr().err == ""


def test_the_last_of_several_results_counts(tmp_path):
    for result in ("a", "b"):
        fill(tmp_path, [1, 1], result=lambda number, result=result: result)
    assert found(tmp_path, [1]) == {1: "b"}


def test_a_file_that_cannot_be_read_is_said(tmp_path, capsys, monkeypatch):
    path = fill(tmp_path, [1])
    fill(tmp_path, [2])
    open_path = type(path).open

    def refuse(self, *given, **settings):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return open_path(self, *given, **settings)

    monkeypatch.setattr(type(path), "open", refuse)
    assert found(tmp_path, [1, 2]).keys() == {2}
    assert (
        capsys.readouterr().err == f"{path} cannot be read (Permission denied): what it holds is made anew\n"
    )


def test_a_file_that_goes_meanwhile_holds_nothing(tmp_path):
    path = fill(tmp_path, [1])
    fill(tmp_path, [2])
    store = ResultStore(tmp_path, "kind")
    path.unlink()
    assert [one for one, _ in store.read([key(1), key(2)])] == [key(2)]


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_gives_a_wrong_result_or_loses_an_intact_one(tmp_path, capsys, seed):
    chance = random.Random(seed)
    path = fill(tmp_path, range(30))
    intact = path.read_bytes()
    lines = intact.splitlines(keepends=True)
    whole = found(tmp_path, range(30))
    for _ in range(60):
        damaged = bytearray(intact)
        at, length = chance.randrange(len(intact)), chance.choice((1, 1, 1, 7, 200))
        how = chance.choice(("flip", "cut", "insert", "end"))
        if how == "flip":
            damaged[at] ^= 1 << chance.randrange(8)
        elif how == "cut":
            del damaged[at : at + length]
        elif how == "insert":
            damaged[at:at] = chance.randbytes(length)
        else:
            del damaged[at:]
        path.write_bytes(damaged)
        now = found(tmp_path, range(30))
        assert all(whole[number] == result for number, result in now.items())
        kept = set(bytes(damaged).splitlines(keepends=True))
        assert now.keys() >= {number for number, line in enumerate(lines) if line in kept}
        said = capsys.readouterr().err
        # Unless whole lines at the end are gone, which nothing shows.
        assert (str(path) in said) == (not kept <= set(lines))
        # Once it is made anew, nothing is said but of lines whose keys are gone too.
        fill(tmp_path, set(range(30)) - now.keys())
        assert found(tmp_path, range(30)) == whole
        for other in set(tmp_path.iterdir()) - {path}:
            other.unlink()
        capsys.readouterr()


def test_damage_that_was_made_good_is_not_said_again(tmp_path, capsys):
    path = fill(tmp_path, range(3))
    text = path.read_text()
    path.write_text(text.replace('"n": 1', '"n": 7')[:-3])
    assert found(tmp_path, range(3)).keys() == {0}
    assert (
        capsys.readouterr().err
        == f"{path} is damaged in 2 lines, first in line 2: what is lost is made anew\n"
    )
    fill(tmp_path, [1])
    capsys.readouterr()
    found(tmp_path, range(3))
    assert capsys.readouterr().err == f"{path} is damaged in line 3: what is lost is made anew\n"
    fill(tmp_path, [2])
    capsys.readouterr()
    assert found(tmp_path, range(3)).keys() == {0, 1, 2}
    assert capsys.readouterr().err == ""


def test_nothing_is_written_behind_a_line_that_could_not_be(tmp_path, monkeypatch, capsys):
    store = ResultStore(tmp_path, "kind")
    store.add(key(1), "a")
    path = next(tmp_path.iterdir())
    file = store._file

    class Full:
        """A file on a disk that has room for a few more bytes."""

        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, line):
            file.write(line[:20])
            file.flush()
            raise OSError(28, "No space left on device")

    store._file = Full()
    with pytest.raises(EvalError, match="No space left on device") as caught:
        store.add(key(2), "b")
    assert caught.value.where == str(path)
    assert caught.value.hint
    store.add(key(3), "c")
    store.close()
    assert found(tmp_path, range(5)) == {1: "a", 3: "c"}
    assert "line 2" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(EvalError, match="cannot write") as caught:
        ResultStore(tmp_path / "a", "kind").add(key(1), 1)
    assert caught.value.where == str(tmp_path / "a")


def test_a_number_that_is_not_finite_leaves_no_trace(tmp_path):
    store = ResultStore(tmp_path, "kind")
    with pytest.raises(ValueError, match="JSON"):
        store.add(key(1), float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_lines_reach_the_disk_at_intervals_and_at_the_end(tmp_path, monkeypatch):
    now, synced = [0.0], []
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(store_module.os, "fsync", lambda handle: synced.append(now[0]))
    store = ResultStore(tmp_path, "kind")
    for second in range(12):
        now[0] = float(second)
        store.add(key(second), second)
    assert synced == [6.0]
    store.close()
    assert synced == [6.0, 11.0]
    store.close()
    assert synced == [6.0, 11.0]


def test_results_that_nobody_asks_for_are_not_in_memory(tmp_path):
    size = 10_000
    fill(tmp_path, range(300), result=lambda number: "x" * size)
    tracemalloc.start()
    try:
        store = ResultStore(tmp_path, "kind")
        assert [result for _, result in store.read([key(7)])] == ["x" * size]
        assert tracemalloc.get_traced_memory()[1] < 30 * size
    finally:
        tracemalloc.stop()

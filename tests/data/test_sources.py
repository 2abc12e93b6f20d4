"""Sources: what a recipe may name, epochs, exact cursors, held-out rows, and what users get wrong."""

import itertools
import json
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gendistill.config.schema import SourceConfig
from gendistill.data.cursor import StreamSource
from gendistill.data.locate import locate
from gendistill.data.mixture import Mixture
from gendistill.data.sources import heldout_rows, open_list, open_source
from gendistill.errors import DataError

ROWS = [{"text": f"row {index}"} for index in range(23)]


def _config(path: object = "list", **settings) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **settings})


def _map_source(**settings):
    skip = settings.pop("skip_rows", 0)
    return open_list(ROWS, _config(**settings), name="a", seed=3, skip_rows=skip)


def _stream_source(**settings):
    skip = settings.pop("skip_rows", 0)
    dataset = datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)
    return StreamSource(dataset, _config(**settings), name="a", seed=3, skip_rows=skip, block_rows=5)


def _take(source, count: int) -> list[int]:
    return [int(row["text"].split()[1]) for row in itertools.islice(source, count)]


@pytest.mark.parametrize("make", [_map_source, _stream_source])
@pytest.mark.parametrize(("skip", "limit"), [(0, None), (4, None), (0, 7), (4, 7), (22, 100)])
def test_every_epoch_yields_every_row_once_and_no_held_out_row(make, skip, limit):
    source = make(skip_rows=skip, limit=limit)
    expected = list(range(23))[skip:][:limit]
    epochs = [_take(source, len(expected)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    if len(expected) > 5:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("make", [_map_source, _stream_source])
def test_without_shuffle_rows_keep_their_order(make):
    assert _take(make(shuffle=False, skip_rows=2), 42) == list(range(2, 23)) * 2


@pytest.mark.parametrize("make", [_map_source, _stream_source])
def test_resumed_source_equals_uninterrupted_at_every_cut(make):
    whole = _take(make(skip_rows=2, limit=17), 85)
    running = make(skip_rows=2, limit=17)
    for cut in range(45):
        state = json.loads(json.dumps(running.state_dict()))
        resumed = make(skip_rows=2, limit=17)
        resumed.load_state_dict(state)
        # far enough to wrap twice: a later epoch must not begin where this one was resumed
        assert _take(resumed, 40) == whole[cut : cut + 40]
        assert _take(running, 1) == [whole[cut]]


def test_order_depends_on_seed_and_name_only():
    orders = {
        (seed, name): tuple(_take(open_list(ROWS, _config(), name=name, seed=seed), 23))
        for seed in (1, 2)
        for name in "ab"
    }
    assert len(set(orders.values())) == 4
    assert tuple(_take(open_list(ROWS, _config(), name="a", seed=1), 23)) == orders[1, "a"]


def test_changed_dataset_is_not_resumed():
    state = _map_source().state_dict()
    with pytest.raises(DataError, match="had 23 rows when the run was saved and has 22 now"):
        open_list(ROWS[1:], _config(), name="a", seed=3).load_state_dict(state)


def _write_parquet(path: Path, rows: list[dict]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.fixture(autouse=True)
def _private_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_file_glob_folder_and_parquet_give_the_same_rows(tmp_path):
    data = tmp_path / "data"
    (data / "parts").mkdir(parents=True)
    (data / ".hidden").mkdir()
    (data / ".hidden" / "x.jsonl").write_text("broken")
    (data / "README.md").write_text("about")
    for part, rows in enumerate([ROWS[:10], ROWS[10:]]):
        (data / "parts" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _write_parquet(tmp_path / "rows.parquet", ROWS)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    for path in (data, data / "parts" / "*.jsonl", tmp_path / "rows.parquet", tmp_path / "saved"):
        assert _take(open_source(_config(path, shuffle=False), name="a", seed=0), 23) == list(range(23))
        held, columns = heldout_rows(_config(path), name="a", rows=3)
        assert (held, columns) == (ROWS[:3], ("text",))


def test_a_folder_of_rows_may_hold_the_runs_of_its_recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = tmp_path / "runs" / "case"
    (run / "eval").mkdir(parents=True)
    for name in ("manifest.json", "eval/results.json"):
        (run / name).write_text("{}")
    assert len(locate(_config(tmp_path), where="data.a").files) == 3
    (run / "recipe.yaml").write_text("{}")
    assert locate(_config(tmp_path), where="data.a").files == (tmp_path / "rows.jsonl",)
    # unless it is asked for
    assert len(locate(_config(run), where="data.a").files) == 2


def test_hub_settings_reach_the_datasets_library(monkeypatch):
    seen = {}

    def load_dataset(path, subset, **settings):
        seen.update(settings, path=path, subset=subset)
        data = datasets.Dataset.from_list(ROWS)
        return data.to_iterable_dataset() if settings["streaming"] else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = {"subset": "small", "split": "test", "revision": "abc", "shuffle": False}
    for streaming in (False, True):
        source = open_source(
            _config("org/name", streaming=streaming, **settings), name="a", seed=0, skip_rows=1
        )
        assert _take(source, 2) == [1, 2]
        assert heldout_rows(_config("org/name", streaming=streaming), name="a", rows=1)[0] == ROWS[:1]
    assert seen["path"] == "org/name"


@pytest.mark.parametrize(
    ("path", "settings", "message", "hint"),
    [
        ("{tmp}/rowz.jsonl", {}, r"there is no file .*rowz\.jsonl", r"did you mean .*rows\.jsonl"),
        ("{tmp}/nowhere/rows.jsonl", {}, "the folder .*nowhere does not exist", None),
        ("rows.jsonl", {}, r"there is no file rows\.jsonl", "look into"),
        ("{tmp}/*.parquet", {}, r"no file matches .*\.parquet", "correct data.chat.path"),
        ("{tmp}/void", {}, "holds no .json", "correct data.chat.path"),
        ("{tmp}/empty.jsonl", {}, r"empty\.jsonl has no rows", "another dataset"),
        ("{tmp}/notes.md", {}, r"cannot read notes\.md: known kinds are \.json", None),
        (
            "{tmp}/rows.jsonl",
            {"split": "test"},
            'split "test" means nothing for files on disk',
            "remove split",
        ),
        ("{tmp}/rows.jsonl", {"column": "txt"}, 'has no column "txt"; it has: text', 'did you mean "text"'),
        (
            "{tmp}/rows.jsonl",
            {"format": "messages"},
            'has no column "messages"; it has: text',
            "data.chat.format",
        ),
        (
            "{tmp}/rows.jsonl",
            {"format": "prompt_completion", "prompt": "text"},
            'has no column "completion"',
            "set data.chat.completion",
        ),
        ("{tmp}/damaged.parquet", {}, r"cannot read .*damaged\.parquet", "run the same command again"),
    ],
)
def test_user_mistakes_name_the_place_and_the_next_step(tmp_path, path, settings, message, hint):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "void").mkdir()
    if "damaged" in path:
        (tmp_path / "damaged.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=message) as caught:
        open_source(_config(path.format(tmp=tmp_path), **settings), name="chat", seed=0)
    assert caught.value.where.startswith("data.chat")
    if hint:
        assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'org/name' on the Hub"),
        ValueError('Unknown split "tran". Should be one of ["train"].'),
        datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
    ],
)
def test_hub_failures_become_data_errors(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        open_source(_config("org/name"), name="chat", seed=0)
    assert str(error) in caught.value.message
    assert caught.value.where == "data.chat"


@pytest.mark.parametrize("make", [_map_source, _stream_source])
def test_holding_out_everything_is_an_error(make):
    with pytest.raises(DataError, match="none is left to train on"):
        make(skip_rows=23)
    config = _config("list")
    with pytest.raises(DataError, match="none is left to train on"):
        open_list(ROWS, config, name="a", seed=0, skip_rows=40)


def _mixture(weights: dict[str, float]) -> Mixture:
    sources = {name: open_list(ROWS, _config(), name=name, seed=5) for name in weights}
    return Mixture(sources, weights)


def test_mixture_keeps_every_share_at_every_moment():
    weights = {"a": 5.0, "b": 3.0, "c": 0.25}
    mixture = _mixture(weights)
    drawn = dict.fromkeys(weights, 0)
    for total in range(1, 500):
        name, _ = next(mixture)
        drawn[name] += 1
        assert all(abs(drawn[each] - total * weights[each] / 8.25) < 2 for each in weights)


def test_mixture_resumes_exactly_at_every_cut():
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    whole = list(itertools.islice(_mixture(weights), 120))
    running = _mixture(weights)
    for cut in range(100):
        resumed = _mixture(weights)
        resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert list(itertools.islice(resumed, 12)) == whole[cut : cut + 12]
        next(running)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_mixture_refuses_weights_that_are_no_shares(weight):
    with pytest.raises(DataError, match="weights must be positive numbers"):
        _mixture({"a": 1.0, "b": weight})


@pytest.mark.parametrize("kind", ["file", "folder", "glob", "parquet"])
def test_what_cannot_be_read_is_a_data_error(tmp_path, monkeypatch, kind):
    data = tmp_path / "data"
    data.mkdir()
    name = "rows.parquet" if kind == "parquet" else "rows.jsonl"
    (data / name).write_text("x")
    real = Path.open

    def refuse(path, *arguments, **settings):
        if path.parent == data:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    path = {"folder": data, "glob": data / "*.jsonl"}.get(kind, data / name)
    with pytest.raises(DataError, match=r"cannot read .*Permission denied") as caught:
        open_source(_config(path), name="a", seed=0)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["stat", "walk"])
def test_a_folder_that_cannot_be_entered_is_a_data_error(tmp_path, monkeypatch, kind):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    if kind == "stat":
        monkeypatch.setattr(Path, "is_dir", refuse)
    else:
        monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        open_source(_config(tmp_path), name="a", seed=0)


@pytest.mark.parametrize("kind", ["file", "folder", "glob"])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path, kind):
    os.mkfifo(tmp_path / "rows.jsonl")
    path = {"file": tmp_path / "rows.jsonl", "folder": tmp_path, "glob": tmp_path / "*.jsonl"}[kind]
    with pytest.raises(DataError, match="is not a regular file") as caught:
        open_source(_config(path), name="a", seed=0)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/ro\0ws.jsonl", "NUL character"),
        ("~nobody-of-this-name/rows.jsonl", "cannot tell the home folder"),
        ("  ", "the path is empty"),
        ("{tmp}/*.d", "matches folders only, such as .*parts.d"),
        ("{tmp}/" + "x" * 300 + ".jsonl", "cannot read .*File name too long"),
        ("{tmp}/parts.d/rows.jsonl/more.jsonl", "does not exist|Not a directory"),
        ("{tmp}/rows.parquet.gz", "parquet file inside .gz"),
        ("{tmp}/folder.jsonl", "holds no .json"),
        ("{tmp}/broken_saved", "no split"),
    ],
)
def test_odd_paths_are_data_errors_with_a_next_step(tmp_path, path, message):
    (tmp_path / "parts.d").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "parts.d" / "rows.jsonl").write_text("{}")
    (tmp_path / "rows.parquet.gz").write_bytes(b"")
    (tmp_path / "broken_saved").mkdir()
    (tmp_path / "broken_saved" / "dataset_dict.json").write_text('{"splits": "train"}')
    with pytest.raises(DataError, match=message) as caught:
        open_source(_config(path.format(tmp=tmp_path)), name="a", seed=0)
    assert caught.value.hint
    assert caught.value.where.startswith("data.a")


@pytest.mark.parametrize("make", [_map_source, _stream_source])
def test_limits_and_skips_at_their_edges(make):
    assert _take(make(limit=1000, shuffle=False), 24) == [*range(23), 0]
    assert _take(make(skip_rows=22, shuffle=False), 3) == [22, 22, 22]
    assert _take(make(skip_rows=22, limit=5), 2) == [22, 22]


def test_one_row_is_a_dataset_and_cannot_be_held_out(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "row 0"}')
    assert _take(open_source(_config(path), name="a", seed=0), 3) == [0, 0, 0]
    with pytest.raises(DataError, match=r"has 1 rows and heldout\.rows reserves 1: none is left"):
        heldout_rows(_config(path), name="a", rows=1)


@pytest.mark.parametrize("first", ["[1]", '"text"', "3", "null", "{", "{}", '{"te\\ud83d": 1}'])
def test_a_first_row_that_is_no_row_is_refused_by_name(tmp_path, first):
    path = tmp_path / "rows.jsonl"
    path.write_text(first + '\n{"text": "row 1"}\n')
    with pytest.raises(DataError, match=r"row 1 of|record 2 of|has no column") as caught:
        open_source(_config(path), name="a", seed=0)
    str(caught.value).encode()
    with pytest.raises(DataError):
        heldout_rows(_config(path), name="a", rows=1)


@pytest.mark.parametrize("make", [_map_source, _stream_source])
@pytest.mark.parametrize(
    "change",
    [
        {"position": 100},
        {"position": -1},
        {"position": "3"},
        {"columns": ["other"]},
        {"epoch": None},
        {"cursor": {"epoch": 0}},
        {"cursor": 3},
    ],
)
def test_state_of_other_data_is_a_data_error(make, change):
    if "cursor" in change and make is _map_source:
        pytest.skip("only streams have a cursor")
    state = {**make().state_dict(), **change}
    with pytest.raises(DataError) as caught:
        make().load_state_dict(state)
    assert caught.value.hint
    with pytest.raises(DataError):
        make().load_state_dict([])


def test_state_from_before_columns_were_saved_still_resumes():
    source = _map_source()
    _take(source, 5)
    state = {key: value for key, value in source.state_dict().items() if key != "columns"}
    resumed = _map_source()
    resumed.load_state_dict(state)
    assert _take(resumed, 5) == _take(source, 5)


def test_state_of_other_sources_is_a_data_error():
    state = _mixture({"a": 1.0, "b": 1.0}).state_dict()
    with pytest.raises(DataError, match="saved with the sources a, b and would go on with a, c"):
        _mixture({"a": 1.0, "c": 1.0}).load_state_dict(state)


def test_parquet_columns_that_are_no_text_leave_rows_out_not_the_run(tmp_path):
    tables = {
        "number": pa.table({"text": [1, 2]}),
        "bytes": pa.table({"text": [b"\xff", b"a"]}),
        "null": pa.table({"text": pa.array([None, None], pa.string())}),
        "list": pa.table({"text": [["a"], ["b"]]}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        source = open_source(_config(tmp_path / f"{name}.parquet"), name="a", seed=0)
        assert not any(isinstance(next(source)["text"], str) for _ in range(2))
    raw = pa.array([b"good", b"\xff\xfe"], pa.binary())
    broken = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": broken, "n": [1, 2]}), tmp_path / "utf8.parquet")
    source = open_source(_config(tmp_path / "utf8.parquet", shuffle=False), name="a", seed=0)
    assert next(source) == {"text": "good"}
    assert next(source).reason == "a row is not UTF-8"


def test_a_parquet_file_that_cannot_be_read_says_why_once(tmp_path, caplog):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"], "b\0c": ["d"]}), path)
    with pytest.raises(DataError, match=r"cannot read .*rows\.parquet: .*Couldn't cast"):
        open_source(_config(path), name="a", seed=0)


def test_a_parquet_file_of_equal_size_and_restored_time_is_read_anew(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["row 1"]}), path)
    before = path.stat()
    assert _take(open_source(_config(path), name="a", seed=0), 1) == [1]
    pq.write_table(pa.table({"text": ["row 2"]}), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert _take(open_source(_config(path), name="a", seed=0), 1) == [2]

"""Rows of public benchmarks: from a twin, from the library datasets once, or from the sample that comes along."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from gendistill_evals import JUDGES, list_tasks, load_task, load_tasks, outline_tasks
from gendistill_evals.datasets import read_dataset
from gendistill_evals.errors import EvalError
from gendistill_evals.suites import SUITES, suite_tasks

ROWS = [
    {"question": f"Number {n}?", "subject": "ab"[n % 2], "choices": ["one", "two", "three"], "answer": n % 3}
    for n in range(6)
]
DATASET = {
    "path": "rows",
    "split": "train",
    "columns": ["question", "subject", "choices", "answer"],
    "prepare": "numbered_choices",
}
FROM_HUB = [task.name for task in outline_tasks() if task.num_items is None]
# judged by more than a comparison with gold
JUDGED = [*SUITES["code"].tasks, *SUITES["instructions"].tasks]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    # read once, at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("GENDISTILL_EVAL_DATA", raising=False)


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, **changes) -> Path:
    """Write a task whose dataset is a folder of files, which the library reads as it reads the hub."""
    content = {
        "kind": "multiple_choice",
        "prompt": "{question}\n{options}",
        "max_new_tokens": 8,
        "dataset": {**DATASET, **changes},
    }
    path = folder / "demo.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text(lines(ROWS))
    return write(tmp_path)


def test_rows_come_through_the_library_and_are_kept(hub, tmp_path):
    """The second call reads the copy: what the dataset became in the meantime changes nothing."""
    task = load_task(hub)
    assert [item.gold for item in task.items] == ["one", "two", "three"] * 2
    assert task.source == {
        "from": "hub", "dataset": "rows", "names": [], "split": "train", "revision": None, "rows": 6, "left_out": 0,
    }  # fmt: skip
    (tmp_path / "rows" / "train.jsonl").unlink()
    again = load_task(hub)
    assert (again.items, again.items_sha256) == (task.items, task.items_sha256)


def test_a_damaged_copy_is_made_again(hub, tmp_path):
    task = load_task(hub)
    (copy,) = (tmp_path / "cache" / "eval-data").glob("*.jsonl")
    copy.write_text(copy.read_text().replace('"answer": 0', '"answer": 1'))
    assert load_task(hub).items_sha256 == task.items_sha256


def test_another_split_is_another_copy(hub, tmp_path):
    load_task(hub)
    (tmp_path / "rows" / "test.jsonl").write_text(lines(ROWS[:2]))
    assert len(load_task(write(tmp_path, split="test")).items) == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_twin_goes_before_the_hub_and_asks_the_same(hub, tmp_path, suffix, monkeypatch):
    folder = tmp_path / "twins"
    folder.mkdir()
    rows = [{**row, "more": 1} for row in ROWS]
    twin = folder / f"demo{suffix}"
    if suffix == ".parquet":
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(rows).to_parquet(twin)
    elif suffix == ".jsonl.gz":
        twin.write_bytes(gzip.compress(lines(rows).encode()))
    else:
        twin.write_text(lines(rows))
    from_hub = load_task(hub)
    task = load_task(hub, data=folder)
    assert task.source["from"] == "file"
    assert task.source["file"] == twin.name
    assert (task.items, task.items_sha256) == (from_hub.items, from_hub.items_sha256)
    monkeypatch.setenv("GENDISTILL_EVAL_DATA", str(folder))
    assert load_task(hub).source["from"] == "file"


def test_without_a_network_the_error_says_what_to_save_and_where(tmp_path):
    path = write(tmp_path, path="nobody/has-this")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EvalError, match="cannot load nobody/has-this, split train") as raised:
        load_task(path, data=empty)
    assert "holds no demo.jsonl and no demo.jsonl.gz and no demo.parquet" in raised.value.message
    assert "question, subject, choices, answer, as FOLDER/demo.jsonl" in raised.value.hint
    assert "sample" not in raised.value.hint


def test_a_folder_that_is_not_there_is_refused(hub, tmp_path):
    with pytest.raises(EvalError, match="there is no folder") as raised:
        load_task(hub, data=tmp_path / "none")
    assert raised.value.exit_code == 2
    assert raised.value.where == "--data"


def test_a_twin_without_the_columns_is_refused_with_its_line(hub, tmp_path):
    (tmp_path / "demo.jsonl").write_text(lines([ROWS[0], {"question": "?", "output": "A"}]))
    with pytest.raises(EvalError, match="lacks the columns subject, choices, answer") as raised:
        load_task(hub, data=tmp_path)
    assert raised.value.where.endswith("demo.jsonl:2")


def test_a_dataset_without_the_columns_is_refused(hub, tmp_path):
    with pytest.raises(EvalError, match="lacks the columns topic; it has question, subject"):
        load_task(write(tmp_path, columns=["question", "topic"]))


def test_a_damaged_archive_is_refused(hub, tmp_path):
    (tmp_path / "demo.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(EvalError, match="cannot unpack"):
        load_task(hub, data=tmp_path)


def test_values_of_a_column_take_turns(hub, tmp_path):
    (tmp_path / "demo.jsonl").write_text(lines(sorted(ROWS, key=lambda row: row["subject"])))
    asked = [
        item.prompt.split("?")[0]
        for item in load_task(write(tmp_path, spread="subject"), data=tmp_path).items
    ]
    assert asked == [f"Number {n}" for n in range(6)]


def test_rows_whose_options_repeat_are_left_out_and_counted(hub, tmp_path):
    (tmp_path / "demo.jsonl").write_text(lines([ROWS[0], {**ROWS[1], "choices": ["a", "a", "b"]}]))
    task = load_task(hub, data=tmp_path)
    assert (len(task.items), task.source["left_out"]) == (1, 1)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("mmlu", "must hold path, split and columns"),
        ({"path": "a/b", "split": "test"}, "lacks columns"),
        ({**DATASET, "spilt": "test"}, r"unknown key 'dataset\.spilt'"),
        ({**DATASET, "prepare": "mmlu"}, "must be one of numbered_choices"),
        ({**DATASET, "spread": "topic"}, "must be one of the columns"),
        ({**DATASET, "revision": 3}, '"dataset.revision" must be a text'),
        ({**DATASET, "columns": [1]}, "must be a list of texts"),
        ({**DATASET, "file": "../rows"}, "without a folder"),
    ],
)
def test_what_is_not_a_dataset_is_refused(value, says):
    with pytest.raises(EvalError, match=says) as raised:
        read_dataset(value, "demo", "demo.yaml")
    assert raised.value.hint


@pytest.mark.parametrize("name", [name for name in FROM_HUB if name not in JUDGED])
def test_every_sample_is_right_when_answered_with_its_gold(name):
    task = load_task(name, data="sample")
    assert task.source["from"] == "sample"
    assert task.source["left_out"] == (0 if not name.startswith("bbh") else 56 - len(task.items))
    assert task.description
    assert len(task.items) >= 12
    for item in task.items:
        judgement = JUDGES[task.judge](item, f"The answer is {item.gold}.")
        assert judgement.correct, (item, judgement)


@pytest.mark.parametrize(
    "name", [name for name in FROM_HUB if name not in (*JUDGED, "gsm8k", "bbh_open", "bbh_choice")]
)
def test_no_place_of_the_gold_answer_is_much_favoured(name):
    items = load_task(name, data="sample").items
    places = Counter(item.options.index(item.gold) for item in items)
    assert max(places.values()) <= len(items) / 2
    assert len(places) == len(items[0].options)


def test_the_two_tasks_of_bbh_share_its_rows_and_cover_every_subtask():
    choice, free = load_tasks(["bbh_choice", "bbh_open"], data="sample")
    assert len(choice.items) + len(free.items) == 56
    assert {item.subject for item in free.items} == {
        "dyck_languages",
        "multistep_arithmetic_two",
        "word_sorting",
    }
    assert len({item.subject for item in choice.items}) == 11
    # A limit asks some of each.
    assert len({item.subject for item in choice.items[:11]}) == 11


def test_suites_name_built_in_tasks_and_are_asked_once():
    own = {
        task for name, suite in SUITES.items() if name not in ("code", "instructions") for task in suite.tasks
    }
    assert own <= set(list_tasks())
    assert suite_tasks(["smoke", "math", "smoke"]) == ("everyday", "arithmetic", "copy", "gsm8k")
    with pytest.raises(EvalError, match='no suite "maths"') as raised:
        suite_tasks(["maths"])
    assert raised.value.hint == 'did you mean "math"?'
    assert raised.value.exit_code == 2


def test_lengths_are_for_generated_tasks():
    (task,) = load_tasks(["needle"], lengths=[256, 512])
    assert (task.num_items, task.items) == (40, ())
    assert task.items_sha256 != load_task("needle").items_sha256
    with pytest.raises(EvalError, match="none of the tasks generates texts"):
        load_tasks(["copy"], lengths=[256])
    with pytest.raises(EvalError, match="from 64"):
        load_tasks(["needle"], lengths=[2])

"""Files that hold something else than they should: every one is an error that names its place and a next step."""

from __future__ import annotations

import json
import os

import pytest

from gendistill_evals import EvalError, load_questions, load_task
from gendistill_evals.results import SCHEMA, read_json, read_results, read_samples, read_transcripts

TASK = 'kind: exact_match\nitems: rows.jsonl\nprompt: "{question}"\nmax_new_tokens: 8\n'
ROW = {"question": "a?", "gold": "b", "options": ["b", "c"]}
DEEP = 100_000
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 60))


@pytest.fixture
def task_file(tmp_path):
    def write(text, rows=(ROW,)):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "task.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return path

    return write


def refused(call, *given, code=1):
    with pytest.raises(EvalError) as caught:
        call(*given)
    error = caught.value
    assert error.exit_code == code
    assert error.hint
    assert len(str(error)) < 2_000
    str(error).encode()
    return error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "maps keys to values"),
        ("# nothing", "maps keys to values"),
        ("[1, 2]", "maps keys to values"),
        ("text", "maps keys to values"),
        ("1: 2", "unknown key"),
        ("null: 2", "unknown key"),
        ("? [a, b]\n: 2", "cannot read"),
        ("x" * 900 + ": 2", "unknown key"),
        (b"kind: \x00", "cannot read"),
        (b"kind: \xff", "not UTF-8"),
        ("a: !!python/object:os.system {}", "cannot read"),
        ("a: !custom 3", "cannot read"),
        ("a: 2024-13-45", "cannot read"),
        ("a: " + "9" * 5_000, "cannot read"),
        ("[" * DEEP, "cannot read"),
        ("{a: " * DEEP, "cannot read"),
        (LAUGHS, "values, aliases written out"),
        (MERGES, "values, aliases written out"),
        ("a: &a [*a]", "alias stands inside"),
        (TASK + "---\n" + TASK, "cannot read"),
        (TASK + "kind: numeric", 'the key "kind" stands twice'),
        (TASK + "name: [a]", '"name" must be a text'),
        (TASK + "name: " + "n" * 200, "at most 100"),
        (TASK + "description: 3", '"description" must be a text'),
        (TASK + "gold_after: {}", '"gold_after" must be a text'),
        (TASK + "stop: [3]", '"stop" must be a list of texts'),
        (TASK + "stop: {a: b}", '"stop" must be a list of texts'),
        (TASK + "metric: [accuracy]", '"metric" must be one of'),
        (TASK + "fields: [gold]", '"fields" maps names'),
        (TASK + "fields: {1: gold}", '"fields" maps names'),
        (TASK + "fields: {gold: [a]}", '"fields" maps names'),
        (TASK.replace("8", "eight"), '"max_new_tokens" must be'),
        (TASK.replace("8", "true"), '"max_new_tokens" must be'),
        (TASK.replace("8", "8.0"), '"max_new_tokens" must be'),
        (TASK.replace("exact_match", "[exact_match]"), '"kind" must be one of'),
        (TASK.replace("rows.jsonl", "3"), '"items" must be a text'),
        (TASK.replace("rows.jsonl", '"a\\0b"'), "is missing"),
        (TASK.replace("rows.jsonl", "."), "not a regular file"),
        (TASK.replace("rows.jsonl", "/dev/zero"), "not a regular file"),
        (TASK.replace("rows.jsonl", "n" * 300), "cannot read"),
        (TASK.replace("{question}", "\\ud800"), '"prompt" must be a text'),
        (TASK.replace("{question}", "{" * 50_001), "not a template"),
        (TASK.replace("{question}", "{a:{b:{c}}}"), "only plain names"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_task_file_that_is_none_says_so(task_file, text, message):
    assert message in refused(load_task, task_file(text)).message


def test_aliases_that_stay_small_are_read(task_file):
    text = TASK + "stop: &ends [x]\nfields: {gold: &gold gold, id: *gold}\n"
    assert load_task(task_file(text)).stop == ("x",)


@pytest.mark.parametrize("load", [load_task, load_questions])
@pytest.mark.parametrize(
    "name", ["~nobody-of-that-name/x", "a\0b/x", "n" * 5_000 + "/x", "gone/x", "\ud800/x"]
)
def test_paths_that_are_none_say_so(load, name):
    ending = ".yaml" if load is load_task else ".jsonl"
    with pytest.raises(EvalError) as caught:
        load(name + ending)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_folders_and_pipes_are_no_files(tmp_path, task_file):
    assert "regular file" in refused(load_task, tmp_path, code=2).message
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "regular file" in refused(load_task, tmp_path / "pipe.yaml", code=2).message
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "regular file" in refused(load_questions, tmp_path / "pipe.jsonl", code=2).message
    assert "regular file" in refused(load_task, task_file(TASK.replace("rows.jsonl", "pipe.jsonl"))).message
    os.mkfifo(tmp_path / "results.json")
    assert "regular file" in refused(read_results, tmp_path).message


def test_items_may_lie_anywhere(tmp_path, task_file):
    path = task_file(TASK)
    (tmp_path / "inner").mkdir()
    for items in ("../rows.jsonl", str(tmp_path / "rows.jsonl")):
        inner = tmp_path / "inner" / "task.yaml"
        inner.write_text(TASK.replace("rows.jsonl", items))
        assert load_task(inner).items_sha256 == load_task(path).items_sha256


LINES = [
    "3", "null", "[]", '"text"', "NaN", '{"gold": NaN}', '{"gold": Infinity}', '{"gold": -Infinity}',
    '{"gold": 1e999}', '{"gold": %s}' % ("9" * 5_000), "[" * DEEP,
    '{"a":' * DEEP, '{"a": ' + "[" * 500 + "]" * 500 + "}",
    '{"question": "\\ud800", "gold": "b"}', '{"question": "a", "gold": "\\udfff"}', '{"\\ud800": 1}',
    "{'a': 1}", '{"a": 1',
    '{"question": "a", "gold": "b"} x',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line)[:30])
def test_a_line_that_is_no_row_is_named(tmp_path, task_file, line):
    path = task_file(TASK)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(line + "\n")
    assert refused(load_task, path).where == f"{tmp_path / 'rows.jsonl'}:2"
    assert refused(load_questions, tmp_path / "rows.jsonl").where.endswith(":2")
    for name, read in (("samples", read_samples), ("transcripts", read_transcripts)):
        (tmp_path / f"{name}.jsonl").write_text("\n" + line + "\n")
        assert refused(read, tmp_path).where == f"{tmp_path / name}.jsonl:2"
    (tmp_path / "results.json").write_text(line)
    assert refused(read_results, tmp_path).where == str(tmp_path / "results.json")


@pytest.mark.parametrize("kind", ["multiple_choice", "numeric", "exact_match"])
@pytest.mark.parametrize(
    "change",
    [
        {"gold": []}, {"gold": ["b"]}, {"gold": {"a": "b"}}, {"gold": None}, {"gold": ""},
        {"options": {"a": "b"}, "distractors": {"a": "b"}}, {"options": 3, "distractors": 3},
        {"options": "bc", "distractors": "bc"}, {"options": [["b"], ["c"]], "distractors": [["b"]]},
        {"options": [None, "b"], "distractors": [None]}, {"options": [{}, "b"], "distractors": [{}]},
        {"options": ["", "b"], "distractors": [""]}, {"id": []}, {"id": {"a": 1}}, {"question": ["a"]},
        {"question": {"a": "b"}}, {"question": None},
        {"options": ["b"] * 50_000, "distractors": ["b"] * 50_000},
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_values_of_another_type_are_named_by_line(tmp_path, task_file, kind, change):
    good = {**ROW, "gold": "2", "options": ["2", "3"], "distractors": ["3"], "id": "first"}
    text = TASK.replace("exact_match", kind)
    assert len(load_task(task_file(text, [good])).items) == 1
    error = refused(load_task, task_file(text, [good, {**good, "id": "second", **change}]))
    assert error.where == f"{tmp_path / 'rows.jsonl'}:2"


@pytest.mark.parametrize("gold", ["NaN", "Infinity", "-inf", "1e999999999", "two", "2 3"])
def test_a_gold_number_that_is_none_is_named_by_line(tmp_path, task_file, gold):
    text = TASK.replace("exact_match", "numeric")
    error = refused(load_task, task_file(text, [{"question": "a?", "gold": gold}]))
    assert error.where == f"{tmp_path / 'rows.jsonl'}:1"
    assert "is not a number" in error.message


def test_numbers_and_truth_values_are_read_as_texts(task_file):
    rows = [{"question": 7, "gold": 1e20, "id": 3}, {"question": 0.5, "gold": 14.0, "id": True}]
    items = load_task(task_file(TASK.replace("exact_match", "numeric"), rows)).items
    assert [(item.id, item.prompt, item.gold) for item in items] == [
        ("3", "7", "1" + "0" * 20),
        ("True", "0.5", "14.0"),
    ]


SCORE = {"value": 0.5, "n": 2}
ENTRY = {"task": "a", "n": 2, "likelihood": SCORE, "generation": None}
SAMPLE = {"task": "a", "id": "0", "likelihood": {"correct": True}, "generation": None}
ANSWER = {
    "id": "a",
    "question": "q",
    "answer": "x",
    "truncated": False,
    "repeated_4gram_share": 0,
    "teacher_nll": None,
}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"tasks": 3}, "tasks must be a list"),
        ({"tasks": {"a": ENTRY}}, "tasks must be a list"),
        ({"tasks": [ENTRY, 3]}, "tasks.1 must be an object"),
        ({"tasks": [{**ENTRY, "task": 3}]}, "tasks.0.task must be a text"),
        ({"tasks": [{**ENTRY, "n": "2"}]}, "tasks.0.n must be a whole number"),
        ({"tasks": [{**ENTRY, "n": True}]}, "tasks.0.n must be a whole number"),
        ({"tasks": [{**ENTRY, "likelihood": [1]}]}, "tasks.0.likelihood must be an object"),
        ({"tasks": [{**ENTRY, "likelihood": {"n": 2}}]}, "tasks.0.likelihood lacks value"),
        ({"tasks": [{**ENTRY, "generation": {"value": "1", "n": 2}}]}, "tasks.0.generation.value"),
        ({"tasks": [{"task": "a"}]}, "tasks.0 lacks n"),
    ],
)
def test_results_of_another_shape_are_named(tmp_path, change, place):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": SCHEMA, "tasks": [ENTRY]}))
    assert read_results(tmp_path)["tasks"] == [ENTRY]
    path.write_text(json.dumps({"schema": SCHEMA, **change}))
    assert place in refused(read_results, tmp_path).message


@pytest.mark.parametrize(
    ("name", "read", "good", "change"),
    [
        ("samples", read_samples, SAMPLE, change)
        for change in (
            {"task": 3}, {"id": None}, {"likelihood": True}, {"likelihood": {"correct": "yes"}}, {"generation": []}
        )
    ]
    + [
        ("transcripts", read_transcripts, ANSWER, change)
        for change in ({"answer": None}, {"teacher_nll": "1"}, {"truncated": 1}, {"repeated_4gram_share": None})
    ],
)  # fmt: skip
def test_rows_of_another_shape_are_named_by_line(tmp_path, name, read, good, change):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert read(tmp_path) == [good]
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
    assert refused(read, tmp_path).where == f"{path}:2"


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "open.jsonl").write_bytes(
        b'\xef\xbb\xbf{"question": "Where?"}\r\n{"question": "Who?", "id": null}\r\n'
    )
    assert [
        (question.id, question.question) for question in load_questions(tmp_path / "open.jsonl").items
    ] == [
        ("1", "Where?"),
        ("2", "Who?"),
    ]
    (tmp_path / "x.json").write_bytes(b"\xff")
    assert "not UTF-8" in refused(read_json, tmp_path / "x.json").message
